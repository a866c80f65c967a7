"""The fused step of a time mixer against the mixer's own PyTorch path in float64. Not collected by name:
test_decode.py runs this file in a separate process."""

import copy

import pytest
import torch
import triton
from cases import pairwise
from generation_cases import LAYOUTS, VOCAB, build
from recorded_graph import Capture, RecordedGraph

from rwkvinside import kernels
from rwkvinside.kernels.gpu.low_rank import MAX_ROWS, low_rank
from rwkvinside.kernels.gpu.mixer_step import LARGEST_NORMED, mixer_step
from rwkvinside.kernels.gpu.shift_step import COLUMNS, shift_step
from rwkvinside.kernels.gpu.window_step import window_step
from rwkvinside.modeling import graphed_decoding
from rwkvinside.modeling import mixer_step as mixer_step_door
from rwkvinside.modeling.first_layer import FirstLayerKV
from rwkvinside.modeling.mixer_init import init_mixer
from rwkvinside.modeling.mixer_presets import TimeMixerConfig
from rwkvinside.modeling.time_mixer import MixerState, TimeMixer

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
D, B, T = 24, 2, 2
WINDOWED = {"window": 5, "sinks": 2, "window_mix": "softmax"}
PRESETS = ("cxa079", "hxa07a", "hxa07b", "hxa07c", "cxa078", "cxa076r", "rad", "arwkv7", "x070")


@pytest.fixture
def launched(monkeypatch):
    """Calls of the fused kernel: a test of it must not be one of the path it is compared with."""
    calls = []
    run = kernels.mixer_step
    monkeypatch.setattr(kernels, "mixer_step", lambda **inputs: calls.append(inputs) or run(**inputs))
    return calls


def make(preset, is_first=False, heads=4, kv_heads=2, N=16, qk_norm=True, dtype=torch.float32, **window):
    """A mixer that runs the kernel and the same numbers in one that runs in float64 on the CPU."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=D, num_heads=heads, num_kv_heads=kv_heads, head_size=N) | window
    config = TimeMixerConfig.from_preset(preset, qk_norm=qk_norm, qkv_bias=True, backend="triton", **sizes)
    mixer = TimeMixer(config, is_first)
    init_mixer(mixer, 1, 3, "published")
    with torch.no_grad():  # every path active: nothing at its neutral start
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    mixer = mixer.to(DEVICE, dtype)
    slow = copy.deepcopy(mixer).cpu().double()
    slow.mixer_config = config.replace(backend="reference")
    return mixer, slow


def inputs(mixer, batch=B, rows_of_rotation=1, tokens=T):
    """x, what the first layer handed on, cos and sin, and a state."""
    c, like = mixer.mixer_config, mixer.w1
    random = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(DEVICE, like.dtype)

    heads = c.num_heads if c.value_path == "residual_full" else c.num_kv_heads
    first = None
    if not mixer.is_first:
        k = normal(batch, tokens, c.num_kv_heads, c.head_size) if c.key_residual else None
        first = FirstLayerKV(normal(batch, tokens, heads, c.head_size), k)
    angle = normal(rows_of_rotation, tokens, c.head_size // 2).repeat(1, 1, 2)
    wkv = normal(batch, c.num_heads, c.head_size, c.head_size).float()
    state = MixerState(wkv, normal(batch, D) if c.token_shift else None)
    return normal(batch, tokens, D), first, (angle.cos(), angle.sin()), state


def at(first, t):
    return None if first is None else FirstLayerKV(*(None if x is None else x[:, t : t + 1] for x in first))


def run(mixer, x, first, rope, state, mask=None):
    """Token by token: outputs (B, T, D), what is handed on (B, T, heads, N), and the final state."""
    ys, firsts = [], []
    with torch.no_grad():
        for t in range(x.shape[1]):
            now = slice(t, t + 1)
            token = dict(first=at(first, t), state=state, rope=tuple(part[:, now] for part in rope))
            token["mask"] = None if mask is None else mask[:, now]
            y, handed_on, state = mixer(x[:, now], inplace=True, **token)
            ys.append(y)
            firsts.append(handed_on)
    handed_on = FirstLayerKV(*(None if x[0] is None else torch.cat(x, 1) for x in zip(*firsts, strict=True)))
    return torch.cat(ys, 1), handed_on, state


def double(*values):
    """The same in float64 on the CPU; tuples stay what they are."""
    return [
        None if x is None else x.double().cpu() if isinstance(x, torch.Tensor) else type(x)(*double(*x))
        if hasattr(x, "_fields") else tuple(double(*x)) for x in values
    ]  # fmt: skip


def error(value, expected):
    value, expected = value.double().cpu(), expected.double().cpu()
    return float((value - expected).norm() / expected.norm())


def compare(fast, slow, arguments, mask=None, tolerance=1e-6):
    expected = run(slow, *double(*arguments), None if mask is None else mask.cpu())
    found = run(fast, *arguments, mask)
    real = slice(None) if mask is None else mask.cpu()
    assert error(found[0].cpu()[real], expected[0][real]) < tolerance
    for value, correct in zip(found[2].tensors(), expected[2].tensors(), strict=True):
        assert error(value, correct) < tolerance
    for value, correct in zip(found[1], expected[1], strict=True):
        assert (value is None) == (correct is None)
        if value is not None:
            assert value.shape == correct.shape and error(value, correct) < tolerance
    return found


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, is_first, launched):
    fast, slow = make(preset, is_first)
    compare(fast, slow, inputs(fast))
    assert len(launched) == T


@pytest.mark.parametrize(
    "preset, N", [*(("cxa079", N) for N in (8, 40, 64, 128, 256)), ("x070", 40), ("x070", 64), ("x070", 128)]
)
def test_head_sizes(preset, N, launched):
    fast, slow = make(preset, heads=2, kv_heads=1, N=N)
    compare(fast, slow, inputs(fast, batch=2))
    assert len(launched) == T


@pytest.mark.parametrize("token_shift, group_norm", [(True, False), (False, True)])
def test_parts_of_stock_rwkv_7(token_shift, group_norm, launched):
    """With another preset's key scale, norms and rotation, and with a factor of the output."""
    fast, slow = make("cxa079", token_shift=token_shift, group_norm=group_norm, output_scale=0.5)
    compare(fast, slow, inputs(fast))
    assert len(launched) == T


