"""Configurations: what wins over what, which defaults a teacher gets, and that every problem is named at once."""

import json
import sys
import typing
from importlib.resources import files

import pytest
import yaml
from tiny import save_configuration

from rwkvinside.cli.main import main
from rwkvinside.config import resolve as resolving
from rwkvinside.config.load import DEFAULT_DATA, load_config
from rwkvinside.config.resolve import resolve, with_steps
from rwkvinside.config.show import describe, to_yaml
from rwkvinside.config.teacher_lookup import teacher_path, teachers
from rwkvinside.errors import UserError
from rwkvinside.families.fused_layers import ALL, Fused
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.stages.registry import OBJECTIVES, STAGES, find_stage_class
from rwkvinside.support.settings import parse_count

# Parameters in billions as the model cards state them (embedding counted once where it is tied).
PARAMETERS = {
    "Llama-3.1-8B": 8.03,
    "Qwen2.5-7B": 7.62,
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.72,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.77,
    "Qwen3-32B": 32.76,
    "SmolLM2-135M": 0.1345,
}


@pytest.fixture
def teacher(tmp_path):
    return make_teacher(tmp_path / "tiny")


def make_teacher(path, **changes):
    fields = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return save_configuration(path, **fields | changes)


def problems(*overrides, **arguments):
    with pytest.raises(UserError) as caught:
        load_config(overrides=overrides, **arguments)
    assert caught.value.exit_code == 2
    return caught.value.cause.split("\n  ")


def test_a_stage_without_its_section_is_told_where_it_is():
    told = problems("align.tokens=5k", teacher="Qwen3-0.6B")
    assert told == ["align.tokens: unknown key; did you mean stages.align.tokens?"]


