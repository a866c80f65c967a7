"""The Triton training kernels: their properties (triton_cases.py) in the interpreter and on a GPU, what they plan, what
they refuse."""

import pytest
import torch
from triton_worker import run_cases

from rwkvinside.kernels.gpu import op
from rwkvinside.kernels.gpu.table import Config, Tuning, lookup


@pytest.mark.integration
def test_properties_in_the_interpreter():
    run_cases("triton_cases.py", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_properties_on_a_gpu():
    run_cases("triton_cases.py", interpret=False)


def arguments(B=2, T=100, H=4, N=64, dtype=torch.bfloat16):
    token = torch.empty(B, T, H, N, dtype=dtype, device="meta")
    return {name: token.float() if name == "w" else token for name in "rwkvab"}


OPTIONS = {"precision": "balanced", "capability": (9, 0)}


def names(launches):
    return [launch.kernel.__name__ for launch in launches]


def test_plans_need_no_gpu_and_name_what_runs():
    inputs = arguments()
    forward, (y, final, starts, u) = op.plan_forward(**inputs, **OPTIONS)
    assert names(forward) == ["prepare", "scan_forward"]
    assert y.shape == (2, 100, 4, 64) and y.dtype == torch.bfloat16
    assert final.shape == (2, 4, 64, 64) and final.dtype == torch.float32
    backward, grads = op.plan_backward(
        **inputs, mask=None, cu_seqlens=None, starts=starts, u=u, dy=y, dfinal=None, **OPTIONS
    )
    assert names(backward) == ["prepare", "scan_backward", "gradient"]
    assert [x.dtype for x in grads] == [x.dtype for x in inputs.values()] + [torch.float32]


def test_a_gradient_that_only_v_or_the_state_needs_takes_no_work_within_the_chunks():
    inputs = arguments()
    _, (y, _, starts, u) = op.plan_forward(**inputs, **OPTIONS)
    rest = {"mask": None, "cu_seqlens": None, "starts": starts, "u": u, "dy": y, "dfinal": None, "within": False}
    backward, grads = op.plan_backward(**inputs, **rest, **OPTIONS)
    assert names(backward) == ["prepare", "scan_backward"]
    assert [x.numel() > 0 for x in grads] == [name in ("v", "state") for name in (*inputs, "state")]


def test_inputs_that_heads_share_get_a_sum_each():
    inputs = arguments()
    inputs |= {name: inputs[name][:, :, :2] for name in "va"}
    _, (y, _, starts, u) = op.plan_forward(**inputs, **OPTIONS)
    rest = {"mask": None, "cu_seqlens": None, "starts": starts, "u": u, "dy": y, "dfinal": None}
    for within, last in ((True, ["gradient", "sum_heads", "sum_heads"]), (False, ["sum_heads"])):
        backward, grads = op.plan_backward(**inputs, **rest, within=within, **OPTIONS)
        assert names(backward) == ["prepare", "scan_backward", *last]
        for name, grad in zip(inputs, grads, strict=False):
            wanted = inputs[name].shape if within or name == "v" else (0,)
            assert grad.shape == wanted and grad.dtype == inputs[name].dtype


def test_plans_in_segments():
    launches, _ = op.plan_forward(**arguments(), **OPTIONS, segments=3)
    assert names(launches) == ["prepare", "scan_forward", "advance", "advance", "scan_forward"]
    affine, outputs = launches[1], launches[-1]
    assert affine.grid[0] == 2 * outputs.grid[0], "the affine map has twice the rows"


def test_packed_sequences_get_a_chunk_more_each_at_most():
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    config = lookup(64, (9, 0), "balanced")
    launches, (_, final, starts, _) = op.plan_forward(**arguments(B=1), cu_seqlens=cu_seqlens, **OPTIONS, config=config)
    assert final.shape[0] == 3
    assert launches[0].grid[0] == starts.shape[0] == -(-100 // config.length) + 3


def test_chunks_too_long_for_fp32_are_refused():
    config = Config(64, 16, *[Tuning(4, 1), 16, *[Tuning(4, 1)] * 3], 16, 16)
    with pytest.raises(ValueError, match="64"):
        op.plan_forward(**arguments(), **OPTIONS, config=config)


def test_few_heads_are_split_and_many_are_not():
    config = lookup(64, (9, 0), "balanced")
    wide = config.block_v
    assert op.choose_split(4096, 128, 64, config, processors=132) == (wide, 1)
    assert op.choose_split(32, 128, 64, config, processors=132) == (op.NARROW, 1)
    assert op.choose_split(2, 1024, 64, config, processors=132) == (op.NARROW, 16)
    assert op.choose_split(2, 255, 64, config, processors=132) == (op.NARROW, 1), "too short"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"precision": "bf16"}, "precision"),
        ({"r": torch.empty(1, 3, 2, 20)}, "multiple of 8"),
        ({"r": torch.empty(1, 0, 2, 16)}, "T > 0"),
        ({"w": torch.empty(1, 3, 1, 16)}, "w has shape"),
        ({"k": torch.empty(1, 3, 3, 16)}, "k has shape"),
        ({"v": torch.empty(1, 3, 2, 16, dtype=torch.float64)}, "v is torch.float64"),
        ({"state": torch.empty(2, 2, 16, 16)}, "state has shape"),
        ({"mask": torch.ones(1, 3)}, "mask has shape"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, "cu_seqlens has shape"),
        ({name: torch.empty(2, 3, 2, 16) for name in "rwkvab"} | {"cu_seqlens": torch.tensor([0, 3])}, "batch of 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    good = {name: torch.empty(1, 3, 2, 16) for name in "rwkvab"}
    with pytest.raises(ValueError, match=message):
        op.wkv7(**good | changes)


@pytest.mark.skipif(op.kernels.INTERPRETED.value, reason="Triton's interpreter runs on the CPU")
def test_the_cpu_is_refused():
    with pytest.raises(RuntimeError, match="CUDA device"):
        op.wkv7(**{name: torch.empty(1, 3, 2, 16) for name in "rwkvab"})