def test_a_head_whose_state_no_program_holds_is_normed_by_pytorch_code(launched):
    assert mixer_step_door.LARGEST_NORMED == LARGEST_NORMED == 128
    fast, slow = make("x070", heads=1, kv_heads=1, N=136)
    compare(fast, slow, inputs(fast))
    assert not launched
    x = torch.empty(1, 1, 136, device=DEVICE)
    with pytest.raises(ValueError, match="at most 128"):
        mixer_step(*[x] * 9, ln_weight=x, ln_bias=x)


@pytest.mark.parametrize("norm_over, rotated", [("heads", 16), ("head", 12)])
def test_norms_over_all_heads_and_rotations_of_a_part(norm_over, rotated, launched):
    fast, slow = make("cxa079", norm_over=norm_over)
    x, first, (cos, sin), state = inputs(fast)
    angle = torch.arange(T * rotated // 2).view(1, T, -1).repeat(1, 1, 2).to(cos)
    compare(fast, slow, (x, first, (angle.cos(), angle.sin()), state))
    assert len(launched) == T


@pytest.mark.parametrize(
    "preset, heads, is_first", pairwise(["cxa079", "cxa078", "hxa07b"], [(3, 3), (6, 1), (6, 3)], [True, False])
)
def test_shared_heads(preset, heads, is_first):
    fast, slow = make(preset, is_first, *heads, N=8, qk_norm=False)
    compare(fast, slow, inputs(fast))


@pytest.mark.parametrize("preset", ["cxa079", "hxa07b", "x070"])
def test_batches_of_which_the_low_rank_maps_are_whole_products(preset, launched):
    fast, slow = make(preset, heads=2, N=8)
    compare(fast, slow, inputs(fast, batch=MAX_ROWS + 1))
    assert len(launched) == T


def test_every_row_has_its_own_rotation():
    fast, slow = make("cxa079", is_first=True)
    compare(fast, slow, inputs(fast, rows_of_rotation=B))


@pytest.mark.parametrize("preset", ["cxa079", "x070"])
def test_the_first_token_starts_from_zeros(preset, launched):
    fast, slow = make(preset)
    x, first, rope, _ = inputs(fast)
    compare(fast, slow, (x, first, rope, None))
    assert len(launched) == T


@pytest.mark.parametrize("preset", ["cxa079", "x070"])
def test_a_masked_row_keeps_its_state_bit_for_bit_whatever_its_inputs(preset):
    fast, slow = make(preset)
    arguments = inputs(fast, batch=3, tokens=3)
    mask = torch.tensor([[True, True, True], [False, True, True], [False, False, False]], device=DEVICE)
    before = arguments[3].map(torch.clone)
    _, _, state = compare(fast, slow, arguments, mask)
    assert all(torch.equal(part[2], kept[2]) for part, kept in zip(state.tensors(), before.tensors(), strict=True))
    arguments[0][~mask] = float("nan")
    y, _, again = run(fast, *arguments[:3], before.map(torch.clone), mask)
    assert all(torch.equal(part, same) for part, same in zip(again.tensors(), state.tensors(), strict=True))
    assert torch.isfinite(y[mask]).all()


@pytest.fixture
def attended(monkeypatch):
    """Calls of the window's kernel."""
    calls = []
    run = kernels.window_step
    monkeypatch.setattr(kernels, "window_step", lambda *inputs: calls.append(inputs) or run(*inputs))
    return calls


def windowed(mixer, tokens, mask=None, state=None, inplace=True):
    """Outputs of `tokens` steps, and the state, from the same random inputs for every mixer."""
    c, like = mixer.mixer_config, mixer.w1
    random = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(like)

    x, angle = normal(B, tokens, D), normal(1, tokens, c.head_size // 2).repeat(1, 1, 2)
    heads = c.num_heads if c.value_path == "residual_full" else c.num_kv_heads
    keys = normal(B, tokens, c.num_kv_heads, c.head_size)
    first = FirstLayerKV(normal(B, tokens, heads, c.head_size), keys if c.key_residual else None)
    outputs = []
    with torch.no_grad():
        for t in range(tokens):
            now = slice(t, t + 1)
            token = dict(first=None if mixer.is_first else at(first, t), state=state, inplace=inplace)
            token |= dict(rope=(angle[:, now].cos(), angle[:, now].sin()), mask=None if mask is None else mask[:, now])
            y, _, state = mixer(x[:, now], **token)
            outputs.append(y)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize(
    "preset, is_first, window, sinks, window_mix",
    [
        *(("cxa079", True, 5, 2, "sum"), ("cxa079", False, 3, 0, "sum"), ("cxa079", False, 70, 3, "softmax")),
        *(("cxa079", True, 5, 2, "softmax"), ("cxa079", False, 5, 2, "softmax"), ("cxa079", True, 1, 0, "softmax")),
        *(("hxa07b", True, 70, 3, "sum"), ("hxa07b", False, 5, 2, "sum"), ("hxa07b", False, 1, 0, "softmax")),
        *(("cxa078", True, 3, 0, "softmax"), ("cxa078", False, 5, 2, "softmax"), ("cxa078", False, 70, 3, "sum")),
        *(("arwkv7", True, 3, 0, "sum"), ("x070", False, 5, 2, "softmax")),
    ],
)
def test_windows(window_mix, window, sinks, preset, is_first, launched, attended):
    """Longer than the window, which is shorter and longer than what a program holds at a time."""
    fast, slow = make(preset, is_first, window=window, sinks=sinks, window_mix=window_mix)
    tokens = min(window, 5) + sinks + 2
    found, state = windowed(fast, tokens)
    expected, wanted = windowed(slow, tokens)
    assert len(launched) == len(attended) == tokens
    assert error(found, expected) < 1e-6
    for value, correct in zip(state.tensors(), wanted.tensors(), strict=True):
        assert error(value, correct) < 1e-6
    assert torch.equal(state.window.seen.cpu(), torch.full((B,), tokens))


@pytest.mark.parametrize("heads, kv_heads, N", [(3, 3, 40), (6, 1, 8), (2, 1, 128)])
def test_windows_of_other_heads(heads, kv_heads, N):
    fast, slow = make(
        "cxa079", heads=heads, kv_heads=kv_heads, N=N, qk_norm=False, window=4, sinks=1, window_mix="softmax"
    )
    assert error(windowed(fast, 7)[0], windowed(slow, 7)[0]) < 1e-6


def test_a_masked_row_keeps_its_window_bit_for_bit():
    fast, slow = make("cxa079", window=4, sinks=1, window_mix="softmax")
    mask = torch.rand(B, 14, generator=torch.Generator().manual_seed(5)).gt(0.4)
    mask[0, :3] = False
    found, state = windowed(fast, 14, mask.to(DEVICE))
    expected, wanted = windowed(slow, 14, mask)
    assert error(found.cpu()[mask], expected[mask]) < 1e-6 and not found.cpu()[~mask].abs().gt(1e4).any()
    for value, correct in zip(state.tensors(), wanted.tensors(), strict=True):
        assert error(value, correct) < 1e-6
    assert torch.equal(state.window.seen.cpu(), mask.sum(1))
    before = state.map(torch.clone)
    none = torch.zeros(B, 2, dtype=torch.bool, device=DEVICE)
    _, after = windowed(fast, 2, none, before)
    for value, kept in zip(after.tensors(), state.tensors(), strict=True):
        assert torch.equal(value, kept)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_window_is_updated_in_place_only_when_asked(inplace):
    fast, _ = make("hxa07a", window=4, sinks=1)
    _, state = windowed(fast, 6)
    before = [x.clone() for x in state.tensors()]
    _, after = windowed(fast, 1, state=state, inplace=inplace)
    for old, kept, new in zip(before, state.tensors(), after.tensors(), strict=True):
        assert (kept.data_ptr() == new.data_ptr()) == inplace and torch.equal(old, kept) != inplace


def test_a_window_in_bf16_loses_no_more_than_its_inputs():
    fast, slow = make("cxa079", dtype=torch.bfloat16, window=5, sinks=2, window_mix="softmax")
    found, state = windowed(fast, 9)
    assert error(found, windowed(slow, 9)[0]) < 2e-2 and state.window.k.dtype == torch.bfloat16


def window_arguments(**changes):
    random = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(DEVICE)

    values = dict(q=normal(2, 4, 16), k=normal(2, 2, 16), v=normal(2, 2, 16), y=normal(2, 64))
    values |= dict(held_k=normal(2, 2, 6, 16), held_v=normal(2, 2, 6, 16), seen=torch.tensor([9, 0], device=DEVICE))
    values |= dict(mix_recurrence=normal(4, 16), mix_window=normal(4, 16), sinks=2)
    return values | dict(mask=torch.tensor([True, False], device=DEVICE)) | changes


def test_the_windows_op_is_registered_as_torch_wants_it():
    torch.library.opcheck(window_step, (), window_arguments(), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.empty(2, 4, 12)}, "multiple of 8"),
        ({"k": torch.empty(2, 3, 16)}, "must divide the 4"),
        ({"y": torch.empty(2, 64, dtype=torch.float64)}, "not float64"),
        ({"held_k": torch.empty(2, 6, 2, 16).transpose(1, 2)}, "must be contiguous"),
        ({"held_v": torch.empty(2, 2, 5, 16)}, "held_v has shape"),
        ({"seen": torch.empty(2)}, "of int64"),
        ({"mask": torch.empty(2)}, "of bool"),
        ({"sinks": 6}, "leave none of the 6 slots"),
        ({"far_bias": torch.empty(4)}, "1 of them are given, give all or none"),
    ],
)
def test_window_refusals(change, message):
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        window_step(**window_arguments(**change))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("preset", ["hxa07a", "x070"])
def test_the_state_is_updated_in_place_only_when_asked(preset, inplace):
    fast, _ = make(preset)
    x, first, rope, state = inputs(fast)
    before = state.map(torch.clone)
    token = dict(first=at(first, 0), state=state, rope=tuple(part[:, :1] for part in rope))
    with torch.no_grad():
        _, _, after = fast(x[:, :1], inplace=inplace, **token)
    for old, kept, new in zip(before.tensors(), state.tensors(), after.tensors(), strict=True):
        assert (kept.data_ptr() == new.data_ptr()) == inplace and torch.equal(old, kept) != inplace


