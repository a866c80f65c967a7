"""Two and three ranks under the real launchers against a single process.

One start for all cases: a start costs ten seconds.
"""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny_hybrid as tiny
import torch
from toy_training import BOUNDARY, SETTINGS, Losses, local_engine, phase, trainer

from rwkvinside.evaluate.in_training import evaluate_student
from rwkvinside.training.checkpoint import Checkpointer
from rwkvinside.training.local_engine import LocalEngine
from rwkvinside.training.process_group import Distributed

pytestmark = pytest.mark.distributed
HELPERS = Path(__file__).resolve().parents[1] / "helpers"
ZERO = ("zero0", "zero1", "zero2", "zero3")
WAYS = (*ZERO, "zero1-offload", "zero3-offload")


def single(directory, resume=None):
    losses, engine, checkpointer = Losses(), local_engine(dropout=0.0), Checkpointer(directory, {}, keep=9)
    toy = trainer(engine, metrics=losses, checkpointer=checkpointer, save_every=4)
    if resume is not None:
        toy.restore(resume)
    toy.fit()
    return losses, checkpointer


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return single(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """The tiny hybrid in this process, all rows at once: {case: (losses, checkpoint, evaluation)}."""
    found = {}
    for case, objective, precision in (
        ("align", tiny.align(), "fp32"),
        ("distill", tiny.distill(), "fp32"),
        ("quantized", tiny.quantized(), "fp32"),
        ("sparse", tiny.sparse(), "fp32"),
        ("bf16", tiny.distill(), "bf16"),
    ):
        student, make_step = objective
        engine = LocalEngine(student, tiny.groups(student), tiny.SETTINGS, Distributed("cpu"), precision)
        step, losses = make_step(engine.module), Losses()
        checkpointer = Checkpointer(tmp_path_factory.mktemp(case), {})
        tiny.trainer(engine, step, micro_rows=tiny.ROWS, checkpointer=checkpointer, metrics=losses).fit()
        with engine.autocast():
            scores = evaluate_student(engine.module, getattr(step, "teacher", None), tiny.judged(), torch.device("cpu"))
        assert max(losses["grad_norm"]) > tiny.SETTINGS.clip
        found[case] = losses["loss"], checkpointer.load(), {"kl": scores.kl, "ce": scores.ce}
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def launch(out, single_run, *command):
    """OUT of the worker and what it has written."""
    bin = Path(sys.executable).parent
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}{os.pathsep}{HELPERS.parents[1]}"}
    environment["PATH"] = f"{bin}{os.pathsep}{environment['PATH']}"
    command = [str(bin / command[0]), *command[1:], "--master_port", free_port(), str(HELPERS / "ranks_worker.py")]
    command += [str(out), str(single_run)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    (out / "log").write_text(done.stdout + done.stderr)
    assert (out / "results.json").exists(), done.stdout + done.stderr
    return out, json.loads((out / "results.json").read_text()), done.returncode


@pytest.fixture(scope="module")
def two(tmp_path_factory, reference):
    """Two ranks by DeepSpeed's launcher."""
    out, results, code = launch(
        tmp_path_factory.mktemp("two"), reference[1].directory, "deepspeed", "--num_accelerators", "2"
    )
    assert code == 75, "a rank's exit code goes through the launcher"
    assert results["ranks"] == 2
    return out, results


@pytest.fixture(scope="module")
def three(tmp_path_factory, reference):
    """Three ranks by torchrun; they share neither eight nor seven rows evenly."""
    out, results, code = launch(
        tmp_path_factory.mktemp("three"), reference[1].directory, "torchrun", "--nproc_per_node", "3"
    )
    assert code == 0 and results["ranks"] == 3
    return out, results


@pytest.fixture(params=["two", "three"])
def ranks(request):
    return request.getfixturevalue(request.param)


def final(directory, step=8):
    return Checkpointer(directory, {}).load(f"step-{step:08d}")


def close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("economy", ["", "-economy"], ids=["plain", "offload-and-recompute"])
@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("objective", ["align", "distill"])
def test_ranks_train_the_hybrid_as_one_process(ranks, hybrid, objective, zero, economy):
    out, results = ranks
    case = f"{objective}-{zero}{economy}"
    losses, checkpoint, evaluation = hybrid[objective]
    assert results["losses"][case] == pytest.approx(losses, rel=1e-5)
    close(final(out / case, tiny.STEPS).tensors(), checkpoint.tensors(), 1e-4)
    assert results["evaluations"][case] == [pytest.approx(evaluation, rel=1e-5, abs=1e-6)]


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("case", ["quantized", "sparse"])
def test_quantized_weights_and_adapters_on_ranks(two, hybrid, case, zero):
    out, results = two
    losses, checkpoint, evaluation = hybrid[case]
    assert results["losses"][f"{case}-{zero}"] == pytest.approx(losses, rel=1e-5)
    close(final(out / f"{case}-{zero}", tiny.STEPS).tensors(), checkpoint.tensors(), 1e-4)
    assert results["evaluations"][f"{case}-{zero}"] == [pytest.approx(evaluation, rel=1e-5, abs=1e-6)]


def test_a_sharded_teacher_teaches_the_same(two, three, hybrid):
    for (_, results), case in ((two, "zero1"), (two, "zero3"), (three, "zero3")):
        assert results["losses"][f"distill-{case}-sharded-teacher"] == pytest.approx(hybrid["distill"][0], rel=1e-5)
        got = results["evaluations"][f"distill-{case}-sharded-teacher"]
        assert got == [pytest.approx(hybrid["distill"][2], rel=1e-5)]


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_bf16_on_ranks_is_that_of_one_process(two, hybrid, zero):
    """Autocast over fp32 weights: only sums over micro-batches of other sizes round differently."""
    losses = two[1]["losses"][f"distill-{zero}-bf16"]
    assert losses == pytest.approx(hybrid["bf16"][0], rel=2e-3)
    assert losses == pytest.approx(two[1]["losses"]["distill-zero1-bf16"], rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_equal_one_process(two, reference, way):
    (out, results), (losses, checkpointer) = two, reference
    assert results["losses"][f"fp32-{way}"] == pytest.approx(losses["loss"], rel=1e-5)
    assert results["norms"][f"fp32-{way}"] == pytest.approx(losses["grad_norm"], rel=1e-5)
    mine, its = final(out / f"fp32-{way}"), final(checkpointer.directory)
    close(mine.tensors(), its.tensors(), 1e-5)
    close(mine.optimizer(), its.optimizer(), 1e-5)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_three_ranks_share_eight_rows(three, reference, zero):
    """Three, three and two rows, two at a time: one rank has a micro-batch that counts nothing."""
    (out, results), (losses, checkpointer) = three, reference
    assert results["losses"][f"fp32-{zero}"] == pytest.approx(losses["loss"], rel=1e-5)
    close(final(out / f"fp32-{zero}").tensors(), final(checkpointer.directory).tensors(), 1e-5)


def test_micro_batches_of_two_ranks(two, reference):
    assert two[1]["losses"]["fp32-zero2-whole"] == pytest.approx(reference[0]["loss"], rel=1e-5)


RESUMED = [*(f"fp32-{way}" for way in WAYS), "bf16-zero2", "bf16-zero3"]
RESUMED += ["rounded-zero1", "rounded-zero2", "rounded-zero3"]


@pytest.mark.parametrize("case", RESUMED)
def test_resume_on_two_ranks_is_bit_identical(two, case):
    out, results = two
    straight, resumed = final(out / case), final(out / f"{case}-resumed")
    assert results["losses"][f"{case}-resumed"] == results["losses"][case][4:]
    close(straight.tensors(), resumed.tensors(), 0)
    close(straight.optimizer(), resumed.optimizer(), 0)


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_move_between_one_and_two_ranks(two, reference, way, tmp_path):
    (out, results), (losses, checkpointer) = two, reference
    assert results["losses"][f"fp32-{way}-from-single"] == pytest.approx(losses["loss"][4:], rel=1e-5)
    back, _ = single(tmp_path, Checkpointer(out / f"fp32-{way}", {}).load("step-00000004"))
    assert back["loss"] == pytest.approx(losses["loss"][4:], rel=1e-5)
    close(final(tmp_path).tensors(), final(checkpointer.directory).tensors(), 1e-5)


def test_rounded_weights_on_two_ranks(two, reference):
    """DeepSpeed's own bf16."""
    (out, results), (losses, _) = two, reference
    for zero in ZERO:
        # 2^-9 relative for each rounding of weights and activations, a few in a row
        assert results["losses"][f"rounded-{zero}"] == pytest.approx(losses["loss"], rel=2e-2)
    assert results["losses"]["rounded-zero0"] == results["losses"]["rounded-zero1"]
    weights = final(out / "rounded-zero1").tensors()
    assert all(t.dtype == torch.float32 and not torch.equal(t, t.bfloat16().float()) for t in weights.values())


def test_a_signal_to_one_rank_stops_both(two):
    assert "stopped at step 2 of 8" in two[1]["messages"]["stop"]
    assert Checkpointer(two[0] / "stop", {}).names() == ["step-00000002"]


def test_ranks_end_early_by_what_the_first_has_counted(two):
    """The second one counts improvements alone; had it gone on, it would wait for the first for ever."""
    assert Checkpointer(two[0] / "early-end", {}).names() == ["step-00000006"]
    assert len(two[1]["losses"]["early-end"]) == 6


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_nan_on_one_rank_stops_both_and_names_its_rows(two, zero):
    messages = two[1]["messages"]
    assert "step 3: loss nan" in messages[f"nan-{zero}"] and "rows 17, 19;" in messages[f"nan-{zero}"]
    bad = messages[f"inf-{zero}"]
    assert "step 3: loss 5.9" in bad and "gradient norm" in bad and "rows 17, 19;" in bad
    assert "beginning in the gradient that reaches" in bad and "checkpoint is step-00000002" in bad


@pytest.mark.parametrize("zero", ZERO)
def test_what_joins_later_on_two_ranks(two, zero, tmp_path):
    checkpointer = Checkpointer(tmp_path, {})
    make_engine = partial(LocalEngine, settings=SETTINGS, world=Distributed("cpu"))
    phase(make_engine, checkpointer, joined=False).fit(until=BOUNDARY)
    phase(make_engine, checkpointer, joined=True).fit()
    mine, its = final(two[0] / f"unfreezing-{zero}"), checkpointer.load()
    close(mine.tensors(), its.tensors(), 1e-5)
    close(mine.optimizer(), its.optimizer(), 1e-5)


def test_a_model_can_be_wrapped_again(two):
    first, second = two[1]["losses"]["first"], two[1]["losses"]["second"]
    assert all(b < a for a, b in zip(first, second, strict=True))  # the same rows, after one more stage


def test_nothing_was_compiled(two):
    assert "ninja" not in (two[0] / "log").read_text()


def test_nothing_of_a_closed_engine_stays_in_memory(ranks):
    _, results = ranks
    assert not results["alive"]
