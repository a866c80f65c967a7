"""Whole conversions of a tiny teacher through train_distill.py, in this process; with others: test_conversion.py."""

import io
import itertools
import json
import random
import shlex
import shutil
import signal
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import byte_tokenizer, save_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_distill
from rwkvinside.api import evaluate
from rwkvinside.config.load import load_config
from rwkvinside.config.resolve import resolve
from rwkvinside.conversion import run as conversion
from rwkvinside.conversion import stage as stage_module
from rwkvinside.errors import UserError
from rwkvinside.export.card import measurements, table
from rwkvinside.export.huggingface import export_hf
from rwkvinside.export.verify import verify
from rwkvinside.runs.directory import RunDirectory
from rwkvinside.stages import base as stages_base
from rwkvinside.training.callbacks import WriteMetrics
from rwkvinside.training.process_group import Distributed


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny Qwen3 with a byte-level tokenizer, and texts."""
    root = tmp_path_factory.mktemp("material")
    save_qwen3(root / "teacher", byte_tokenizer("<eos>", eos_token="<eos>"))
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
    rng = random.Random(0)
    for name, count in (("train", 120), ("val", 6)):
        texts = [" ".join(rng.choices(words, k=rng.randint(5, 25))) for _ in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


# Steps of 4 rows of 32 tokens; three for each stage.
SMALL = [
    "stages.calibrate.tokens=512",
    "stages.calibrate.data.seq_len=32",
    "stages.calibrate.batch.tokens=128",
    *(
        f"stages.{name}.{field}"
        for name in ("align", "distill", "long")
        for field in ("tokens=384", "data.seq_len=32", "batch.tokens=128", "optim.lr=0.003")
    ),
]


def arguments(material, out, *more):
    argv = ["--teacher", material / "teacher", "--data", material / "train.jsonl", "--val", material / "val.jsonl"]
    return [*map(str, argv), "--out", str(out), *SMALL, f"data.cache_dir={material / 'cache'}", *more]


def train(material, out, *more):
    return train_distill.main(arguments(material, out, *more))


def cut_off(monkeypatch, stage, step, material, out, *more):
    """Train until the metrics of a step are written, where the power fails."""
    write = WriteMetrics.step

    def crash(self, trainer, row):
        write(self, trainer, row)
        if (row["stage"], row["step"]) == (stage, step):
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(WriteMetrics, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(material, out, *more)


def rows(out, kind, stage):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if (row["kind"], row["stage"]) == (kind, stage)]


def tensors(out, stage, name="model"):
    return load_file(sorted((out / "stages" / stage).glob("step-*"))[-1] / f"{name}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """A conversion in one go."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(material, out) == 0
    return out


SHORT = ["run=[align]", "stages.align.data.seq_len=32", "stages.align.optim.lr=0.003"]


def test_a_longer_stage_goes_on_with_the_steps_that_it_began_with(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages_base, "ENOUGH_STEPS", 4)
    left_out, out = [setting for setting in SMALL if "batch" not in setting], tmp_path / "run"
    monkeypatch.setattr(sys.modules[__name__], "SMALL", [*left_out, *SHORT, "checkpoint.every_steps=1"])
    cut_off(monkeypatch, "align", 2, material, out)
    capsys.readouterr()
    more = ["--resume", "stages.align.tokens=768"]
    assert load_config([out / "config.yaml"]).stages["align"].batch.tokens == 64
    assert train(material, out, *more) == 2
    assert "align.tokens was 384, is 768" in (err := capsys.readouterr().err) and "batch.tokens" not in err
    assert train(material, out, *more, "--allow-changes", "stages.align.batch.tokens=128") == 2
    assert "resume with stages.align.batch.tokens=64 that" in capsys.readouterr().err
    assert train(material, out, *more, "--allow-changes") == 0
    assert [row["step"] for row in rows(out, "train", "align")][-1] == 12
    assert load_config([out / "config.yaml"]).stages["align"].batch.tokens == 64


def test_too_few_rows_for_the_ranks_are_refused_before_anything_is_written(material, tmp_path, monkeypatch):
    world = Distributed("cpu")
    world.size = 9
    monkeypatch.setattr(conversion, "join_process_group", lambda: world)
    given = load_config(
        teacher=str(material / "teacher"),
        data=[str(material / "train.jsonl")],
        out=str(tmp_path / "given"),
        overrides=[*SHORT, "stages.align.batch.tokens=256"],
    )
    with pytest.raises(UserError, match="8 rows of data.seq_len=32, too few for 9 processes"):
        conversion.train(given, launched=True)
    assert [path.name for path in (tmp_path / "given").rglob("*")] == []


