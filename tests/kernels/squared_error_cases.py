"""The Triton kernels of align's error, in the interpreter or on a GPU. Run by test_losses.py, or directly:

TRITON_INTERPRET=1 python -m pytest tests/kernels/squared_error_cases.py
"""

import math

import pytest
import torch
from hybrid_cases import packed, teacher
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvinside.hybrid import layer_error
from rwkvinside.hybrid.calibration import teacher_norms
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.kernels.gpu import kernels, squared_error
from rwkvinside.stages.steps import AlignStep

DEVICE = "cpu" if kernels.INTERPRETED.value else "cuda"
# of a gradient, relative: the difference is rounded when it is kept, and once more when it is scaled
ROUNDING = {torch.float32: 2e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SCALE = 3.7  # of the error, as a gradient that is no power of two
WIDTHS = [1, 24, 1000, 4100]


def given(B=3, T=7, D=24, output=torch.float32, target=torch.float32):
    x = torch.randn(B, T, D)
    tensors = x.to(DEVICE, output), (x + torch.randn_like(x)).to(DEVICE, target), (torch.rand(B, T) < 0.7).to(DEVICE)
    tensors[2][0, 0], tensors[2][-1, -1] = True, False
    return tensors


def found(output, target, mask):
    """Error and gradient of the output."""
    output = output.detach().requires_grad_()
    error = squared_error.squared_error(output, target, mask)
    assert error.shape == () and error.dtype == torch.float32
    return error.detach(), torch.autograd.grad(SCALE * error, output)[0]


def check(output, target, mask):
    """Compare with float64; neither may see what is behind the mask."""
    difference = output.double() - target.double()
    if mask is not None:
        difference = difference.masked_fill(~mask[..., None], 0)
    error, grad = found(output, target, mask)
    assert error.item() == pytest.approx(difference.square().sum().item(), rel=1e-6)
    assert grad.dtype == output.dtype and grad.shape == output.shape
    wanted = 2 * SCALE * difference
    assert (grad - wanted).norm() <= ROUNDING[output.dtype] * wanted.norm()
    assert mask is None or not grad[~mask].any()


@pytest.mark.parametrize("target", ROUNDING, ids=str)
@pytest.mark.parametrize("output", ROUNDING, ids=str)
def test_error_and_gradient_are_those_in_float64(output, target):
    for width in WIDTHS:
        x, y, mask = given(D=width, output=output, target=target)
        check(x, y, mask)
        check(x, y, None)


@pytest.mark.parametrize("filling", [math.nan, math.inf])
def test_what_is_behind_the_mask_counts_nothing(filling):
    for width in WIDTHS:
        x, y, mask = given(D=width, output=torch.bfloat16)
        x[~mask] = y[~mask] = filling
        check(x, y, mask)
        assert math.isnan(found(x, y, None)[0]), "nor is it hidden without a mask"
    x, y, mask = given()
    error, grad = found(x, y, torch.zeros_like(mask))
    assert error == 0 and not grad.any()


def test_any_strides_of_batch_and_time():
    x, y, mask = given(B=5, T=9, D=40)
    views = [
        (x.transpose(0, 1), y.transpose(0, 1), mask.t()),
        (x[..., 3:36], y[..., :33], mask),
        (x[1::2, ::3], y[1::2, ::3], mask[1::2, ::3]),
        (x, y[:1].expand_as(x), mask[:, :1].expand_as(mask)),
        (x.mT.contiguous().mT, y, mask),  # these are copied
    ]
    for view in views:
        check(*view)


def test_offsets_do_not_end_at_two_to_the_31():
    """Memory between the rows is never touched."""
    apart = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 2, 8), (2**30, 8, 1))
    x, y, mask = given(3, 2, 8, torch.bfloat16)
    check(apart.copy_(x), y, mask)


def test_long_sums():
    """Many tokens, of which a few matter little: fp32 in one place would lose them."""
    x, y, mask = given(B=2, T=4099, D=200)
    x[0] *= 1e-2
    y[0] *= 1e-2
    x[1, :3] += 100
    check(x, y, mask)


def test_two_runs_agree_bit_for_bit():
    x, y, mask = given(T=100, D=70)
    one, other = found(x, y, mask), found(x, y, mask)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients_lie_side_by_side():
    """Those of several layers are elements of one tensor, wherever in memory."""
    layers = [given(T=4, D=width) for width in (8, 8, 16, 24, 40)]
    outputs = [x.requires_grad_() for x, _, _ in layers]
    weights = torch.arange(1.0, 6.0, device=DEVICE)
    errors = torch.stack([squared_error.squared_error(*layer) for layer in layers])
    for weight, grad, (x, y, mask) in zip(
        weights, torch.autograd.grad((errors * weights).sum(), outputs), layers, strict=True
    ):
        wanted = 2 * weight * (x - y).masked_fill(~mask[..., None], 0)
        assert (grad - wanted).norm() <= 1e-6 * wanted.norm()