@pytest.mark.parametrize("preset", ["cxa079", "x070"])
def test_bf16_loses_no_more_than_its_inputs(preset):
    """The state stays within the rounding of bf16 projections (2^-9 each, a dozen of them), and so does the output."""
    fast, slow = make(preset, dtype=torch.bfloat16)
    compare(fast, slow, inputs(fast), tolerance=2e-2)


def test_gradients_take_the_path_that_has_them(launched):
    fast, _ = make("cxa079")
    x, first, rope, state = inputs(fast)
    token = dict(first=at(first, 0), state=state, rope=tuple(part[:, :1] for part in rope))
    y, _, _ = fast(x[:, :1], **token)
    y.sum().backward()
    assert fast.w0.grad.abs().sum() > 0 and not launched


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows", [1, MAX_ROWS])
def test_low_rank_maps(rows, dtype, tolerance):
    """Sizes on both sides of a tile's; the tolerance of bf16 is the rounding of the result."""
    random = torch.Generator().manual_seed(3)
    sizes = {"tanh": (96, 200), "none": (5, 64), "sigmoid": (130, 3)}
    x = torch.randn(rows, 600, generator=random).to(DEVICE, dtype)
    downs = [(torch.randn(600, rank, generator=random) / 24).to(DEVICE, dtype) for rank, _ in sizes.values()]
    ups = [torch.randn(*size, generator=random).to(DEVICE, dtype) for size in sizes.values()]
    for y, down, up, kind in zip(low_rank(x, downs, ups, list(sizes)), downs, ups, sizes, strict=True):
        hidden = x.double().cpu() @ down.double().cpu()
        hidden = hidden if kind == "none" else getattr(torch, kind)(hidden)
        assert y.dtype == dtype and error(y, hidden @ up.double().cpu()) < tolerance