def test_a_run_leaves_everything_that_describes_it(material, whole):
    conversion = json.loads((whole / "conversion.json").read_text())
    assert conversion["finished_stages"] == ["calibrate", "align", "distill"]
    assert set(conversion["evaluations"]["distill"]) == {"kl", "ce", "ce_teacher", "agreement"}
    config = load_config([whole / "config.yaml"])
    assert config.teacher.path == str(material / "teacher") and config.stages["align"].tokens == 384
    assert "layers    RRR" in (whole / "plan.txt").read_text()
    for stage in ("align", "distill"):
        assert [row["step"] for row in rows(whole, "train", stage)] == [1, 2, 3]
        assert [row["step"] for row in rows(whole, "eval", stage)] == [3]
    assert set(rows(whole, "train", "align")[0]["layers"]) == {"0", "1", "2"}
    plan = json.loads((whole / "plan.json").read_text())
    assert [stage["name"] for stage in plan["stages"]] == ["calibrate", "align", "distill"]
    assert [layer["kind"] for layer in plan["layers"]] == ["rwkv"] * 3 and plan["total"]["flops"] > 0
    assert not rows(whole, "sample", "align")
    ((sample,),) = (row["samples"] for row in rows(whole, "sample", "distill"))
    assert set(sample) == {"prompt", "student", "teacher"} and sample["prompt"] and sample["student"]
    (fit,) = rows(whole, "calibrate", "calibrate")
    assert all(fit["error"][i] <= fit["error_before"][i] for i in "012")
    assert not list(whole.rglob(".*unfinished*"))


