"""Whole conversions through the commands, as processes of their own: kill and resume, two DeepSpeed ranks, export."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, save_qwen3

import train_distill
from rwkvinside.support.lock import locked

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "stages.calibrate.tokens=512",
    "stages.align.tokens=2560",
    "stages.distill.tokens=2560",
    *(f"stages.{name}.data.seq_len=64" for name in ("calibrate", "align", "distill")),
    *(f"stages.{name}.batch.tokens=256" for name in ("calibrate", "align", "distill")),
    "checkpoint.every_steps=5",
    "log_every=1",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny random teacher that has its tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = byte_tokenizer("<|end|>", eos_token="<|end|>")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_qwen3(folder / "teacher", tokenizer, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, **sizes)
    for name, count in (("train", 60), ("val", 5)):
        lines = [json.dumps({"text": f"{name} {i}: " + "the quick brown fox " * (i % 7 + 1)}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(world, out, *more):
    files = ["--data", str(world / "train.jsonl"), "--val", str(world / "val.jsonl")]
    return ["train_distill.py", "--teacher", str(world / "teacher"), *files, "--out", str(out), *TINY, *more]


def run(*command, check=True, **options):
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, **options)
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def rows(out, kind="train", stage=None):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind and stage in (None, row["stage"])]


def last_checkpoint(out, stage):
    return sorted((out / "stages" / stage).glob("step-*"))[-1]


@pytest.fixture(scope="module")
def straight(world):
    """A conversion in one go: 10 steps of align, 10 of distill."""
    out = world / "straight"
    run(*arguments(world, out))
    return out


def test_one_go(world, straight):
    assert json.loads((straight / "conversion.json").read_text())["finished_stages"] == [
        "calibrate",
        "align",
        "distill",
    ]
    losses = [row["loss"] for row in rows(straight, stage="align")]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert set(rows(straight, stage="align")[0]["layers"]) == {"0", "1", "2"}
    assert rows(straight, "eval", "distill")[-1]["kl"] < rows(straight, "eval", "calibrate")[0]["kl"]
    again = run(*arguments(world, straight), check=False)
    assert again.returncode == 2 and str(straight) in again.stderr and "--resume" in again.stderr


def test_kill_and_resume_is_bit_identical(world, straight):
    out = world / "killed"
    process = subprocess.Popen(
        [sys.executable, *arguments(world, out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # killed somewhere after step 7 of distill: the checkpoint of step 5 is what is left
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len(rows(out, stage="distill")) >= 7:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(*arguments(world, out, "--resume"))
    for stage in ("align", "distill"):
        a, b = (load_file(last_checkpoint(path, stage) / "model.safetensors") for path in (straight, out))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), stage
        a, b = ([row["loss"] for row in rows(path, stage=stage)] for path in (straight, out))
        assert a == b


def test_sigterm_saves_and_exits_75(world):
    out = world / "terminated"
    process = subprocess.Popen(
        [sys.executable, *arguments(world, out, "stages.align.tokens=1M")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and rows(out, stage="align"):
            break
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    done = len(rows(out, stage="align"))
    assert last_checkpoint(out, "align").name == f"step-{done:08d}"


def distill_only(straight, out):
    """A run whose calibrate and align are those of the single process, so that distill starts from the same weights."""
    (out / "stages").mkdir(parents=True)
    for name in ("calibrate", "align"):
        (out / "stages" / name).symlink_to(straight / "stages" / name)
    conversion = json.loads((straight / "conversion.json").read_text()) | {"finished_stages": ["calibrate", "align"]}
    (out / "conversion.json").write_text(json.dumps(conversion))
    for name in ("run.json", "config.yaml"):
        (out / name).write_text((straight / name).read_text())
    return out


def two_ranks(launcher, world, out, *more):
    """Command and environment of distill on two ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    nodes = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    start = {
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port, "--quiet"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
        "torchrun on two nodes": ["-m", "torch.distributed.run", *nodes, "--master_port", port],
    }
    command = [*start[launcher], *arguments(world, out, "--stage", "distill", "--resume", "--allow-changes", *more)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return command, os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu"}


def assert_same(a, b, loss, weights):
    """Losses and weights of distill of two runs."""
    assert [row["loss"] for row in rows(b, stage="distill")] == pytest.approx(
        [row["loss"] for row in rows(a, stage="distill")], abs=loss
    )
    a, b = (load_file(last_checkpoint(path, "distill") / "model.safetensors") for path in (a, b))
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=weights) for name in a)


@pytest.fixture(scope="module")
def on_two_ranks(world, straight):
    out = distill_only(straight, world / "two")
    command, environment = two_ranks("deepspeed", world, out)
    run(*command, env=environment)
    return out


@pytest.mark.distributed
def test_two_deepspeed_ranks_are_one_process(straight, on_two_ranks):
    # 1e-4: Adam divides by the root of tiny second moments, which lets rounding of the summation order through
    assert_same(straight, on_two_ranks, 1e-5, 1e-4)
    one, two = (rows(path, "eval", "distill") for path in (straight, on_two_ranks))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for name in ("kl", "ce", "agreement"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=1e-5)