@pytest.mark.parametrize(
    "rows, down, up, kind",
    [(MAX_ROWS + 1, (8, 4), (4, 8), "none"), (1, (9, 4), (4, 8), "none"), (1, (8, 4), (5, 8), "none"),
     (1, (8, 4), (4, 8), "relu")],
)  # fmt: skip
def test_low_rank_maps_that_do_not_fit_are_refused(rows, down, up, kind):
    with pytest.raises(ValueError, match="has shape|a map has"):
        low_rank(torch.empty(rows, 8), [torch.empty(*down)], [torch.empty(*up)], [kind])


def test_inputs_of_low_rank_maps_that_do_not_agree_are_refused():
    xs, down, up = [torch.empty(1, 8), torch.empty(2, 8)], torch.empty(8, 4), torch.empty(4, 8)
    with pytest.raises(ValueError, match=r"have shapes \[\(1, 8\), \(2, 8\)\]"):
        low_rank(xs, [down] * 2, [up] * 2, ["none"] * 2)


def arguments(**changes):
    """Of the op itself, all of them given."""
    random = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(DEVICE)

    values = dict(r=normal(2, 4, 16), k=normal(2, 2, 16), v=normal(2, 2, 16))
    values |= {name: normal(2, 64) for name in ("decay", "iclr", "gate")}
    values |= dict(state=normal(2, 4, 16, 16), w0=normal(64), a0=normal(64), r_weight=normal(16), k_weight=normal(16))
    values |= dict(cos=normal(1, 16), sin=normal(1, 16), v_mix=normal(2, 32), v0=normal(32), v_first=normal(2, 2, 16))
    values |= dict(k_mix=normal(2, 32), k0=normal(32), k_first=normal(2, 2, 16), r_k=normal(4, 16))
    values |= {name: normal(64) for name in ("k_k", "k_a", "ln_weight", "ln_bias")}
    values |= dict(mask=torch.tensor([True, False], device=DEVICE), k_out=normal(2, 2, 16), r_out=normal(2, 4, 16))
    return values | changes