def test_samples_are_what_the_models_write_and_change_nothing(material, whole, tmp_path, capsys):
    out = tmp_path / "run"
    more = ["samples={every_tokens: 128, prompts: ['the quick', 'a'], tokens: 6}"]
    assert train(material, out, "--quiet", *more) == 0
    said = capsys.readouterr().out
    for stage in ("align", "distill"):
        found = rows(out, "sample", stage)
        assert [row["step"] for row in found] == [1, 2, 3]
        assert [each["prompt"] for each in found[0]["samples"]] == ["the quick", "a"]
    assert len({row["samples"][0]["teacher"] for row in rows(out, "sample", "distill")}) == 1
    model = AutoModelForCausalLM.from_pretrained(material / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(material / "teacher")
    ids = tokenizer("the quick", return_tensors="pt")["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0]
    assert "the quick" + found[-1]["samples"][0]["teacher"] == tokenizer.decode(written, skip_special_tokens=True)
    assert same(tensors(out, "distill"), tensors(whole, "distill"))
    lines = said.splitlines()  # --quiet: the end of the run alone
    assert lines[1].split() == ["KL", "CE", "agreement", "tokens", "time", "memory"] and "loss" not in said
    assert [line.split()[1] for line in lines[-3:]] == ["report", "chat", "export"]


def test_each_stage_starts_from_the_last(whole):
    """Calibrate keeps what it copied and fits the rest; align changes mixers only; distill changes the others, too."""
    calibrated, aligned, distilled = (tensors(whole, stage) for stage in ("calibrate", "align", "distill"))
    assert calibrated.keys() == aligned.keys() < distilled.keys()
    assert all(".self_attn." in name for name in aligned)
    assert not torch.equal(calibrated["model.layers.1.self_attn.w1"], aligned["model.layers.1.self_attn.w1"])
    start, fitted = (row["kl"] for row in rows(whole, "eval", "calibrate"))
    assert fitted < start
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= distilled.keys()


def test_a_windowed_run_measures_its_control_once(material, tmp_path, monkeypatch, capsys):
    """And in a log, where no bar is, all that may take long has lines."""
    out = tmp_path / "run"
    more = ("student.window=4", "student.sinks=1", "run=[calibrate,align]")
    with monkeypatch.context() as patch:
        clock = itertools.count(step=11)  # what takes long passes 11 seconds between two looks at the clock
        patch.setattr("rwkvinside.support.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
        assert train(material, out, *more) == 0
    shown = {line.partition("  ETA")[0] for line in capsys.readouterr().out.splitlines() if "  ETA 0:" in line}
    assert {f"calibrate {step}/1  evaluating 1/1 batches" for step in (0, 1)} <= shown
    assert {f"calibrate {layer}/3 layers" for layer in (1, 2, 3)} <= shown
    assert {"calibrate shares 5/11 students", "align 3/3  evaluating 1/1 batches"} <= shown
    assert any(line.startswith("align 3/3  writing 2/") for line in shown), shown
    (control,) = rows(out, "control", "calibrate")
    last = rows(out, "eval", "calibrate")[-1]
    assert control["ce_teacher"] == last["ce_teacher"] and control["kl"] > 0 and 0 < control["agreement"] < 1
    assert not rows(out, "control", "align")

    alone = tmp_path / "alone"  # a run without calibration measures the same
    assert train(material, alone, *more[:2], "run=[align]") == 0
    (again,) = rows(alone, "control", "align")
    for name in ("kl", "ce", "ce_teacher", "agreement"):
        assert again[name] == pytest.approx(control[name], rel=1e-6)


def test_stage_by_stage_is_the_same_as_in_one_go(material, whole, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(material, out, "--stage", "align") == 2
    assert "starts from stage calibrate, which is not finished" in capsys.readouterr().err
    assert not out.exists()
    for stage in ("calibrate", "align", "distill"):
        assert train(material, out, "--stage", stage) == 0
        assert same(tensors(out, stage), tensors(whole, stage))
    assert same(tensors(out, "distill", "optimizer"), tensors(whole, "distill", "optimizer"))
    assert train(material, out, "--stage", "distill") == 2
    assert "has begun stage distill already" in capsys.readouterr().err
    assert train(material, out, "--stage", "long", "stages.long.train=[mlp]") == 0  # beyond `run`, from distill
    before, after = tensors(out, "distill"), tensors(out, "long")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(".mlp." in name for name in changed)


def test_a_crashed_run_resumes_bit_for_bit(material, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    more = ["stages.distill.tokens=2560", "checkpoint.every_steps=10"]  # 20 steps
    shutil.copytree(whole, out)
    shutil.rmtree(out / "stages" / "distill")
    conversion = json.loads((out / "conversion.json").read_text())
    (out / "conversion.json").write_text(json.dumps(conversion | {"finished_stages": ["calibrate", "align"]}))
    straight = tmp_path / "straight"
    shutil.copytree(out, straight)
    assert train(material, straight, "--resume", "--allow-changes", *more) == 0

    cut_off(monkeypatch, "distill", 13, material, out, "--resume", "--allow-changes", *more)
    assert train(material, out, *more) == 2
    assert "is not empty" in capsys.readouterr().err
    assert train(material, out, "--resume", *more) == 0
    said = capsys.readouterr().out
    assert "align is finished already" in said
    assert f"distill goes on after step 10 of 20, from {out}/stages/distill/step-00000010" in said
    assert same(tensors(out, "distill"), tensors(straight, "distill"))
    assert same(tensors(out, "distill", "optimizer"), tensors(straight, "distill", "optimizer"))
    assert [row["step"] for row in rows(out, "train", "distill")] == list(range(1, 21))
    losses = [[row["loss"] for row in rows(folder, "train", "distill")] for folder in (out, straight)]
    assert losses[0] == losses[1]


def test_killed_after_its_last_checkpoint_a_stage_is_evaluated_again(material, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    wanted = json.loads((out / "conversion.json").read_text())
    left = wanted | {"finished_stages": ["calibrate", "align"], "evaluations": {}}
    (out / "conversion.json").write_text(json.dumps(left))
    assert train(material, out, "--resume") == 0
    found = json.loads((out / "conversion.json").read_text())
    assert found["finished_stages"] == wanted["finished_stages"]
    assert found["evaluations"]["distill"] == wanted["evaluations"]["distill"]
    (out / "conversion.json").write_text(json.dumps(left))
    shutil.rmtree(out / "stages" / "distill")
    assert train(material, out, "--resume-from", "step-00000003") == 2  # not silently from the beginning
    assert "stage distill has no checkpoint step-00000003" in capsys.readouterr().err


def test_a_streamed_mixture_resumes_bit_for_bit(material, whole, tmp_path, monkeypatch, capsys):
    """The second attempt has another cache, as on another machine: its blocks are made again, with the same rows."""
    out, straight = tmp_path / "run", tmp_path / "straight"
    more = [
        "run=[align]",
        "stages.align.tokens=2560",
        "checkpoint.every_steps=10",
        f"stages.align.data.train=[{material / 'train.jsonl'},{material / 'val.jsonl'}]",
        "stages.align.data.weights=[3,1]",
        "data.stream=true",
        "data.block_tokens=1k",
    ]
    assert train(material, straight, *more, f"data.cache_dir={tmp_path / 'straight-cache'}") == 0
    assert "(asked for 25.00%)" in capsys.readouterr().out
    shares = json.loads((straight / "conversion.json").read_text())["data"]["align"]["sources"]
    assert [one["share"] for one in shares] == pytest.approx([0.75, 0.25], abs=0.03)
    cut_off(monkeypatch, "align", 13, material, out, *more)
    again = ["--resume", "--allow-changes", *more, f"data.cache_dir={tmp_path / 'other-cache'}"]
    assert train(material, out, *again) == 0
    assert same(tensors(out, "align"), tensors(straight, "align"))
    losses = [[row["loss"] for row in rows(folder, "train", "align")] for folder in (out, straight)]
    assert len(losses[0]) == 20 and losses[0] == losses[1]


def test_another_student_is_refused(material, whole, capsys):
    before = (whole / "config.yaml").read_bytes()
    more = ["--resume", "--allow-changes", "run=[calibrate,align,distill,long]", "student.preset=rad"]
    assert train(material, whole, *more) == 2
    assert (whole / "config.yaml").read_bytes() == before and not list(whole.glob("config.*.yaml"))
    err = capsys.readouterr().err
    assert "belongs to another student" in err and "value_path is 'residual_kv' there and 'residual_full' here" in err
    assert json.loads((whole / "conversion.json").read_text())["finished_stages"][-1] == "distill"


def test_a_truncated_checkpoint_is_refused(material, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (file,) = (out / "stages" / "distill").glob("*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert train(material, out, "--stage", "long") == 2
    err = capsys.readouterr().err
    assert "is corrupt" in err and len(err.splitlines()) == 2


def test_freezing_in_stages_of_ones_own(material, tmp_path):
    stages = (
        "stages.lora={objective: align, tokens: 384, train: [mixer.lora], data: {seq_len: 32}, batch: {tokens: 128}}"
    )
    more = [
        stages,
        "run=[calibrate,lora,distill]",
        "student.attention_layers=[1]",
        "stages.distill.train=[mixer,'.*mlp.*']",
    ]
    assert train(material, tmp_path / "run", *more) == 0
    before, after = (tensors(tmp_path / "run", stage) for stage in ("calibrate", "lora"))
    changed = {name.split("self_attn.")[1] for name in after if not torch.equal(before[name], after[name])}
    assert "w1" in changed and not changed & {"receptance.weight", "key.weight", "value.weight", "output.weight"}
    assert not any(".layers.1.self_attn." in name for name in after)
    distilled = tensors(tmp_path / "run", "distill")
    assert "lm_head.weight" not in distilled and any(".mlp." in name for name in distilled)


UNFREEZING = [
    "stages.distill.tokens=1280",  # 10 steps
    "stages.distill.train=[mixer]",
    "stages.distill.unfreeze=[{at_tokens: 384, train: [mlp]}, {at_tokens: 700, train: ['.*']}]",  # after steps 3 and 6
    "stages.distill.optim.rates={mlp: 1e-4, norms: 2e-4}",
    "stages.distill.optim.warmup_steps=2",
    "checkpoint.every_steps=4",
    "checkpoint.keep=9",
    "loggers=[tensorboard]",
]


@pytest.fixture(scope="module")
def unfrozen(material, whole, tmp_path_factory):
    """The distillation of `whole` in three phases, and what it said."""
    out = tmp_path_factory.mktemp("unfrozen") / "run"
    before_distill(whole, out)
    said = io.StringIO()
    with redirect_stdout(said):
        assert train(material, out, "--resume", "--allow-changes", *UNFREEZING) == 0
    return out, said.getvalue()


def before_distill(whole, out):
    shutil.copytree(whole, out)
    shutil.rmtree(out / "stages" / "distill")
    conversion = json.loads((out / "conversion.json").read_text())
    (out / "conversion.json").write_text(json.dumps(conversion | {"finished_stages": ["calibrate", "align"]}))


def test_a_stage_unfreezes_at_its_token_counts(unfrozen):
    out, said = unfrozen
    steps = sorted((out / "stages" / "distill").glob("step-*"))
    assert [step.name[-2:] for step in steps] == ["03", "04", "06", "08", "10"]  # phases end with a checkpoint
    states = [load_file(step / "optimizer.safetensors") for step in steps]
    weights = [load_file(step / "model.safetensors") for step in steps]
    mixer, mlp, norm = (
        f"model.{name}" for name in ("layers.1.self_attn.w1", "layers.1.mlp.up_proj.weight", "norm.weight")
    )
    for name, counts in ((mixer, [3, 4, 6, 8, 10]), (mlp, [None, 1, 3, 5, 7]), (norm, [None, None, None, 2, 4])):
        found = [int(state[f"{name}/step"]) if f"{name}/step" in state else None for state in states]
        assert found == counts
        assert [name in tensors for tensors in weights] == [count is not None for count in counts]
    train_rows = rows(out, "train", "distill")
    assert [row["step"] for row in train_rows] == list(range(1, 11))
    joined = [{name for name in row if name.startswith("lr_")} for row in train_rows]
    assert joined[2] == set() and joined[3] == joined[5] == {"lr_mlp@384"}
    assert joined[6] == {"lr_mlp@384", "lr_norms@700", "lr_rest@700"}
    assert train_rows[3]["lr_mlp@384"] == pytest.approx(1e-4 / 2, rel=0.2)  # its own warm-up, on the stage's decay
    lines = [line.split() for line in said.splitlines()]
    shown = [" ".join(line[3:]) for line in lines if line[:1] == ["mlp"] and "K" in line]
    assert shown[-3:] == ["0.0001 joins after 384 tokens", "0.0001 trains", "0.0001 trains"]


@pytest.mark.parametrize("crashes", [(2,), (3, 6), (5, 9)])
def test_unfreezing_resumes_bit_for_bit(material, whole, unfrozen, tmp_path, monkeypatch, crashes):
    straight, _ = unfrozen
    out = tmp_path / "run"
    before_distill(whole, out)
    for step in crashes:
        cut_off(monkeypatch, "distill", step, material, out, "--resume", "--allow-changes", *UNFREEZING)
    assert train(material, out, "--resume", *UNFREEZING) == 0
    assert same(tensors(out, "distill"), tensors(straight, "distill"))
    assert same(tensors(out, "distill", "optimizer"), tensors(straight, "distill", "optimizer"))
    losses = [[row["loss"] for row in rows(folder, "train", "distill")] for folder in (out, straight)]
    assert losses[0] == losses[1]


def test_loggers_and_mfu_of_a_run(unfrozen):
    out, said = unfrozen
    accumulator = EventAccumulator(str(out / "tensorboard" / "distill"))
    accumulator.Reload()
    found = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    train_rows = rows(out, "train", "distill")
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in train_rows]
    assert len(accumulator.Scalars("eval/kl")) == 1
    assert all(0 < row["mfu"] < 1 for row in train_rows) and "MFU" in said
    # of tokens per second the phases make something else of the device, as more trains
    work = [row["mfu"] / row["tokens_per_s"] for row in train_rows]
    assert work[0] == pytest.approx(work[2]) and work[0] < work[3] < work[6]


def test_sft_trains_on_completions_and_measures_what_it_can(material, tmp_path):
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "the quick brown fox"}]
    chat.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    teacher = tmp_path / "teacher"
    shutil.copytree(material / "teacher", teacher)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (teacher / "chat_template.jinja").write_text(template)
    out = tmp_path / "run"
    argv = ["--teacher", str(teacher), "--data", str(chat), "--val", str(chat), "--out", str(out), "run=[sft]"]
    argv += ["stages.sft.tokens=512", "stages.sft.data.seq_len=64", "stages.sft.batch.tokens=256"]
    assert train_distill.main([*argv, "stages.sft.optim.lr=0.01", f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    first, last = rows(out, "train", "sft")
    assert last["ce"] < first["ce"]
    # rates and MFU are of the real tokens: those of the eight conversations, over and over
    assert 0 < first["tokens"] < 256 and last["tokens"] == 2 * first["tokens"]
    assert 0 < last["mfu"] < 1
    (evaluation,) = rows(out, "eval", "sft")
    assert "ce" in evaluation and "kl" not in evaluation  # everything trains: no exact teacher is in memory


@pytest.mark.parametrize(
    "more, cause",
    [
        (["--data", "nothing.jsonl"], "'nothing.jsonl' does not exist"),
        (["--stage", "algn"], "there is no stage 'algn'"),
        (["--resume"], "there is no run to resume"),
        (["student.attention_layers=[3]"], "layers 0 to 2"),
        (["stages.align.train=[mlp]"], "objective align needs the teacher's own weights"),
        (["data.train=[]"], "no training data is given"),
        (["stages.align.optim.rates={mlp: 1e-3}"], "'mlp' sets the rate of nothing"),
        (["stages.distill.unfreeze=[{at_tokens: 128, train: [nonsense]}]"], "'nonsense' matches no parameter"),
        (["stages.distill.unfreeze=[{at_tokens: 300, train: [mlp]}]"], "at_tokens 300 is after 256"),
        (["stages.align.unfreeze=[{at_tokens: 128, train: [mlp]}]"], "needs the teacher's own weights"),
        (["loggers=[wandb]"], "wandb is not installed"),
    ],
)
def test_bad_input_writes_nothing(material, tmp_path, capsys, more, cause):
    out = tmp_path / "run"
    assert train(material, out, *more) == 2
    printed, err = capsys.readouterr()
    assert cause in err and len(err.splitlines()) <= 2 and not printed  # no plan of what cannot begin
    assert not out.exists()


@pytest.mark.parametrize(
    "more, cause", [(["data.train=[]"], "no training data"), (["--data", "no.jsonl"], "'no.jsonl'")]
)
def test_data_that_is_not_there_is_refused_before_a_tokenizer_is_loaded(
    material, tmp_path, monkeypatch, capsys, more, cause
):
    monkeypatch.setattr(conversion, "open_tokenizer", Mock(side_effect=AssertionError("it may be fetched from a hub")))
    assert train(material, tmp_path / "run", *more) == 2
    assert cause in capsys.readouterr().err


def test_output_directories_of_others_are_left_alone(material, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for more in ([], ["--resume"], ["--stage", "calibrate"]):
        assert train(material, out, *more) == 2
        assert "is neither empty nor a run" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
    assert train(material, out / "thesis.tex") == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tokens, batch, seq_len, rows, steps",
    [(600_000, 4096, 64, 64, 147), (1000, 300, 128, 2, 4), (1000, 128, 128, 1, 8)],
)
def test_a_plan_counts_whole_rows_and_full_steps(material, tokens, batch, seq_len, rows, steps):
    fields = {"tokens": tokens, "batch.tokens": batch, "data.seq_len": seq_len}
    overrides = [f"stages.align.{name}={value}" for name, value in fields.items()]
    plan = resolve(load_config(teacher=str(material / "teacher"), overrides=overrides)).stage("align")
    assert (plan.length.rows_per_step, plan.length.steps, plan.row_count) == (rows, steps, rows * steps)


ECONOMY = [
    "quantize={groups: [mlp, teacher], method: gptq}",
    "adapters=[{kind: lora, groups: [mlp], rank: 4, init: pissa}]",
    "stages.distill.train=[mixer, embed, adapters]",
    *(f"stages.{name}.optim.kind=adamw8bit" for name in ("align", "distill")),
    "checkpoint={every_steps: 1, keep: 9}",
]


@pytest.fixture(scope="module")
def economical(material, tmp_path_factory):
    """A conversion with quantized weights, adapters on them and 8-bit moments."""
    out = tmp_path_factory.mktemp("economical") / "run"
    assert train(material, out, *ECONOMY) == 0
    return out


def test_quantized_weights_are_written_once_and_adapters_as_peft_stores_them(economical):
    begun = load_file(economical / "stages" / "calibrate" / "frozen.safetensors")
    for stage in ("calibrate", "align", "distill"):
        stored = load_file(economical / "stages" / stage / "frozen.safetensors")
        assert all(torch.equal(tensor, begun[name]) for name, tensor in stored.items() if "/" in name)
        layers = {name.split("/")[0] for name in stored if "/" in name}
        assert len(layers) == 3 * (3 + 4) and all("mlp" in name or "teacher_attn" in name for name in layers)
    trained = tensors(economical, "distill")
    assert "model.embed_tokens.weight" in trained
    assert all("lora" in name for name in trained if ".mlp." in name)
    start, end = (trained[f"model.layers.0.mlp.up_proj.lora_B.{which}.weight"] for which in ("start", "default"))
    assert not torch.equal(start, end)
    adapter = economical / "stages" / "distill" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 8  # PiSSA as a plain LoRA
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2 * 3 * 3
    assert load_config([economical / "config.yaml"]).adapters[0].init == "pissa"
    text = (economical / "plan.txt").read_text()
    assert "quantized 21 linear layers in nf4 in blocks of 64, scales quantized too, fitted to their inputs" in text
    assert "not exactly the original" in text and "adapters  LoRA PiSSA: rank 4" in text


def test_quantized_training_resumes_bit_for_bit(material, economical, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(economical, out)
    shutil.rmtree(out / "stages" / "distill" / "step-00000003")
    conversion = json.loads((out / "conversion.json").read_text())
    (out / "conversion.json").write_text(json.dumps(conversion | {"finished_stages": ["calibrate", "align"]}))
    changed = ["--resume", "--allow-changes", *ECONOMY]
    assert train(material, out, *changed, "adapters=[{kind: lora, groups: [mlp], rank: 4, alpha: 3}]") == 2
    assert "made with adapters=" in capsys.readouterr().err
    assert train(material, out, *changed, "quantize.groups=[mlp]") == 2
    assert "this stage began with other quantized layers" in capsys.readouterr().err
    assert train(material, out, "--resume", *ECONOMY) == 0
    for name in ("model", "optimizer"):
        assert same(tensors(out, "distill", name), tensors(economical, "distill", name))
    assert any(
        name.endswith("_scale") for name in tensors(out, "distill", "optimizer")
    )  # the embedding's are in 8 bits

    frozen = out / "stages" / "distill" / "frozen.safetensors"
    frozen.write_bytes(frozen.read_bytes()[:-100])
    (out / "conversion.json").write_text(json.dumps(conversion | {"finished_stages": ["calibrate", "align"]}))
    assert train(material, out, "--resume", *ECONOMY) == 2
    assert f"{frozen} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, message",
    [
        (["quantize.groups=[mlp]"], "'.*' matches model.layers.0.mlp.down_proj.weight (and 8 more), which is"),
        (["quantize.groups=[embed]"], "quantize: 'embed' names no linear layer"),
        (["quantize.groups=[mixer.proj]"], "calibrate fits the mixers, but model.layers.0.self_attn.key.weight is"),
        (["adapters=[{groups: [norms]}]"], "adapters: 'norms' names no linear layer"),
        (["adapters=[{groups: [mlp], rank: 4}, {groups: ['.*up_proj'], rank: 4}]"], "two entries name model.layers.0"),
        (["adapters=[{groups: [mlp], rank: 64}]"], "rank 64 is more than model.layers.0.mlp.gate_proj has (16)"),
        (["adapters=[{groups: [mlp], rank: 4}]", "stages.align.train=[mixer, adapters]"], "learns nothing"),
        (["stages.align.train=[mixer, adapters]"], "train pattern 'adapters' matches no parameter"),
        (["stages.distill.optim.kind=paged_adamw8bit", "device=cpu"], "paged_adamw8bit needs a CUDA device"),
    ],
)
def test_contradictions_of_quantization_and_adapters_show_in_the_plan(material, tmp_path, capsys, settings, message):
    assert train(material, tmp_path / "run", "--dry-run", *settings) == 2
    problem = capsys.readouterr().err
    assert message in problem and len(problem.splitlines()) == 2
    assert not (tmp_path / "run").exists()


def test_the_warning_about_adapters_on_mixers_is_in_the_plan(material, tmp_path, capsys):
    adapter = "adapters=[{kind: bone, groups: [mixer.proj], rank: 4}]"
    assert train(material, tmp_path / "run", "--dry-run", adapter) == 0
    shown = capsys.readouterr().out
    assert "adapters  Bone, which is MiSS in its bat form: rank 4" in shown
    assert "WARNING: adapters on the mixers' own projections: RADLADS" in shown


def test_missing_data_of_a_later_stage_shows_at_once(material, tmp_path, capsys):
    assert train(material, tmp_path / "run", "stages.distill.data.train=[nowhere.jsonl]") == 2
    assert "stage distill: data 'nowhere.jsonl' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, label, last",
    [
        (["quantize.groups=[mlp,teacher]", "stages.distill.train=[mixer]"], "quantized (nf4)", None),
        (["stages.distill.teacher=separate", "stages.distill.teacher_model.quantize=int8"], "quantized (int8)", None),
        (["stages.distill.teacher_model.path={teacher}"], "{teacher}", "{teacher}"),
    ],
)
def test_the_last_numbers_are_against_the_original(material, tmp_path, more, label, last):
    """Those before say what they compare with, and the last ones where they must."""
    teacher, out = str(material / "teacher"), tmp_path / "run"
    more = [field.format(teacher=teacher) for field in more]
    assert train(material, out, "run=[distill]", "stages.distill.evaluate_every_tokens=256", *more) == 0
    before, final = rows(out, "eval", "distill")
    assert before["teacher"] == label.format(teacher=teacher)
    assert final.get("teacher") == (last and last.format(teacher=teacher))
    found = evaluate(out, teacher, data=[material / "val.jsonl"], device="cpu")
    assert found["kl"] == pytest.approx(final["kl"], rel=1e-3)
    assert found["ce_teacher"] == pytest.approx(final["ce_teacher"], rel=1e-5)
    assert (before["ce_teacher"] == pytest.approx(final["ce_teacher"], rel=1e-5)) == (last is not None)


def test_a_stage_ends_early_and_the_run_goes_on(material, tmp_path, monkeypatch, capsys):
    """Nothing is learned at rate 0; cut off after its last checkpoint, it does not train any more."""
    out = tmp_path / "run"
    still = "stages.still={objective: sft, tokens: 384, data: {seq_len: 32}, batch: {tokens: 128}, %s: 128, %s, %s}"
    still %= "evaluate_every_tokens", "early_stop: {patience: 1, min_delta: 0.01}", "optim: {lr: 0, lr_rest: 0}"
    more = [still, "run=[still, distill]", "samples.every_tokens=128"]
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "finish_stage", fail := Mock(side_effect=RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            train(material, out, *more)
    assert fail.call_count == 1
    assert train(material, out, "--resume", *more) == 0
    said = capsys.readouterr().out
    assert "early stop: still may end before all tokens are read" in said and "at most about" in said
    assert "end       early, when validation has not improved by 0.01 nats in 1 evaluation" in (
        (out / "plan.txt").read_text()
    )
    first, second = rows(out, "eval", "still")
    assert second["ce"] == first["ce"] and [row["step"] for row in rows(out, "train", "still")] == [1, 2]
    why = f"validation CE has not improved by 0.01 in the last evaluation; best {first['ce']:.4g} at step 1"
    assert f"still 2/3  STOPS EARLY: {why}" in said
    ends = json.loads((out / "conversion.json").read_text())["early_ends"]
    assert ends.keys() == {"still"} and (ends["still"]["step"], ends["still"]["steps"]) == (2, 3)
    assert ends["still"]["best"]["step"] == 1
    screen = " ".join(said.split())
    assert f"still ended early, at step 2 of 3: {why}" in screen, "at the end of the run"
    assert json.loads((out / "stages" / "still" / "stage.json").read_text())["checkpoint"] == "step-00000002"
    assert [row["step"] for row in rows(out, "sample", "still")] == [1, 2]
    assert [row["step"] for row in rows(out, "train", "distill")] == [1, 2, 3]


def test_a_stage_that_gets_worse_keeps_its_best_checkpoint(material, whole, tmp_path, capsys):
    """It is said while it happens; export takes the best, and the next stage where that is asked for."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    spoiled = ["stages.long.optim.lr=0.003", "stages.long.optim.lr_rest=3", "stages.long.optim.warmup_steps=3"]
    often = ["stages.long.evaluate_every_tokens=128", "checkpoint={every_steps: 1, keep: 1, continue_from: best}"]
    assert train(material, out, "--stage", "long", "--allow-changes", *spoiled, *often) == 0
    said = capsys.readouterr().out
    kl = {row["step"]: row["kl"] for row in rows(out, "eval", "long")}
    number = min(kl, key=kl.get)
    assert len(kl) == 3 and number < 3, kl
    best, last, gone = (f"step-0000000{step}" for step in (number, 3, 3 - number))
    scores = {0: json.loads((out / "conversion.json").read_text())["evaluations"]["distill"]["kl"]} | kl
    worse = {step for step in kl if scores[step] > 1.05 * min(scores[earlier] for earlier in range(step))}
    assert worse and worse == {step for step in kl if f"long {step}/3  WORSE ON VALIDATION: kl {kl[step]:.4g}" in said}
    assert f"not the last checkpoint is best on validation data but {best} (kl {kl[number]:.4g})" in said
    folder = out / "stages" / "long"
    assert sorted(path.name for path in folder.glob("step-*")) == [best, last]
    record = json.loads((folder / "stage.json").read_text())
    assert (record["checkpoint"], record["best"]) == (last, best)

    for options, name in (({}, best), ({"checkpoint": "last"}, last), ({"checkpoint": last}, last)):
        export = tmp_path / f"export-{len(options)}-{options.get('checkpoint')}"
        report = export_hf(out, export, **options)
        assert report["checkpoint"] == name
        assert report["measurements"]["long"]["kl"] == kl[int(name[-1])]
        exported, trained = load_file(export / "model.safetensors"), load_file(folder / name / "model.safetensors")
        assert torch.equal(exported["model.layers.1.mlp.up_proj.weight"], trained["model.layers.1.mlp.up_proj.weight"])
        assert verify(export, out)["passed"]
    with pytest.raises(UserError, match=f"has no checkpoint {gone}"):
        export_hf(out, tmp_path / "none", checkpoint=gone)

    still = (
        "stages.still={objective: sft, tokens: 128, data: {seq_len: 32}, batch: {tokens: 128}, "
        "optim: {lr: 0, lr_rest: 0}}"
    )
    assert train(material, out, "--stage", "still", "--allow-changes", *spoiled, *often, still) == 0
    assert same(tensors(out, "still"), load_file(folder / best / "model.safetensors"))
    state = folder / best / "state.json"
    state.write_text(state.read_text().replace(f'"step": {number}', '"step": 7'))
    with pytest.raises(UserError, match="is not the one that stage long ended with"):
        RunDirectory(out).checkpoint("long", "best")


def test_no_memory_for_the_original_is_said(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rwkvinside.conversion.build.SHARE", 0.0)
    assert train(material, tmp_path / "run", "run=[calibrate]", "quantize.groups=[mlp]") == 0
    assert "no memory for the original teacher" in capsys.readouterr().out
    assert [row["teacher"] for row in rows(tmp_path / "run", "eval", "calibrate")] == ["quantized (nf4)"] * 2
    said = table(measurements(tmp_path / "run" / "metrics.jsonl"))
    assert said.endswith("After stage calibrate the teacher is not the original: quantized (nf4).")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_the_steps(material, tmp_path, monkeypatch, capsys, number):
    """Before anything is saved one line and 130; after that 75, and --resume goes on."""
    begun, run_stage = [], conversion.run_stage

    def signalled(run, plan, resume_from):
        begun.append(plan.name)
        if len(begun) in (1, 3):
            signal.raise_signal(number)  # to this thread: os.kill may wake another one, and training has begun by then
        run_stage(run, plan, resume_from)

    monkeypatch.setattr(conversion, "run_stage", signalled)
    before = signal.getsignal(signal.SIGTERM)
    out, stages = tmp_path / "run", "run=[calibrate,align]"
    assert train(material, out, stages) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert train(material, out, stages) == 75  # calibrate is done
    resuming = f"python train_distill.py --out {out} --resume"  # the run has its configuration
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [f"error: stopped; what was saved before is in {out}", f"continue with {resuming}"]
    assert train_distill.main(shlex.split(resuming)[2:]) == 0 and begun == ["calibrate", "calibrate", "align", "align"]
    assert signal.getsignal(signal.SIGTERM) == before
