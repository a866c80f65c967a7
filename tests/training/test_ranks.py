"""Two ranks under the real launchers against a single process. One start for all cases: a start costs ten seconds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_training import Losses, in_process, trainer

from rwkvinside.training.checkpoint import Checkpointer

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ZERO = ("zero0", "zero1", "zero2")


def single(directory, resume=None):
    losses, engine, checkpointer = Losses(), in_process(dropout=0.0), Checkpointer(directory, {}, keep=9)
    toy = trainer(engine, metrics=losses, checkpointer=checkpointer, save_every=4)
    if resume is not None:
        toy.restore(resume)
    toy.fit()
    return losses, checkpointer


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return single(tmp_path_factory.mktemp("single"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def two(tmp_path_factory, reference):
    """OUT of the worker on two ranks, started as the README says."""
    out = tmp_path_factory.mktemp("two")
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port()]
    command += [str(HERE / "ranks_worker.py"), str(out), str(reference[1].directory)]
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550)
    (out / "log").write_text(done.stdout + done.stderr)
    assert (out / "losses.json").exists(), done.stdout + done.stderr
    assert done.returncode == 75, "a rank's exit code goes through the launcher"
    return out


@pytest.fixture(scope="module")
def results(two):
    content = json.loads((two / "losses.json").read_text())
    assert content["ranks"] == 2
    return content


def final(directory):
    return Checkpointer(directory, {}).load("step-00000008")


def close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("stage", ZERO)
def test_two_ranks_equal_one_process(two, results, reference, stage):
    losses, checkpointer = reference
    assert results["losses"][f"fp32-{stage}"] == pytest.approx(losses["loss"], rel=1e-5)
    assert results["norms"][f"fp32-{stage}"] == pytest.approx(losses["grad_norm"], rel=1e-5)
    mine, its = final(two / f"fp32-{stage}"), final(checkpointer.directory)
    close(mine.tensors(), its.tensors(), 1e-5)
    close(mine.optimizer(), its.optimizer(), 1e-5)


def test_micro_batches_of_two_ranks(results, reference):
    assert results["losses"]["fp32-zero2-whole"] == pytest.approx(reference[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("case", ["fp32-zero0", "fp32-zero1", "fp32-zero2", "bf16-zero1", "bf16-zero2"])
def test_resume_on_two_ranks_is_bit_identical(two, results, case):
    straight, resumed = final(two / case), final(two / f"{case}-resumed")
    assert results["losses"][f"{case}-resumed"] == results["losses"][case][4:]
    close(straight.tensors(), resumed.tensors(), 0)
    close(straight.optimizer(), resumed.optimizer(), 0)


@pytest.mark.parametrize("stage", ZERO)
def test_checkpoints_move_between_one_and_two_ranks(two, results, reference, stage, tmp_path):
    losses, checkpointer = reference
    assert results["losses"][f"fp32-{stage}-from-single"] == pytest.approx(losses["loss"][4:], rel=1e-5)
    back, _ = single(tmp_path, Checkpointer(two / f"fp32-{stage}", {}).load("step-00000004"))
    assert back["loss"] == pytest.approx(losses["loss"][4:], rel=1e-5)
    close(final(tmp_path).tensors(), final(checkpointer.directory).tensors(), 1e-5)


def test_bf16_on_two_ranks(two, results, reference):
    losses, checkpointer = reference
    for stage in ZERO:
        # 2^-9 relative for each rounding of weights and activations, a few in a row
        assert results["losses"][f"bf16-{stage}"] == pytest.approx(losses["loss"], rel=2e-2)
    assert results["losses"]["bf16-zero0"] == results["losses"]["bf16-zero1"]
    weights = final(two / "bf16-zero1").tensors()
    assert all(t.dtype == torch.float32 and not torch.equal(t, t.bfloat16().float()) for t in weights.values())


def test_a_signal_to_one_rank_stops_both(two, results):
    assert "stopped at step 2 of 8" in results["messages"]["stop"]
    assert Checkpointer(two / "stop", {}).names() == ["step-00000002"]


@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_nan_on_one_rank_stops_both_and_names_its_rows(results, stage):
    message = results["messages"][f"nan-{stage}"]
    assert "step 3: loss nan" in message and "rows 17, 19;" in message
    assert "step 3: loss" in results["messages"][f"inf-{stage}"]
    assert "gradient norm" in results["messages"][f"inf-{stage}"]


def test_a_model_can_be_wrapped_again(results):
    first, second = results["losses"]["first"], results["losses"]["second"]
    assert first == results["losses"]["bf16-zero1"]
    assert all(b < a for a, b in zip(first, second, strict=True))  # the same rows, after one more stage


def test_nothing_was_compiled(two):
    assert "ninja" not in (two / "log").read_text()
