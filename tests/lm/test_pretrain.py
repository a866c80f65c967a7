"""A language model from nothing through the seed's own command: better than a bigram, resumed bit for bit, exported."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_rwkv
from rwkvinside.cli.main import main
from rwkvinside.evaluate.load import load_run
from rwkvinside.report.facts import run_facts
from rwkvinside.report.screen import end_screen
from rwkvinside.runs.trained import open_run

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["river", "stone", "silent", "window", "garden", "morning", "copper", "winter", "lantern", "shadow"]
SMALL = [
    "model={hidden_size: 48, num_hidden_layers: 3, num_attention_heads: 3}",
    "stages.pretrain.tokens=60k",
    "stages.pretrain.batch.tokens=1024",
    "stages.pretrain.optim.lr=4e-3",
    "checkpoint.every_steps=20",
    "data.val_tokens=4k",
]
STATEFUL = ["stages.pretrain.stateful=true", "student.attention_window=40", "student.attention_sinks=2"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def text(seed, words=12000):
    """Sentences of random words: a byte within a word follows from those before it, not from the last one alone."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + (".\n\n" if draw.random() < 0.1 else " ") for _ in range(words))


def bigram(train, val):
    """Mean cross-entropy, nats a byte, of a bigram model with add-one smoothing of the training bytes."""
    pairs, firsts = Counter(zip(train, train[1:], strict=False)), Counter(train)
    return sum(-math.log((pairs[a, b] + 1) / (firsts[a] + 257)) for a, b in zip(val, val[1:], strict=False)) / (
        len(val) - 1
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text(text(1))
    (folder / "val.txt").write_text(text(2, 600))
    return folder


def arguments(texts, out, *more):
    """The seed's command, for a small model on these texts."""
    seed = ["--output_dir", str(out), "--experiment_name", "words", "--train_file", str(texts / "train.txt")]
    seed += ["--val_file", str(texts / "val.txt"), "--max_seq_length", "128", "--seed", "42"]
    return [*seed, "--config", "configs/lm/tiny.yaml", *SMALL, f"data.cache_dir={texts / 'cache'}", *more]


def rows(run, kind):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


@pytest.fixture(scope="module")
def trained(texts):
    assert train_rwkv.main(arguments(texts, texts / "out")) == 0
    return texts / "out" / "words"


@pytest.fixture(scope="module")
def exported(trained, texts):
    out = texts / "hf"
    assert main(["export", str(trained), "--to", "hf", "--out", str(out)]) == 0
    return out


def test_it_beats_a_bigram_model_of_the_same_text(texts, trained):
    model, baseline = (
        rows(trained, "eval")[-1]["ce"],
        bigram((texts / "train.txt").read_bytes(), (texts / "val.txt").read_bytes()),
    )
    assert 0.2 < model < baseline - 0.3  # the words are random: nothing gets to 0
    assert "kl" not in rows(trained, "eval")[-1] and open_run(trained).teacher is None
    assert "KL" not in end_screen(run_facts(trained)), "nothing to be compared with"


def stopped_and_resumed(texts, out, steps, *more):
    """Losses and directory of a run that was told to stop once it had made so many steps, and then to go on."""
    run = texts / out / "words"

    def stop():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (run / "metrics.jsonl").exists() and len(rows(run, "train")) >= steps:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=stop)
    watcher.start()
    assert train_rwkv.main(arguments(texts, texts / out, *more)) == 75
    watcher.join()
    made = len(rows(run, "train"))
    assert train_rwkv.main(arguments(texts, texts / out, *more, "--resume")) == 0
    losses = [row["loss"] for row in rows(run, "train")]
    assert steps <= made < len(losses)
    return losses, run


def same_files(one, two, *names):
    """Whether the last checkpoints of two runs have the same tensors."""
    newest = [sorted((run / "stages" / "pretrain").glob("step-*"))[-1] for run in (one, two)]
    for name in names:
        a, b = (load_file(folder / name) for folder in newest)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


def test_an_interrupted_run_resumes_bit_for_bit(texts, trained):
    losses, run = stopped_and_resumed(texts, "again", 25)
    assert losses == [row["loss"] for row in rows(trained, "train")]
    assert same_files(run, trained, "model.safetensors", "optimizer.safetensors")


