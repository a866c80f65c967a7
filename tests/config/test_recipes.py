"""Recipes: what they set, where they stand between presets and the user, and that a tiny model runs through each."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny import byte_tokenizer, save_configuration, save_qwen3, save_texts

import train_distill
from rwkvinside.config.load import load_config
from rwkvinside.config.recipes import EVERY, recipes
from rwkvinside.config.resolve import resolve
from rwkvinside.config.show import to_yaml
from rwkvinside.errors import UserError
from rwkvinside.planning.plan import plan_text

RECIPES = ("gguf", "halo", "hxa079", "radlads", "simultaneous", "windowed")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def teacher(tmp_path):
    return save_configuration(tmp_path / "tiny", max_position_embeddings=16384)


def test_what_ships():
    assert tuple(recipes()) == RECIPES
    for name, settings in recipes().items():
        assert "teacher" not in settings, f"{name} is about a model: such files are in configs/teachers"
        head = (ROOT / "configs" / "recipes" / f"{name}.yaml").read_text().split("\n\n")[0]
        assert "docs/recipes.md" in head.replace("\n# ", " ") and "arXiv" in head
        assert f"\n## {name}\n" in (ROOT / "docs" / "recipes.md").read_text()


def test_a_recipe_reads_back_as_written(teacher, tmp_path):
    for name in RECIPES:
        config = load_config(teacher=teacher, recipe=name)
        assert config.recipe == name
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(config))
        assert load_config([file]) == config


def test_published_numbers(teacher, tmp_path):
    rad = load_config(teacher=teacher, recipe="radlads")
    assert (rad.student.preset, rad.student.init, rad.run) == ("rad", "published", ["align", "distill", "sft"])
    assert not rad.student.attention_layers
    align, distill, longer = (rad.stages[name] for name in rad.run)
    assert (align.tokens, align.data.seq_len, align.length.rows_per_step) == (100_000_000, 512, 32)
    assert (align.optim.lr, align.optim.lr_final, align.optim.warmup_steps) == (1e-3, 1e-5, 50)
    assert (distill.length.rows_per_step, distill.optim.lr, distill.optim.lr_rest) == (96, 1e-5, 1e-5)
    assert (longer.objective, longer.data.seq_len, longer.length.rows_per_step) == ("sft", 16384, 96)

    hxa = load_config(teacher=teacher, recipe="hxa079").student
    assert (hxa.preset, hxa.key_scale, hxa.attention_rope) == ("hxa079", "log", False)

    halo = load_config(teacher=teacher, recipe="halo")
    steps = {name: halo.stages[name].length.steps for name in ("align", "distill", "sft")}
    assert steps == {"align": 20_000, "distill": 20_000, "sft": 500}
    assert halo.student.key_scale == "decay" and not halo.student.attention_rope

    short = load_config(teacher=save_configuration(tmp_path / "short", max_position_embeddings=128), recipe="radlads")
    assert [short.stages[name].data.seq_len for name in short.run] == [128, 128, 128]

    plain, windowed = load_config(teacher=teacher), load_config(teacher=teacher, recipe="windowed")
    assert (windowed.student.window, windowed.student.sinks) == (64, 4)
    student = windowed.student.model_copy(update={"window": 0, "sinks": 0})
    calibrate = windowed.stages["calibrate"]
    assert (calibrate.length.total_tokens, calibrate.data.seq_len) == (16_000, 2048)
    stages = windowed.stages | {"calibrate": plain.stages["calibrate"]}
    assert windowed.model_copy(update={"recipe": None, "student": student, "stages": stages}) == plain


def test_layers_are_the_published_ones_or_spread_evenly(teacher):
    def kept(teacher, recipe):
        return load_config(teacher=teacher, recipe=recipe).student.attention_layers

    assert kept("Qwen3-8B", "halo") == (1, 2, 4, 6, 7, 10, 24, 33, 34)
    assert [len(kept(f"Qwen3-{size}B", "halo")) for size in ("1.7", "4", "8")] == [7, 9, 9]
    assert [len(kept(f"Qwen3-{size}B", "hxa079")) for size in (8, 14)] == [4, 6]
    assert kept("Qwen3-32B", "halo") == tuple(range(3, 64, 4))
    assert kept(teacher, "hxa079") == (3,)


def test_a_layout_replaces_another_one_whole(teacher, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("student: {preset: hxa079, attention_layers: {every: 2, first: 1}}")
    over = ["student.attention_layers={last: 1}"]
    assert load_config([file], teacher=teacher).student.attention_layers == (0, 1, 3)
    student = load_config([file], teacher=teacher, recipe="hxa079", overrides=over).student
    assert student.attention_layers == (3,) and student.preset == "hxa079"
    assert load_config([file], teacher="Qwen3-8B", recipe="halo", overrides=over).student.attention_layers == (35,)
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(load_config([file], teacher=teacher)))
    assert load_config([written]).student.attention_layers == (0, 1, 3)


def test_a_recipe_stands_between_the_preset_and_the_variant(teacher, tmp_path):
    eight = load_config(teacher="Qwen3-8B", recipe="halo", variant=["one-card"])
    assert eight.stages["distill"].optim.lr == 3e-5  # the preset, of the recipe
    assert eight.stages["distill"].activation_checkpointing  # the preset
    assert eight.stages["distill"].optim.kind == "adamw8bit"  # the variant
    assert eight.stages["distill"].tokens == 983_040_000
    freeze = load_config(teacher=teacher, recipe="windowed", variant=["attention-freeze"])
    assert freeze.run == ["calibrate", "align_lora", "align", "distill"] and freeze.student.window == 64
    file = tmp_path / "own.yaml"
    file.write_text("recipe: hxa079\nstudent: {attention_layers: [0, 2]}\nstages: {align: {tokens: 5M}}\n")
    own = load_config([file], teacher=teacher, overrides=["student.key_scale=decay"])
    assert own.student.attention_layers == (0, 2) and own.stages["align"].tokens == 5_000_000
    assert own.student.key_scale == "decay" and not own.student.attention_rope
    assert load_config([file], teacher=teacher, recipe="radlads").student.preset == "rad"


def test_what_is_not_a_recipe(teacher):
    for given, cause in (
        (dict(recipe="radlad"), "recipe 'radlad' is not known; did you mean radlads?"),
        (dict(recipe="Qwen3-8B"), "recipe 'Qwen3-8B' is not known"),
        (dict(overrides=["recipe=5"]), "recipe = 5: must be a valid string"),
        (dict(overrides=[f"{EVERY}=4"]), f"{EVERY}: unknown key"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(teacher=teacher, **given)
        assert cause in caught.value.cause and "\n" not in caught.value.cause


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    root = tmp_path_factory.mktemp("material")
    save_qwen3(root / "teacher", byte_tokenizer("<eos>", eos_token="<eos>"), num_hidden_layers=4)
    for name, count in (("train", 60), ("val", 4)):
        save_texts(root / f"{name}.jsonl", count)
    return root


@pytest.mark.integration
@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_model_runs_through(name, material, tmp_path):
    stages = ("calibrate", "align", "distill", "sft")
    small = [f"stages.{stage}.{field}" for stage in stages for field in ("tokens=256", "data.seq_len=32")]
    small += [f"stages.{stage}.batch.tokens=128" for stage in stages]
    argv = ["--teacher", material / "teacher", "--data", material / "train.jsonl", "--val", material / "val.jsonl"]
    argv += ["--recipe", name, "--out", tmp_path / "run", f"data.cache_dir={material / 'cache'}", "device=cpu", *small]
    assert train_distill.main([*map(str, argv)]) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["recipe"] == name
    config = load_config([tmp_path / "run" / "config.yaml"])
    assert (tmp_path / "run" / "plan.txt").read_text() == plan_text(resolve(config), config)
    conversion = json.loads((tmp_path / "run" / "conversion.json").read_text())
    assert conversion["finished_stages"] == config.run


def test_a_student_for_llama_cpp_that_it_will_not_run_is_warned_of(tmp_path):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 300}
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name, changes, said in (
        ("fits", {}, ""),
        ("wide", {"hidden_size": 256, "head_dim": 128}, "with Metal it ends, with Vulkan it computes them wrong"),
        ("odd", {"head_dim": 32}, "llama.cpp will not run this student: 2 heads of 32 are not the width 128"),
        ("words", {}, "llama.cpp will not run this student: llama.cpp cannot use the teacher's tokenizer: it changes"),
    ):
        teacher = save_configuration(tmp_path / name, **sizes | changes)
        if name == "words":
            facts = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
            facts["normalizer"] = {"type": "Lowercase"}
            (Path(teacher) / "tokenizer.json").write_text(json.dumps(facts))
            shutil.copy(tmp_path / "tokenizer" / "tokenizer_config.json", teacher)
        config = load_config(teacher=teacher, recipe="gguf")
        text = plan_text(resolve(config), config)
        assert said in text and ("warning" in text) == bool(said)