def test_the_op_is_registered_as_torch_wants_it():
    torch.library.opcheck(mixer_step, (), arguments(), test_utils=("test_schema", "test_faketensor"))


def test_an_empty_batch():
    empty = {n: x[:0] for n, x in arguments().items() if x.dim() > 1 and n not in ("cos", "sin", "r_k")}
    assert mixer_step(**arguments(**empty, mask=None)).shape == (0, 64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": torch.empty(2, 4, 12)}, "multiple of 8"),
        ({"k": torch.empty(2, 3, 16)}, "must divide the 4"),
        ({"v": torch.empty(2, 4, 16)}, "v has shape"),
        ({"gate": torch.empty(2, 64, dtype=torch.float64)}, "not float64"),
        ({"v0": None}, "come together"),
        ({"k_first": None}, "come together"),
        ({"sin": None}, "come together"),
        ({"k_a": None}, "k_k and k_a come together"),
        ({"ln_bias": None}, "ln_weight and ln_bias come together"),
        ({"ln_weight": torch.empty(4)}, "ln_weight has shape"),
        ({"cos": torch.empty(3, 16)}, "cos has shape"),
        ({"v_first": torch.empty(2, 3, 16)}, "v_first 3"),
        ({"w0": torch.empty(63)}, "w0 has shape"),
        ({"state": torch.empty(2, 4, 16, 16, dtype=torch.bfloat16)}, "float32, contiguous"),
        ({"k_out": torch.empty(2, 4, 16)}, "k_out has shape"),
        ({"r_out": torch.empty(2, 2, 16)}, "r_out has shape"),
        ({"mask": torch.empty(2)}, "of bool"),
    ],
)
def test_refusals(change, message):
    change = {name: None if x is None else x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        mixer_step(**arguments(**change))


def shift_arguments(**changes):
    random = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(DEVICE)

    width = COLUMNS + 20
    values = dict(x=normal(3, width), last=normal(3, width), mixes=[normal(1, 1, width) for _ in range(6)])
    return values | dict(mask=torch.tensor([True, False, True], device=DEVICE)) | changes


@pytest.mark.parametrize("masked", [True, False])
def test_the_token_shift_of_more_columns_than_a_program_has(masked):
    given = shift_arguments(**({} if masked else {"mask": None}))
    x, last, mixes, mask = given.values()
    before, real = last.clone(), slice(None) if mask is None else mask
    now = x if mask is None else x * mask[:, None]
    wanted = torch.stack([now + (before - now) * mix.flatten() for mix in mixes])
    assert error(shift_step(**given), wanted) < 1e-6
    before[real] = x[real]
    assert torch.equal(last, before)


def test_the_shifts_op_is_registered_as_torch_wants_it():
    torch.library.opcheck(shift_step, (), shift_arguments(), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"last": torch.empty(2, COLUMNS + 20)}, r"last \(2, "),
        ({"mixes": [torch.empty(4)]}, r"mixes have \[4\] numbers"),
        ({"x": torch.empty(3, COLUMNS + 20, dtype=torch.float64)}, "float64"),
        ({"mask": torch.empty(3)}, "of bool"),
    ],
)
def test_shifts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        shift_step(**shift_arguments(**change))


