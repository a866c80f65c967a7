"""Plans: every teacher with every variant and recipe, and what a plan says of quantization, adapters, ranks, memory."""

import json
from importlib.resources import files

import pytest
from tiny import save_configuration
from transformers import AutoConfig

from rwkvinside.config.load import load_config
from rwkvinside.config.recipes import recipes
from rwkvinside.config.resolve import resolve
from rwkvinside.config.teacher_lookup import teachers, variants
from rwkvinside.errors import UserError
from rwkvinside.planning import plan
from rwkvinside.planning.devices import CARDS
from rwkvinside.planning.plan import plan_text

VARIANTS = ("attention-freeze", "multi-card", "one-card", "quantized", "small-machine")
GPU = ["device=cuda", "precision=bf16"]
LARGEST = {"Qwen3-0.6B": 24}  # GB of the card that one-card needs at most; the others 80


@pytest.fixture
def teacher(tmp_path):
    return save_configuration(tmp_path / "tiny", intermediate_size=64)


def planned(teacher, *overrides, variant=(), ranks=1, stages=None):
    config = load_config(teacher=teacher, variant=variant, overrides=overrides)
    return plan_text(resolve(config, stages, ranks), config)


def test_variants_are_found_as_package_data():
    assert tuple(variants()) == VARIANTS
    shipped = {entry.name for entry in (files("rwkvinside.recipes") / "variants").iterdir()}
    assert shipped == {f"{name}.yaml" for name in VARIANTS}


@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(teachers()))
def test_every_teacher_plans_with_every_variant(name):
    for variant in VARIANTS:
        text = planned(name, *GPU, variant=[variant], ranks=8 if variant == "multi-card" else 1)
        stages = ["calibrate", *(["align_lora"] if variant == "attention-freeze" else []), "align", "distill"]
        assert [line.split(":")[0].split(" ")[0] for line in text.split("\n\n")[1:]] == [*stages, "exports"]
        cards = [int(line.split()[-2]) for line in text.splitlines() if "fits a GPU of" in line]
        assert set(cards) <= set(CARDS)
        if variant == "one-card":
            assert len(cards) == len(stages) and max(cards) <= LARGEST.get(name, 80), text
        if variant == "multi-card":
            assert len(cards) == len(stages) and max(cards) <= 80, text
            assert '"zero_optimization"' in text
        if variant in ("quantized", "small-machine"):
            assert "linear layers in nf4" in text and "LoRA" in text and "adamw8bit" in text


@pytest.mark.integration
@pytest.mark.parametrize("place, name", enumerate(sorted(teachers())))
def test_every_teacher_and_every_recipe_plan(place, name):
    """A third of the recipes each: of every recipe there are three teachers."""
    for recipe in sorted(recipes())[place % 3 :: 3]:
        config = load_config(teacher=name, recipe=recipe, overrides=GPU)
        text = plan_text(resolve(config), config)
        assert f"\nrecipe    {recipe}\n" in text
        # llama.cpp has not every width of heads, and says so
        assert ("warning   llama.cpp" in text) == ("warning" in text) == (recipe == "gguf" and name != "SmolLM2-135M")
        assert [line.split(":")[0].split(" ")[0] for line in text.split("\n\n")[1:]] == [*config.run, "exports"]