@pytest.mark.distributed
def test_two_ranks_choose_layers_as_one_process(world):
    choice = "student.attention_layers={choose: restore, keep: 1, distill: 512}"
    settings = (choice, "run=[calibrate,choose,distill]", "stages.distill.tokens=512")
    alone, both = world / "chosen", world / "chosen-by-two"
    assert train_distill.main(arguments(world, alone, *settings)[1:]) == 0
    command, environment = two_ranks("torchrun", world, both, *settings)
    at = command.index("train_distill.py")
    command = [*command[:at], "tests/helpers/writing_rank.py", *command[at + 1 :]]
    for word in ("--stage", "distill", "--resume", "--allow-changes"):
        command.remove(word)
    done = run(*command, env=environment | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.count("keep their attention") == 1
    one, two = (json.loads((out / "layers.json").read_text()) for out in (alone, both))
    assert one["scores"] == two["scores"] and list(one["trials"].values()) == list(two["trials"].values())
    kept = [json.loads((out / "stages/choose/stage.json").read_text())["attention_layers"] for out in (alone, both)]
    assert kept[0] == kept[1] and len(kept[0]) == 1
    a, b = (load_file(last_checkpoint(out, "choose") / "model.safetensors") for out in (alone, both))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert_same(alone, both, 1e-5, 1e-4)


@pytest.mark.distributed
def test_two_torchrun_ranks_with_a_deepspeed_file(world, straight, tmp_path):
    out, file = distill_only(straight, world / "file"), tmp_path / "deepspeed.json"
    cpu = {"device": "cpu"}
    zero = {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu, "stage3_param_persistence_threshold": 0}
    file.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto"}))
    command, environment = two_ranks("torchrun", world, out, "--deepspeed", str(file))
    run(*command, env=environment)
    assert_same(straight, out, 1e-5, 1e-4)


@pytest.mark.distributed
def test_two_nodes_with_a_launcher_each(world, straight):
    """They find each other by address and port, and share the run directory, as several machines do.

    A second teacher is sharded over them too; it has the weights of the student's own.
    """
    out = distill_only(straight, world / "nodes")
    sharded = ("stages.distill.teacher=separate", "stages.distill.teacher_model.shard=true")
    command, environment = two_ranks("torchrun on two nodes", world, out, *sharded)
    start = [sys.executable, *command[:2], "--node_rank"]
    files = [world / f"node-{node}.log" for node in (0, 1)]  # one may say much while the other waits for it
    launchers = []
    try:
        for node, file in enumerate(files):
            with file.open("w") as log:
                argv = [*start, str(node), *command[2:]]
                launchers.append(subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=log, stderr=log))
        for launcher in launchers:
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(timeout=150)
    finally:
        for launcher in launchers:
            if launcher.poll() is None:  # it waits for the other in vain, and does not hear a SIGTERM meanwhile
                for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
                    process.kill()
            launcher.wait()
    said = [file.read_text() for file in files]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said[0][-4000:] + said[1][-4000:]
    plan = (out / "plan.txt").read_text()
    assert "2 ranks, DeepSpeed" in plan and "sharded over the ranks" in plan
    assert "distill: " in said[0] and "distill: " not in said[1]  # the first node's rank prints for both
    assert_same(straight, out, 1e-5, 1e-4)


@pytest.mark.distributed
def test_ranks_of_one_run_respect_another_process(world, tmp_path):
    """Rank 0 finds the directory in use; all ranks end, and one says why."""
    out = tmp_path / "run"
    command, environment = two_ranks("torchrun", world, out)
    with locked(out):
        refused = run(*(word for word in command if word != "--resume"), check=False, env=environment)
    assert refused.returncode != 0 and not out.exists()
    assert refused.stderr.count(f"error: {out} is in use by process {os.getpid()} on {socket.gethostname()}") == 1


@pytest.mark.distributed
def test_one_rank_killed_and_all_restarted(world, straight, on_two_ranks):
    out = distill_only(straight, world / "one-killed")
    command, environment = two_ranks("deepspeed", world, out)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **quiet)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and launcher.poll() is None:
        # the checkpoint of step 5 is what is left
        if (out / "metrics.jsonl").exists() and len(rows(out, stage="distill")) >= 7:
            break
        time.sleep(0.02)
    (rank,) = (p for p in psutil.Process(launcher.pid).children(recursive=True) if p.environ().get("RANK") == "1")
    rank.kill()
    assert launcher.wait(timeout=60) != 0  # the launcher ends the other rank, which would wait for ever
    assert last_checkpoint(out, "distill").name == "step-00000005"
    command, environment = two_ranks("deepspeed", world, out)
    run(*command, env=environment)
    assert_same(on_two_ranks, out, 1e-6, 1e-6)


def test_export_of_a_trained_run_and_its_use_elsewhere(world, straight, tmp_path):
    out = tmp_path / "exported"
    run("convert_checkpoint.py", "export", str(straight), "--to", "hf", "--out", str(out))
    run("convert_checkpoint.py", "verify", str(out), "--against", str(straight))
    conversion = json.loads((out / "conversion.json").read_text())
    assert conversion["verification"]["max_difference"] <= 1e-5
    text = str(tmp_path / "eval.json")
    command = ("-m", "rwkvinside", "eval", str(out), "--teacher", str(world / "teacher"))
    run(*command, "--data", str(world / "val.jsonl"), "--json", text)
    found = json.loads(Path(text).read_text())
    # the exported student, judged document by document, is the one the last evaluation of the run judged
    assert found["kl"] == pytest.approx(rows(straight, "eval", "distill")[-1]["kl"], abs=1e-4)
    from_run = run(*(command[:3]), str(straight), "--data", str(world / "val.jsonl"), "--json", text)
    assert from_run.returncode == 0
    assert json.loads(Path(text).read_text())["kl"] == pytest.approx(found["kl"], abs=1e-5)