@pytest.mark.parametrize(
    "preset, layout, window",
    [
        *(("cxa079", layout, window) for layout in ("all-rwkv", "mixed") for window in ({}, WINDOWED)),
        ("x070", "mixed", {}),
    ],
)
def test_generation_by_a_graph_gives_the_tokens_of_the_slow_path(
    preset, layout, window, launched, attended, monkeypatch
):
    """A real graph on a GPU; on a CPU a recorded one. The prompt is left-padded."""
    if DEVICE == "cpu":
        monkeypatch.setattr(graphed_decoding, "can_capture", lambda device: True)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the operator, which `Capture` sees
    slow = build("qwen3", LAYOUTS[layout], preset, mixer={"backend": "reference"} | window)
    fast = build("qwen3", LAYOUTS[layout], preset, mixer={"backend": "triton"} | window).to(DEVICE, torch.float32)
    prompt = torch.randint(2, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    expected = slow.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False)
    assert expected[:, 6:].unique().numel() > 3, "a model that repeats one token would pass anything"
    before = len(launched)
    tokens = fast.generate_graphed(prompt.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=9, do_sample=False)
    assert torch.equal(tokens.cpu(), expected)
    python_steps = graphed_decoding.WARM_STEPS + 1
    assert len(launched) - before == python_steps * len(LAYOUTS[layout])
    assert len(attended) == (python_steps * len(LAYOUTS[layout]) if window else 0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_graph_and_large_offsets():
    """More than 2^31 elements of state, and replay of a CUDA graph, as decoding does it."""
    batch, heads, N = 512, 68, 256
    fast, _ = make("cxa079", heads=heads, kv_heads=heads, N=N, dtype=torch.bfloat16)
    x, first, rope, _ = inputs(fast, batch=1)
    x, first = x.expand(batch, -1, -1), FirstLayerKV(*(part.expand(batch, -1, -1, -1) for part in first))
    wkv = torch.zeros(batch, heads, N, N, device=DEVICE)
    expected, _, _ = run(fast, x[:, :1], first, rope, MixerState(wkv.clone()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _, _ = run(fast, x[:, :1], first, rope, MixerState(wkv))
    graph.replay()
    torch.testing.assert_close(y, expected)  # not bit by bit: products may be split differently in a graph
    torch.testing.assert_close(wkv[-1], wkv[0])
    assert wkv[0].any()