def test_a_preset_stands_for_its_hub_id_whatever_asks(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # compared with, not converted
    assert teacher_path("qwen3-14b") == "Qwen/Qwen3-14B" and teacher_path(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", sorted(teachers()))
def test_every_preset_loads_and_describes_the_model_of_that_name(name):
    from rwkvinside.planning.plan import meta_student, teacher_parameters

    config = load_config(teacher=name.lower())
    assert name in config.teacher.path
    assert config.data.train == [DEFAULT_DATA]
    assert config.out == f"runs/{config.teacher.path.split('/')[1]}"
    # to the digits that the card gives
    assert teacher_parameters(meta_student(resolve(config).settings)) / 1e9 == pytest.approx(PARAMETERS[name], rel=2e-3)
    assert load_config(teacher=config.teacher.path) == config


def test_teachers_are_found_as_package_data():
    shipped = {
        entry.name for entry in (files("rwkvinside.recipes") / "teachers").iterdir() if entry.name.endswith(".yaml")
    }
    assert shipped == {f"{name}.yaml" for name in PARAMETERS}


def test_later_beats_earlier(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("teacher: {path: Qwen3-14B}\nseed: 1\nlog_every: 1\nout: a\nstudent: {attention_layers: [1, 2]}\n")
    second.write_text("seed: 2\ndata: {train: [from-file]}\nout: b\nstudent: {attention_layers: [3]}\n")
    assert load_config([first]).stages["distill"].optim.lr_rest == 7e-6  # the preset's
    config = load_config([first, second], data=["x", "y"], out="c", overrides=["out=d", "student.preset=rad"])
    assert (config.seed, config.log_every, config.out, config.student.preset) == (2, 1, "d", "rad")
    assert config.student.attention_layers == (3,)  # lists replace, they are not joined
    assert config.data.train == ["x", "y"]
    assert load_config([first, second]).data.train == ["from-file"]
    assert load_config([first, second], teacher="Qwen3-8B").teacher.path == "Qwen/Qwen3-8B"


def test_resolved_configuration_reads_back_the_same(tmp_path, teacher):
    config = load_config(
        teacher=teacher,
        overrides=["student.attention_layers=[4,1]", "stages.align.tokens=600k", "stages.mine.objective=distill"],
    )
    assert config.student.attention_layers == (1, 4)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config([file]) == config


def test_small_and_large_teachers_get_their_own_defaults(teacher):
    small, large = load_config(teacher=teacher), load_config(teacher="Qwen3-8B")
    assert small.run == large.run == ["calibrate", "align", "distill"]
    assert set(STAGES) == set(small.stages)
    assert small.stages["align"].length.tokens_per_step == 4096
    assert small.stages["long"].data.seq_len == 512  # capped by max_position_embeddings
    assert large.stages["distill"].data.seq_len == 4096 and large.stages["distill"].batch.tokens == 131072
    # width 4096 is where the published rates come from
    optim = large.stages["distill"].optim
    assert (optim.lr, optim.lr_rest, optim.lr_final, optim.warmup_steps) == (1e-4, 1e-5, 1e-5, 50)
    assert large.stages["align"].optim.lr == 1e-3
    for name in ("align", "distill"):
        rates = find_stage_class(name, None).learning_rates(64)
        for key, rate in rates.items():
            assert getattr(small.stages[name].optim, key) == pytest.approx(rate, rel=1e-3)  # 4 digits are kept
    assert small.data.train == []


def test_a_given_rate_takes_the_others_along(teacher):
    optim = load_config(teacher="Qwen3-8B", overrides=["stages.distill.optim.lr=3e-4"]).stages["distill"].optim
    assert (optim.lr, optim.lr_rest, optim.lr_final) == (3e-4, 3e-5, 3e-5)
    optim = load_config(teacher="Qwen3-8B", overrides=["stages.distill.optim.lr_rest=0"]).stages["distill"].optim
    assert (optim.lr, optim.lr_rest) == (1e-4, 0)


def test_mixers_learn_slower_in_small_steps(teacher):
    def rates(*overrides):
        optim = load_config(teacher=teacher, overrides=overrides).stages["distill"].optim
        return optim.lr, optim.lr_rest, optim.lr_final

    lr, rest, final = rates()
    short = rates("stages.distill.tokens=300k")  # steps of 512 tokens, not of 4096
    assert short == pytest.approx((lr / 2, rest, final / 2), rel=1e-3)
    assert rates("stages.distill.tokens=300k", "stages.distill.batch.tokens=512") == (lr, rest, final)
    align = load_config(teacher=teacher, overrides=["stages.align.tokens=300k"]).stages["align"].optim
    assert align.lr_rest == align.lr  # nothing learns faster than the mixers
    given = rates("stages.distill.tokens=300k", "stages.distill.optim.lr=1e-3")
    assert given == pytest.approx((1e-3, rest * 1e-3 / lr, final * 1e-3 / lr), rel=1e-3)


def test_rates_fall_with_width():
    for objective in ("align", "distill", "sft"):
        rates = [find_stage_class(objective, None).learning_rates(width)["lr"] for width in (64, 1024, 4096, 8192)]
        assert rates == sorted(rates, reverse=True)


def test_short_stages_have_short_warm_up(teacher):
    config = load_config(teacher=teacher, overrides=["stages.align.tokens=600k", "stages.sft.tokens=600k"])
    assert config.stages["align"].optim.warmup_steps == 50  # of 586 steps
    assert config.stages["sft"].optim.warmup_steps == 4
    tiny = load_config(teacher=teacher, overrides=["stages.align.tokens=50k", "stages.distill.tokens=20k"])
    assert tiny.stages["align"].optim.warmup_steps == 24  # of 98 steps
    assert tiny.stages["distill"].optim.warmup_steps == 10  # of 40 steps
    few = load_config(teacher=teacher, overrides=["stages.align.tokens=5k", "stages.distill.tokens=3k"])
    assert few.stages["align"].optim.warmup_steps == 20  # of 10 steps: it never reaches the full rate
    assert few.stages["distill"].optim.warmup_steps == few.stages["distill"].length.steps == 6
    given = load_config(teacher=teacher, overrides=["stages.align.optim.warmup_steps=0"])
    assert given.stages["align"].optim.warmup_steps == 0


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_short_stages_have_small_steps(teacher, stage):
    def step(tokens: str, *settings: str) -> int:
        overrides = [f"stages.{stage}.tokens={tokens}", *(f"stages.{stage}.{setting}" for setting in settings)]
        return load_config(teacher=teacher, overrides=overrides).stages[stage].batch.tokens

    whole = step("1B")
    assert step(str(400 * whole)) == whole  # as many steps as are enough
    assert step(str(400 * whole - 1)) == step(str(200 * whole)) == whole // 2
    assert step("10k") == step("10k", "batch.micro_rows=1") == 512  # a row at least
    assert step("10k", "data.seq_len=300") == 512  # half of it would be less than a row
    assert step("10k", "batch.tokens=2048") == 2048
    others = load_config(teacher=teacher, overrides=["stages.sft.tokens=10k", "stages.long.tokens=20k"]).stages
    assert (others["sft"].batch.tokens, others["long"].batch.tokens) == (4096, 16384)


def test_default_steps_have_a_row_for_every_rank():
    short = ["stages.distill.tokens=10M", "run=[calibrate,align,distill]", "device=cpu"]
    config = load_config(teacher="Qwen3-8B", overrides=short)

    def distill(ranks, config=config, **options):
        return resolve(config, ranks=ranks, **options).stage("distill")

    assert [distill(ranks).shape.rows for ranks in (1, 4, 6, 8)] == [4, 4, 6, 8]  # of 4096 tokens
    assert distill(8).settings.batch.tokens == distill(8).length.batch_tokens == 8 * 4096
    assert distill(8).settings.optim.warmup_steps == 30  # a tenth of 306 steps
    assert distill(1).settings.optim.warmup_steps == 50  # of 611
    assert distill(8, done=["distill"]).shape.rows == 4  # what has ended stays as it was
    assert resolve(config, ranks=64).stage("calibrate").settings == config.stages["calibrate"]  # one process fits
    more = ["stages.distill.optim.warmup_steps=50", "stages.distill.unfreeze=[{at_tokens: 9980000, train: [mlp]}]"]
    late = load_config(teacher="Qwen3-8B", overrides=[*short, *more])
    assert distill(8, late).settings.optim.warmup_steps == 50
    with pytest.raises(UserError, match=r"stages.distill with batch.tokens 262144: .*unfreeze.at_tokens 9980000 is"):
        distill(64, late)


def test_given_steps_of_fewer_rows_than_ranks_are_refused(teacher, capsys):
    overrides = ["device=cpu", "stages.distill.batch.tokens=2048"]
    assert main(["plan", "--teacher", teacher, *overrides, "--ranks", "8"]) == 2
    assert capsys.readouterr().err == (
        "error: stages.distill.batch.tokens=2048 is 4 rows of data.seq_len=512, too few for 8 processes\n"
        "raise it to 4096 at least, or start 4 processes at most\n"
    )
    config = load_config(teacher=teacher, overrides=overrides)
    assert resolve(config, ranks=4).stage("distill").shape.rows == 4
    assert resolve(config, ["align"], ranks=8).selected == ("align",)  # distill does not run


def test_a_run_keeps_the_steps_that_it_has(teacher):
    config = load_config(teacher=teacher, overrides=["stages.align.tokens=600k", "stages.sft.batch.tokens=512"])
    stages = config.stages
    assert (stages["align"].batch.tokens, stages["distill"].batch.tokens) == (1024, 4096)
    kept = with_steps(config, ["align", "distill"], 4, {"align": 2048, "distill": 1024, "sft": 1024}).stages
    assert (kept["align"].batch.tokens, kept["align"].optim.warmup_steps) == (2048, 50)
    assert kept["distill"].batch.tokens == 4 * 512  # the four rows that four ranks need
    assert kept["sft"] == stages["sft"] and kept["long"] == stages["long"]
    assert with_steps(config, [], 1) == config


def test_a_step_has_a_row_however_long_it_is():
    long_rows = load_config(teacher="SmolLM2-135M", overrides=["stages.align.data.seq_len=8192"])
    assert long_rows.stages["align"].batch.tokens == 8192


@pytest.mark.parametrize(
    "text, number", [("600k", 600_000), ("100M", 10**8), ("1B", 10**9), ("2.5m", 2_500_000), (7, 7)]
)
def test_counts(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["600q", "-1", "0", "1.5", True, None, "", "k", [1]])
def test_wrong_counts(teacher, text):
    with pytest.raises(ValueError, match="600k, 100M"):
        parse_count(text)


def test_all_problems_at_once(teacher):
    found = problems(
        "student.presett=x",
        "student.preset=cxa78",
        "student.attention_layers=[1,1]",
        "stages.algn.tokens=5",
        "stages.align.tokens=600q",
        "stages.calibrate.data.seq_len=9999",
        "stages.distill.loss=null",
        "seed=abc",
        "run=[calibrate,alin]",
        "data=foo",
        teacher=teacher,
    )
    assert found[0] == "10 problems in the configuration:"
    expected = [
        "stages.algn: a stage of your own needs an objective; did you mean align?",
        "student.preset = 'cxa78': allowed: cxa079, hxa079, hxa07a, hxa07b, hxa07c, cxa078, cxa076r, rad, x070, "
        "arwkv7; did you mean cxa078?",
        "student.attention_layers = [1, 1]: lists layer 1 twice; name each layer once",
        "student.presett: unknown key; did you mean student.preset?",
        "data = 'foo': must be a mapping of settings",
        "stages.align.tokens = '600q': must be a positive number such as 600k, 100M, 1B or 4096",
        "stages.distill: loss is null; leave it out for the defaults",
        "stages.calibrate.data.seq_len = 9999: is longer than the 512 positions that the teacher was made for",
        "seed = 'abc': must be a valid integer, unable to parse string as an integer",
        "run names stage 'alin', which is not in stages; did you mean align?",
    ]
    assert sorted(found[1:]) == sorted(expected)


@pytest.mark.parametrize(
    "override, cause",
    [
        ("student.attention_layers=[7,-6]", "has layer 7, -6, but there are layers 0 to 4 (-1 is the last)"),
        ("student.attention_layers=4", "student.attention_layers = 4: must be layers ([0, -1]), ranges (4-11)"),
        ("student.attention_layers={choose: restor, keep: 2}", "did you mean restore?"),
        ("student.attention_layers=[0,1,2,3,4]", "keeps all 5 layers"),
        ("student.sinks=4", "student.sinks = 4: is 4 without a window; set student.window"),
        ("student.attention_sinks=4", "is 4 without a window; set student.attention_window"),
        ("student.sinks={1: 4}", "without a window; set student.window"),
        ("student.window=-1", "student.window = -1: must be a number of tokens, 0 or more, or such numbers by layer"),
        (
            "student.window=[4,4,4,4,4]",
            "must be a number of tokens, 0 or more, or such numbers by layer (0: 64, 1-11: 32",
        ),
        ("student.window={}", "must be a number of tokens, 0 or more, or such numbers by layer"),
        ("student.window={0: 4.5}", "must be a number of tokens, 0 or more, or such numbers by layer"),
        ("student.window={first: 4}", "has the key first; name a layer (3), a range of them (4-11), or default"),
        ("student.window={3-1: 4}", "has the key 3-1; name a layer"),
        ("student.window={0-2: 4, 2: 8}", "names layer 2 twice"),
        ("student.window={3-5: 4}", "has layer 5, but the teacher has layers 0 to 4"),
        ("student={window: {0-2: 4}, sinks: {2-4: 1}}", "has first tokens in layer 3, which has no window"),
        ("student.preset.x=1", "student.preset = {'x': 1}: allowed"),
        ("stages=5", "stages = 5: must be a mapping"),
        ("stages.align=5", "stages.align = 5: must be a mapping"),
        ("stages.align.batch.tokens=100", "batch.tokens 100 is less than data.seq_len 512"),
        ("stages.align.loss.kl=1", "objective align has a fixed loss"),
        ("stages.align.train=[]", "train is empty"),
        ("stages.calibrate.optim.lr=1", "objective calibrate does not train"),
        ("stages.distill.loss.kl=0", "loss.kl must be positive"),
        ("stages.sft.loss.kl=1", "objective sft has loss.kl 0"),
        ("stages.align.optim.decay={start: 0.5, end: 0.1}", "ends at 0.1 before it starts at 0.5"),
        ("stages.align.optim.lr=.nan", "must be a finite number"),
        (
            "stages.mine.objective=distil",
            "stages.mine.objective = 'distil': allowed: calibrate, align, choose, distill, sft, pretrain; "
            "did you mean distill?",
        ),
        ("stages.align.batch.token=1", "unknown key; did you mean stages.align.batch.tokens?"),
        ("adapters=[{rnk: 4}]", "adapters.0.rnk: unknown key; did you mean adapters.0.rank?"),
        ("stages.align.unfreeze=[{at_tokens: 1k, train: [mlp], lr: 1}]", "stages.align.unfreeze.0.lr: unknown key"),
        ("run=[]", "run = []: is empty"),
        ("run=[align,align]", "lists align twice"),
        ("deepspeed.zero_stage=4", "deepspeed.zero_stage = 4: allowed: 0, 1, 2, 3"),
        ("fused_layers=yess", "fused_layers = 'yess': allowed: auto, True, False"),
        (
            "stages.align.activation_checkpointing=recurence",
            "stages.align.activation_checkpointing = 'recurence': allowed: False, True, recurrence; "
            "did you mean recurrence?",
        ),
        ("checkpoint=null", "checkpoint = None: must be a mapping"),
        ("seed", "'seed' is not of the form key=value"),
        ("a..b=1", "'a..b=1' is not of the form key=value"),
        ("seed=[1", "'seed=[1': the value is not valid YAML"),
        ("seed=${nothing}", "'seed=${nothing}': the value is not valid YAML"),
        (f"seed={2**64}", "seed = 18446744073709551616: must be less than 18446744073709551616"),
        ("seed=" + "9" * 5000, "a number of more than 4,300 digits"),
        ("stages.align.tokens=" + "9" * 400, "must be a positive number such as 600k"),
        ("data.today=tomorrow", "data.today = 'tomorrow': must be a day such as 2024-07-26"),
        ("data.val=['']", "names a source by an empty text"),
        ("data.train=" + "[" * 5000, "not valid YAML"),
    ],
)
def test_single_problems(teacher, override, cause):
    found = problems(override, teacher=teacher)
    assert len(found) == 1 and cause in found[0]


def test_a_list_in_place_of_a_section_beside_a_flag(teacher, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("data: [a.jsonl]\n")
    for options in ({"val": ["b.jsonl"]}, {"data": ["b.jsonl"]}, {"overrides": ["data.stream=true"]}):
        with pytest.raises(UserError, match=r"data = \['a.jsonl'\]: must be a mapping of settings") as caught:
            load_config([file], teacher=teacher, **options)
        assert "data: {train: [a.jsonl]}" in caught.value.hint
    file.write_text("stages: {align: [1]}\n")
    with pytest.raises(UserError, match="the settings do not fit together|stages.align = .1.: must be a mapping"):
        load_config([file], teacher=teacher, overrides=["stages.align.tokens=5"])


@pytest.mark.parametrize(
    "content", ["seed: " + "9" * 5000, "a: " + "[" * 5000, "".join(" " * i + "a:\n" for i in range(2000))]
)
def test_files_that_cannot_be_read(teacher, tmp_path, content):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML") as caught:
        load_config([file], teacher=teacher)
    assert "\n" not in caught.value.cause
    settings = tmp_path / "deepspeed.json"
    for text in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        settings.write_text(text)
        with pytest.raises(UserError, match=r"deepspeed\.json is not valid JSON"):
            load_config(teacher=teacher, deepspeed=str(settings))


@pytest.mark.parametrize(
    "field, value",
    [
        *(("num_attention_heads", value) for value in (0, -1, "x", True, 10**30)),
        *(("num_key_value_heads", value) for value in (0, 3)),
        *(("rope_parameters", {"rope_theta": 1e4} | change) for change in ({"rope_theta": 0}, {"factor": "x"})),
        *(("rope_parameters", {"rope_theta": 1e4, "rope_type": kind}) for kind in ("nonsense", "yarn", 3)),
        *(("dtype", value) for value in ("float99", 3, [])),
        *(("model_type", value) for value in ([], 3, None)),
        ("quantization_config", {"quant_method": "gptq"}),
        ("layer_types", ["chunked_attention"] * 5),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("hidden_act", "nonsense"),
        ("rms_norm_eps", "small"),
    ],
)
def test_odd_values_of_a_teacher(tmp_path, capsys, field, value):
    path = make_teacher(tmp_path / "odd", **{field: value})
    assert main(["plan", "--teacher", path]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert len(lines) == 2 and lines[0].startswith("error: ")


def test_one_text_is_a_list_of_one(teacher, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("seed: 5")
    config = load_config(file, teacher=teacher, data="train.jsonl", val="val.jsonl", overrides="log_every=3")
    assert (config.data.train, config.data.val) == (["train.jsonl"], ["val.jsonl"])
    assert (config.seed, config.log_every) == (5, 3)
    assert load_config(str(file), teacher=teacher, variant="one-card").variant == ["one-card"]


def test_windows_by_layer(teacher, tmp_path):
    config = load_config(teacher=teacher, overrides=["student={window: {0: 64, 2-3: 32, default: 8}, sinks: 4}"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    for read in (config, load_config([file])):
        fields = [read.student.mixer_overrides(i) for i in range(5)]
        assert [(f["window"], f["sinks"]) for f in fields] == [(64, 4), (8, 4), (32, 4), (32, 4), (8, 4)]
    with pytest.raises(UserError) as refused:
        load_config(teacher=teacher, overrides=["student.window={0:64,1-3:32}"])
    assert "student.window = {'0:64'" in str(refused.value) and "with a space after each colon" in str(refused.value)
    spec = StudentConfig(window={"1-3": 16}, sinks={"2": 1})
    fields = [spec.mixer_overrides(i) for i in range(5)]
    assert [(f["window"], f["sinks"]) for f in fields] == [(0, 0), (16, 0), (16, 1), (16, 0), (0, 0)]
    spec = StudentConfig(window={1: 16}, sinks=2)  # first tokens of layers without a window are nothing
    assert [spec.mixer_overrides(i)["sinks"] for i in range(3)] == [0, 2, 0]


def test_only_stages_that_run_need_rows_that_the_teacher_can_read(teacher, tmp_path):
    config = load_config(teacher=teacher, variant=["small-machine"])
    assert config.stages["long"].data.seq_len == 2048  # the variant's, of a teacher with 512 positions
    own = ["stages.mine={objective: sft, data: {seq_len: 600}}", "stages.long.data.seq_len=700"]
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load_config(teacher=teacher, overrides=own)))
    assert [load_config([file]).stages[name].data.seq_len for name in ("mine", "long")] == [600, 700]
    line = "stages.long.data.seq_len = 2048: is longer than the 512 positions that the teacher was made for"
    assert problems("run=[align,long]", teacher=teacher, variant=["small-machine"]) == [line]
    assert problems(teacher=teacher, variant=["small-machine"], stage="long") == [line]
    for more in ({"overrides": [*own, "run=[mine]"]}, {"overrides": own, "stage": "mine"}):
        assert "stages.mine.data.seq_len = 600" in problems(*more.pop("overrides"), teacher=teacher, **more)[0]


def test_problems_of_files(tmp_path, teacher):
    file = tmp_path / "x.yaml"
    assert "cannot be read: No such file" in problems(files=[file], teacher=teacher)[0]
    for content, cause in (
        (b"a: [1", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- 1\n- 2\n", "is not a mapping"),
        (b"seed: ${x}\n", "is not valid YAML"),
    ):
        file.write_bytes(content)
        (found,) = problems(files=[file], teacher=teacher)
        assert cause in found and str(file) in found and "\n" not in found
    file.write_bytes(b"")
    assert load_config([file], teacher=teacher) == load_config(teacher=teacher)


def test_files_of_other_editors_are_read(tmp_path, teacher):
    """With a byte-order mark, as Windows writes it."""
    settings, own = tmp_path / "deepspeed.json", tmp_path / "own.yaml"
    settings.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8-sig")
    own.write_text("seed: 7\n", encoding="utf-8-sig")
    config = load_config([own], teacher=teacher, deepspeed=settings)
    assert config.seed == 7 and config.deepspeed.config == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"model_type": "gpt_neox"}, "architecture 'gpt_neox', which is not supported"),
        ({"model_type": None}, "architecture None"),
        ({"num_hidden_layers": "five"}, "num_hidden_layers = 'five'"),
    ],
)
def test_unusable_teachers(tmp_path, changes, cause):
    path = make_teacher(tmp_path / "other", **changes)
    with pytest.raises(UserError, match=cause) as caught:
        load_config(teacher=path)
    assert changes.get("num_hidden_layers") or "supported: llama, qwen2, qwen3" in caught.value.hint


def test_missing_teachers(tmp_path, teacher):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in problems(teacher=str(tmp_path / "empty"))[0]
    assert "did you mean Qwen3-14B?" in problems(teacher="Qwen3-14C")[0]
    assert "neither a directory nor a preset nor a hub id" in problems(teacher=str(tmp_path / "no"))[0]
    assert problems() == ["no teacher is given"]
    assert "teacher.path is 5" in problems("teacher.path=5")[0]
    (tmp_path / "tiny" / "config.json").write_text("{")
    assert "cannot be read as JSON" in problems(teacher=teacher)[0]


@pytest.mark.parametrize(
    "flag, said",
    [
        ("teacher", "teacher is an empty text"),
        ("out", "out = '': string must have at least 1 character"),
        ("recipe", "recipe '' is not known"),
        ("deepspeed", "cannot be read"),
    ],
)
def test_an_empty_flag_is_not_one_that_was_left_out(teacher, flag, said):
    """As `--out "$OUT"` without such a variable gives it."""
    with pytest.raises(UserError) as caught:
        load_config(**{"teacher": teacher, flag: ""})
    assert said in caught.value.cause


def test_student_settings_are_those_of_the_model():
    from rwkvinside.modeling.mixer_presets import PRESETS

    assert set(typing.get_args(StudentConfig.model_fields["preset"].annotation)) == set(PRESETS)


def test_every_field_is_described():
    rows = describe()
    for path, _, description in rows:
        assert description and description.endswith("."), path
    paths = {path for path, *_ in rows}
    assert {"stages.<stage>.optim.lr", "student.ranks.decay", "data.train", "stages.<stage>.tokens"} <= paths


def test_objectives_are_stages_that_are_there_by_their_names():
    """But those that only a run that asks for them has: a choice of layers, a model from nothing."""
    usual = {name: path for name, path in OBJECTIVES.items() if name not in ("choose", "pretrain")}
    assert {name: path for name, path in STAGES.items() if name in OBJECTIVES} == usual
    assert {find_stage_class(name, None).objective for name in STAGES} == set(usual)


def test_presets_hold_only_what_differs():
    for name, preset in teachers().items():
        config = load_config(teacher=name)
        bare = yaml.safe_load(to_yaml(config))
        for stage, settings in preset.get("stages", {}).items():
            path = {"teacher": {"path": "x/y", "config": preset["teacher"]["config"]}}
            plain = load_config(overrides=[f"teacher={json.dumps(path['teacher'])}"]).stages[stage]
            assert bare["stages"][stage] != plain.model_dump(mode="json"), (
                f"{name}: stages.{stage} = {settings} is the default"
            )


@pytest.mark.parametrize(
    "device, setting, library, fused",
    [
        *(("cuda", "auto", True, ALL), ("cuda", "auto", False, Fused(rotations=True)), ("cpu", "auto", True, Fused())),
        *(("cuda", "false", True, Fused()), ("cpu", "false", False, Fused()), ("cuda", "true", True, ALL)),
    ],
)
def test_fused_layers_are_for_a_gpu_and_some_for_the_library(teacher, monkeypatch, device, setting, library, fused):
    monkeypatch.setattr(resolving, "available", lambda: Fused(library, True))
    monkeypatch.setattr(resolving, "import_extra", lambda *words: None)
    config = load_config(
        teacher=str(teacher), data=["x"], out="run", overrides=[f"device={device}", f"fused_layers={setting}"]
    )
    assert resolve(config).settings.fused == fused


def test_fused_layers_that_cannot_be_are_refused(teacher, monkeypatch):
    def config(device):
        return load_config(
            teacher=str(teacher), data=["x"], out="run", overrides=[f"device={device}", "fused_layers=true"]
        )

    with pytest.raises(UserError, match="fused_layers on cpu: its kernels run on cuda only"):
        resolve(config("cpu"))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as where it is not installed
    with pytest.raises(UserError, match="fused_layers needs liger_kernel"):
        resolve(config("cuda"))