def test_only_a_difference_is_kept_and_only_for_a_gradient(monkeypatch):
    x, y, mask = given(output=torch.bfloat16, target=torch.float32)
    made = []
    original = squared_error.plan_error
    monkeypatch.setattr(squared_error, "plan_error", lambda *a: made.append(original(*a)) or made[-1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):
        error = squared_error.squared_error(x.requires_grad_(), y, mask)
    assert [(z.shape, z.dtype) for z in kept] == [(x.shape, x.dtype)]
    with torch.no_grad():
        same = squared_error.squared_error(x, y, mask)
    also = squared_error.squared_error(x.detach(), y.requires_grad_(), mask)
    assert not same.requires_grad and not also.requires_grad and same == also
    assert abs(error - same) <= 1e-6 * same  # by another variant of the kernel, which ptxas may contract otherwise
    assert [difference.numel() for _, (_, difference) in made] == [x.numel(), 0, 0]


class Operations(TorchDispatchMode):
    """Notes what is dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **kwargs or {})


def test_a_backward_is_one_operation():
    """No zeros are made for the gradient of the difference."""
    x, y, mask = given()
    error, weight = squared_error.squared_error(x.requires_grad_(), y, mask), torch.ones((), device=DEVICE)
    with Operations() as operations:
        torch.autograd.grad(error, x, weight)
    ours = torch.ops.rwkvinside.squared_error_triton_backward.default
    assert [f for f in operations.seen if f != torch.ops.aten.detach.default] == [ours]


def test_nothing_to_compare():
    x, y, mask = given()
    for part in (slice(0), slice(3, None)):
        error, grad = found(x[part], y[part], mask[part])
        assert error == 0 and grad.shape == (0, 7, 24)


@pytest.mark.parametrize("masked", [False, True])
def test_the_op_says_what_it_does(masked):
    x, y, mask = given(output=torch.bfloat16)
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    for keep in (True, False):
        args = x.requires_grad_(keep), y, mask if masked else None, keep
        torch.library.opcheck(squared_error._error, args, test_utils=checks)
    difference, dvalue = x.detach(), torch.ones((), device=DEVICE)
    torch.library.opcheck(squared_error._error_backward, (difference, dvalue), test_utils=checks[:2])


@pytest.mark.parametrize("wrong", ["shape", "dtype", "mask"])
def test_the_op_refuses_what_does_not_fit(wrong):
    x, y, mask = given()
    changed = {"shape": (x, y[:, :3], mask), "dtype": (x, y.double(), mask), "mask": (x, y, mask.float())}
    with pytest.raises(ValueError, match={"shape": "expected", "dtype": "float64", "mask": "mask"}[wrong]):
        squared_error.squared_error(*changed[wrong])


@pytest.mark.parametrize("backend", ["auto", "chunked", "triton"])
def test_who_computes_an_error(backend, monkeypatch):
    launched = []
    original = squared_error.squared_error
    monkeypatch.setattr(squared_error, "squared_error", lambda *a: launched.append(a) or original(*a))
    x, y, mask = given(output=torch.bfloat16)
    error = layer_error.squared_error(x, y, mask, backend)
    assert error.item() == pytest.approx(original(x, y, mask).item(), rel=1e-6)
    by_kernel = backend == "triton" or backend == "auto" and DEVICE == "cuda"
    assert len(launched) == by_kernel
    exact = layer_error.squared_error(x.double(), y, mask, backend)
    assert exact.dtype == torch.float64 and len(launched) == by_kernel


@pytest.mark.parametrize("what", [None, "recurrence", "mixers"])
def test_a_step_of_align_with_rows_that_end_early(what):
    """Loss, layers, and gradients of the mixers: next to those of PyTorch code throughout."""
    results = []
    for backend in ("chunked", "triton"):
        student = HybridModel.from_teacher(teacher(layers=2), StudentConfig(backend=backend)).to(DEVICE)
        student.set_trainable(["mixer"])
        student.recompute(what)
        batch = packed([9, 5], rows=2)
        batch.segment_ids[1, 11:] = 0
        batch = batch.to(DEVICE)
        assert not batch.mask.all()
        loss, metrics = AlignStep(teacher_norms(student, [batch])[0])(student, batch)
        trained = [p for p in student.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        results.append((loss, metrics["layers"], torch.cat([g.flatten() for g in grads if g is not None])))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()