def test_a_stateful_run_resumes_bit_for_bit(texts):
    few = [*STATEFUL, "stages.pretrain.tokens=12k"]
    assert train_rwkv.main(arguments(texts, texts / "stateful", *few)) == 0
    whole = texts / "stateful" / "words"
    losses, run = stopped_and_resumed(texts, "stateful-again", 4, *few)
    assert losses == [row["loss"] for row in rows(whole, "train")]
    assert same_files(run, whole, "model.safetensors", "optimizer.safetensors", "carried.safetensors")
    assert "goes on from step to step in 8 streams" in (run / "plan.txt").read_text()


def test_another_seed_is_another_model(texts, trained, capsys):
    again = arguments(texts, texts / "again", "--resume", "seed=43")
    assert train_rwkv.main(again) == 2
    assert "seed was 42, is 43" in capsys.readouterr().err


def test_the_export_generates(exported):
    # the export has been verified against the run in a process of its own when it was written
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    prompt = tokenizer("the river sto", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("the river stone ")
    assert (model.config.rwkv_layers, model.config.rwkv_chunk_size, model.config.teacher_model) == ([0, 2], 256, None)
    assert "trained from nothing" in (exported / "README.md").read_text()


def test_eval_measures_it_alone(trained, exported, texts, capsys):
    found = []
    for model in (trained, exported):
        command = ["eval", str(model), "--data", str(texts / "val.txt"), "--json", str(texts / "eval.json")]
        assert main([*command, "--png", str(texts / "eval.png")]) == 0
        found.append(json.loads((texts / "eval.json").read_text()))
    assert found[0]["ce"] == pytest.approx(found[1]["ce"], abs=1e-5)
    assert found[0]["teacher"] is None and "kl" not in found[0] and "KL" not in capsys.readouterr().out


def test_each_knob_changes_what_the_model_computes(texts, trained):
    """Short runs of the same seed that differ in one knob alone end in other losses."""
    run = texts / "knobs"
    few = ["stages.pretrain.tokens=4k", "--experiment_name"]
    losses = {}
    for knob in (
        "rwkv_chunk_size=256",  # as it is
        "use_rwkv=false",
        "rwkv_time_mix_ratio=0",
        "rwkv_use_linear_att=true",
        "rwkv_att_scale=3",
        "student.preset=cxa079",
    ):
        name = knob.split("=")[0].replace(".", "-")
        assert train_rwkv.main(arguments(texts, run, *few, name, knob)) == 0
        losses[knob] = tuple(row["loss"] for row in rows(run / name, "train"))
    assert len(set(losses.values())) == len(losses)


def test_a_pure_transformer_is_read_back_as_it_was_trained(texts):
    run = texts / "knobs" / "use_rwkv"
    trained, again = open_run(run).load_model(), load_run(run, "cpu")
    ids = torch.arange(40)[None]
    torch.testing.assert_close(again(ids).logits, trained.lm(ids).logits)
    assert again.config.rwkv_layers == [] and "q_proj" in "".join(again.state_dict())


@pytest.mark.distributed
def test_two_deepspeed_ranks_have_the_same_losses_and_leave_the_same_states(texts):
    few = [*STATEFUL, "stages.pretrain.tokens=6k", "stages.pretrain.batch.micro_rows=2", "--experiment_name"]
    assert train_rwkv.main(arguments(texts, texts / "ranks", *few, "one")) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port, "--quiet"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, *start, "train_rwkv.py", *arguments(texts, texts / "ranks", *few, "two")]
    environment = os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, two = (texts / "ranks" / name for name in ("one", "two"))
    assert "2 ranks, DeepSpeed" in (two / "plan.txt").read_text()
    for kind, name in (("train", "loss"), ("eval", "ce")):
        assert [r[name] for r in rows(two, kind)] == pytest.approx([r[name] for r in rows(one, kind)], abs=1e-5)
    states = [
        load_file(next((run / "stages" / "pretrain").glob("step-*")) / "carried.safetensors") for run in (one, two)
    ]
    assert len(states[0]["0.wkv"]) == 8
    torch.testing.assert_close(states[1], states[0], rtol=1e-3, atol=1e-4)