@pytest.mark.integration
@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_every_recipe_plans_with_every_variant(recipe):
    for variant in VARIANTS:
        config = load_config(teacher="Qwen3-8B", recipe=recipe, variant=[variant], overrides=GPU)
        plan = resolve(config, ranks=8 if variant == "multi-card" else 1)
        if recipe == "simultaneous" and variant in ("one-card", "quantized", "small-machine"):
            with pytest.raises(UserError, match="'attention' sets the rate of nothing"):  # which they freeze
                plan_text(plan, config)
        else:
            assert plan_text(plan, config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_preset_as_a_file_is_the_preset_by_name(variant):
    for name in teachers():
        with (files("rwkvinside.recipes") / "teachers" / f"{name}.yaml").open() as file:
            by_file = load_config([file.name], variant=[variant])
        assert by_file == load_config(teacher=name, variant=[variant])


def test_variants_stand_between_the_preset_and_what_is_given(tmp_path, teacher):
    one = load_config(teacher="Qwen3-8B", variant=["one-card"])
    assert one.stages["distill"].train == ["mixer", "adapters"]  # what the preset says of the variant
    assert one.stages["distill"].optim.kind == "adamw8bit"  # the variant
    assert load_config(teacher="Qwen3-4B", variant=["one-card"]).stages["distill"].train == [".*"]
    file = tmp_path / "own.yaml"
    file.write_text("variant: [quantized, attention-freeze]\nstages: {distill: {batch: {micro_rows: 3}}}\n")
    both = load_config([file], teacher=teacher)
    assert both.run == ["calibrate", "align_lora", "align", "distill"] and both.quantize.groups == ["mlp", "teacher"]
    assert both.stages["distill"].batch.micro_rows == 3
    assert load_config(teacher=teacher, overrides=["variant=quantized"]).quantize.groups == ["mlp", "teacher"]
    with pytest.raises(UserError) as caught:
        load_config(teacher=teacher, variant=["onecard"])
    assert caught.value.cause == "variant 'onecard' is not known; did you mean one-card?"


def test_attention_freeze_trains_what_is_new_first(teacher):
    text = planned(teacher, variant=["attention-freeze"])
    first = text[text.index("\nalign_lora") : text.index("\nalign:")]
    rows = {line.split()[0]: "trains" in line for line in first.splitlines() if line.startswith("  mixer.")}
    assert rows == {"mixer.proj": False, "mixer.lora": True}


def test_a_published_preset_that_is_not_its_variant_is_warned_of(teacher):
    lines = planned(teacher, "student.preset=hxa079").splitlines()
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert warning == (
        "warning   not the published hxa079: no layer keeps attention (student.attention_layers); attention that is "
        "kept rotates (student.attention_rope); the key scale is decay, not log (student.key_scale)"
    )
    variant = ["student.attention_layers=[1]", "student.attention_rope=false"]
    for scale in ("log", "null"):
        assert "warning" not in planned(teacher, "student.preset=hxa079", *variant, f"student.key_scale={scale}")
    assert "warning" not in planned(teacher, "student.preset=hxa07c", *variant)  # its scale is decay
    assert "warning" not in planned(teacher)


def test_kept_layers_that_are_cut_are_named(teacher):
    kept = "student.attention_layers=[1]"
    text = planned(teacher, kept, "student.attention_window=64", "student.attention_sinks=4")
    assert "\n          attention of layers 1 sees the last 64 tokens and the first 4\n" in text
    assert "sees the last" not in planned(teacher, kept)
    text = planned(teacher, kept, "student.attention_log_base=500")
    assert "\n          scores of attention grow with the position, by its logarithm to the base 500\n" in text
    with pytest.raises(UserError, match="student.attention_window = 64: is 64, but no layer keeps attention"):
        planned(teacher, "student.attention_window=64")


def test_a_router_loss_is_named_and_needs_routers(teacher, tmp_path):
    with pytest.raises(UserError, match="stages.distill.loss.router is 0.001, but the teacher has no routers"):
        planned(teacher, "stages.distill.loss.router=0.001")
    sparse = AutoConfig.for_model(
        "qwen3_moe", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    sparse.save_pretrained(tmp_path / "sparse")
    text = planned(str(tmp_path / "sparse"), "stages.distill.loss.router=0.001")
    assert "loss      1 KL(teacher || student) + 0.001 balance of experts in each row" in text


def test_ranks_show_what_deepspeed_is_given(teacher):
    text = planned(teacher, "deepspeed.zero_stage=2", ranks=2)
    (settings,) = [line.split("deepspeed ")[1] for line in text.splitlines() if line.startswith("  deepspeed")][:1]
    assert json.loads(settings)["zero_optimization"]["stage"] == 2
    assert "  deepspeed" not in planned(teacher)


def test_a_stage_that_there_is_not(teacher):
    with pytest.raises(UserError, match="there is no stage 'refine'"):
        planned(teacher, stages=["refine"])


def test_a_tied_head_counts_once(teacher):
    lines = planned(teacher).splitlines()
    copied = lines[1].split(": ")[1].split(" copied from the teacher")[0]
    assert lines[0].endswith(f", {copied} parameters")


def test_windows_are_named_by_layer(teacher):
    def student(*overrides):
        return planned(teacher, *overrides).splitlines()[1]

    assert "window" not in student()
    assert "window of 8 and 2 first tokens, calibrated" in student("student.window=8", "student.sinks=2")
    text = student("student={window: {1-2: 16, 3: 8}, sinks: {1: 4}}")
    shown = ["no window in layers 0", "window of 16 and 4 first tokens in layers 1", "window of 16 in layers 2"]
    assert ", ".join([*shown, "window of 8 in layers 3, calibrated start"]) in text


def test_memory_follows_the_windows_of_all_layers(teacher):
    def largest(window):
        config = load_config(teacher=teacher, overrides=[f"student.window={window}"])
        return resolve(config).stage("align"), plan.meta_student(resolve(config).settings)

    sizes = []
    for window in ("0", "{1: 256}", "256"):
        stage, model = largest(window)
        kind = stage.stage.prepare(model, stage, stage.phases[0].train)
        sizes.append(plan.stage_memory(stage, model, kind, None).peak)
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_kept_attention_in_windows_is_counted_as_the_kernel_of_its_device(teacher, backend):
    def kept(window, *device):
        more = [f"student.attention_window={window}", f"student.backend={backend}", *device]
        config = load_config(teacher=teacher, overrides=["student.attention_layers=[1]", *more])
        stage, model = resolve(config).stage("distill"), plan.meta_student(resolve(config).settings)
        kind = stage.stage.prepare(model, stage, stage.phases[0].train)
        return plan.stage_memory(stage, model, kind, None).peak

    assert kept(64) < kept(128)  # PyTorch holds the mask of a block of queries
    assert kept(64, *GPU) == kept(128, *GPU)  # Triton does not, whatever computes the mixers


def test_calibration_counts_what_is_quantized(teacher):
    text = planned(teacher, "quantize.groups=[mlp]", "stages.distill.train=[mixer]", stages=["calibrate"])
    assert f"  {'mlp':<12}{'24.58 K':>12}  frozen in nf4\n" in text


def test_the_loss_and_its_teacher_are_named(teacher):
    more = ["stages.distill.loss={divergence: js, top_k: 8, ce: 0.1, temperature: 2}"]
    more += ["stages.distill.teacher_model.quantize=int8", "stages.distill.teacher=separate"]
    text = planned(teacher, *more, stages=["distill"])
    assert "1 Jensen-Shannon of its 8 likeliest tokens + 0.1 cross-entropy at temperature 2" in text
    assert "teacher   a second model of the same weights, in int8" in text


def test_what_does_not_fit_is_said(teacher, monkeypatch):
    monkeypatch.setattr(plan, "device_memory", lambda device, gpu: 2**20)
    assert "DOES NOT FIT: this machine has 1 MiB" in planned(teacher)
    monkeypatch.setattr(plan, "device_memory", lambda device, gpu: 2**40)
    assert "DOES NOT FIT" not in planned(teacher)


def test_a_missing_logger_is_refused(teacher, monkeypatch):
    monkeypatch.setattr("rwkvinside.training.loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        planned(teacher, "loggers=[wandb]")


def test_disk_counts_the_best_checkpoint_where_there_can_be_another_one(teacher):
    def disk(*overrides):
        [line] = [line for line in planned(teacher, *overrides, stages=["distill"]).splitlines() if "  disk " in line]
        return line

    def copies(line):
        size, most = (line.split(mark)[1].split()[:2] for mark in ("disk", ": "))
        units = {"KiB": 2**10, "MiB": 2**20}
        return float(most[0]) * units[most[1]] / (float(size[0]) * units[size[1]])

    plain, evaluated = disk(), disk("stages.distill.evaluate_every_tokens=1M")
    assert ", 2 kept: " in plain and copies(plain) == pytest.approx(3, rel=0.02)
    assert ", 2 and the best kept: " in evaluated and copies(evaluated) == pytest.approx(4, rel=0.02)
