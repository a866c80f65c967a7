"""Whole conversions of a tiny teacher through train_distill.py, in this process; with others: test_conversion.py."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

import train_distill
from rwkvinside.loading import load_config
from rwkvinside.training.schedule import Budget
from rwkvinside.training.trainer import Trainer


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny Qwen3 with a byte-level tokenizer, and texts; on every file system path of its own."""
    root = tmp_path_factory.mktemp("material")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(root / "teacher")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "teacher")
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
        for name in ("align", "distil", "long")
        for field in ("tokens=384", "data.seq_len=32", "batch.tokens=128", "optim.lr=0.003")
    ),
]


def arguments(material, out, *more):
    argv = ["--teacher", material / "teacher", "--data", material / "train.jsonl", "--val", material / "val.jsonl"]
    return [*map(str, argv), "--out", str(out), *SMALL, f"data.cache_dir={material / 'cache'}", *more]


def train(material, out, *more):
    return train_distill.main(arguments(material, out, *more))


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


def test_a_run_leaves_everything_that_describes_it(material, whole):
    conversion = json.loads((whole / "conversion.json").read_text())
    assert conversion["finished_stages"] == ["calibrate", "align", "distil"]
    assert set(conversion["evaluations"]["distil"]) == {"kl", "ce", "ce_teacher", "agreement"}
    config = load_config([whole / "config.yaml"])
    assert config.teacher.path == str(material / "teacher") and config.stages["align"].tokens == 384
    assert "layers    RRR" in (whole / "plan.txt").read_text()
    for stage in ("align", "distil"):
        assert [row["step"] for row in rows(whole, "train", stage)] == [1, 2, 3]
        assert [row["step"] for row in rows(whole, "eval", stage)] == [3]
    assert set(rows(whole, "train", "align")[0]["layers"]) == {"0", "1", "2"}
    (fit,) = rows(whole, "calibrate", "calibrate")
    assert all(fit["error"][i] <= fit["error_before"][i] for i in "012")
    assert not list(whole.rglob(".*writing*"))


def test_each_stage_starts_from_the_last(whole):
    """Calibrate keeps what it copied and fits the rest; align changes mixers only; distil changes the others, too."""
    calibrated, aligned, distilled = (tensors(whole, stage) for stage in ("calibrate", "align", "distil"))
    assert calibrated.keys() == aligned.keys() < distilled.keys()
    assert all(".self_attn." in name for name in aligned)
    assert not torch.equal(calibrated["model.layers.1.self_attn.w1"], aligned["model.layers.1.self_attn.w1"])
    start, fitted = (row["kl"] for row in rows(whole, "eval", "calibrate"))
    assert fitted < start
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= distilled.keys()


def test_stage_by_stage_is_the_same_as_in_one_go(material, whole, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(material, out, "--stage", "align") == 2
    assert "starts from stage calibrate, which is not finished" in capsys.readouterr().err
    assert not out.exists()
    for stage in ("calibrate", "align", "distil"):
        assert train(material, out, "--stage", stage) == 0
        assert same(tensors(out, stage), tensors(whole, stage))
    assert same(tensors(out, "distil", "optimizer"), tensors(whole, "distil", "optimizer"))
    assert train(material, out, "--stage", "distil") == 2
    assert "has begun stage distil already" in capsys.readouterr().err
    assert train(material, out, "--stage", "long", "stages.long.train=[mlp]") == 0  # beyond `run`, from distil
    before, after = tensors(out, "distil"), tensors(out, "long")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(".mlp." in name for name in changed)


def test_a_crashed_run_resumes_bit_for_bit(material, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    more = ["stages.distil.tokens=2560", "checkpoint.every_steps=10"]  # 20 steps
    shutil.copytree(whole, out)
    shutil.rmtree(out / "stages" / "distil")
    conversion = json.loads((out / "conversion.json").read_text())
    (out / "conversion.json").write_text(json.dumps(conversion | {"finished_stages": ["calibrate", "align"]}))
    straight = tmp_path / "straight"
    shutil.copytree(out, straight)
    assert train(material, straight, "--resume", *more) == 0

    report = Trainer._report

    def crash(self, *args):
        report(self, *args)
        if self.done == 13:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_report", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(material, out, "--resume", *more)
    assert train(material, out, *more) == 2
    assert "is not empty" in capsys.readouterr().err
    assert train(material, out, "--resume", *more) == 0
    assert "align is finished already" in capsys.readouterr().out
    assert same(tensors(out, "distil"), tensors(straight, "distil"))
    assert same(tensors(out, "distil", "optimizer"), tensors(straight, "distil", "optimizer"))
    assert [row["step"] for row in rows(out, "train", "distil")] == list(range(1, 21))
    losses = [[row["loss"] for row in rows(folder, "train", "distil")] for folder in (out, straight)]
    assert losses[0] == losses[1]


def test_another_student_is_refused(material, whole, capsys):
    more = ["--resume", "run=[calibrate,align,distil,long]", "student.preset=rad"]
    assert train(material, whole, *more) == 2
    err = capsys.readouterr().err
    assert "belongs to another student" in err and "value_path is 'residual_kv' there and 'residual_full' here" in err
    assert json.loads((whole / "conversion.json").read_text())["finished_stages"][-1] == "distil"


def test_a_truncated_checkpoint_is_refused(material, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (file,) = (out / "stages" / "distil").glob("*/model.safetensors")
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
        "run=[calibrate,lora,distil]",
        "student.attention_layers=[1]",
        "stages.distil.train=[mixer,'.*mlp.*']",
    ]
    assert train(material, tmp_path / "run", *more) == 0
    before, after = (tensors(tmp_path / "run", stage) for stage in ("calibrate", "lora"))
    changed = {name.split("self_attn.")[1] for name in after if not torch.equal(before[name], after[name])}
    assert "w1" in changed and not changed & {"receptance.weight", "key.weight", "value.weight", "output.weight"}
    assert not any(".layers.1.self_attn." in name for name in after)
    distilled = tensors(tmp_path / "run", "distil")
    assert "lm_head.weight" not in distilled and any(".mlp." in name for name in distilled)


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
    ],
)
def test_bad_input_writes_nothing(material, tmp_path, capsys, more, cause):
    out = tmp_path / "run"
    assert train(material, out, *more) == 2
    err = capsys.readouterr().err
    assert cause in err and len(err.splitlines()) <= 2
    assert not out.exists()


def test_output_directories_of_others_are_left_alone(material, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for more in ([], ["--resume"], ["--stage", "calibrate"]):
        assert train(material, out, *more) == 2
        assert "is not empty, and no run" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
    assert train(material, out / "thesis.tex") == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("tokens, batch, seq_len", [(600_000, 4096, 64), (1000, 300, 128), (1000, 128, 128)])
def test_plan_and_trainer_count_the_same_steps(material, tokens, batch, seq_len):
    fields = {"tokens": tokens, "batch.tokens": batch, "data.seq_len": seq_len}
    overrides = [f"stages.align.{name}={value}" for name, value in fields.items()]
    stage = load_config(teacher=str(material / "teacher"), overrides=overrides).stages["align"]
    budget = Budget(tokens, batch, seq_len)
    assert (stage.steps, stage.rows) == (budget.steps, budget.rows_per_step)
