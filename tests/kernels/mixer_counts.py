"""What one layer of a student costs, counted in Triton's interpreter without a GPU. Run by test_mixer.py, or directly:

    TRITON_INTERPRET=1 python tests/kernels/mixer_counts.py

Operations are what PyTorch dispatches; an op of ours is one. Bytes are those of the inputs and outputs of everything
that is not a view: of PyTorch's operations, those inside the mixer's ops too, and of the mixer's launches; the ops of
the recurrence count with their inputs and outputs, not with what they hand from launch to launch. Per token means the
slope between two lengths: weights and their casts, which many tokens share, drop out. Launches are counted, not run:
what they compute is in mixer_cases.py.
"""

import contextlib
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkvinside.kernels.gpu import mixer as ops
from rwkvinside.kernels.gpu.launch import Launch
from rwkvinside.kernels.gpu.op import plan_forward
from rwkvinside.modeling import time_mixer, window_attention
from rwkvinside.modeling.first_layer import FirstLayerKV
from rwkvinside.modeling.mixer_init import init_mixer
from rwkvinside.modeling.mixer_presets import TimeMixerConfig
from rwkvinside.modeling.time_mixer import TimeMixer

# Qwen3-0.6B
D, H, G, N = 1024, 16, 8, 128
LENGTHS = (32, 64)
WINDOWED = {"window": 64, "sinks": 4, "window_mix": "softmax"}  # the recipe `windowed`
LONGER = (512, 1024)  # several blocks of queries


class Count(TorchDispatchMode):
    """Counts operations and bytes; `lines` says what and how much, with what runs inside ops of ours indented."""

    def __init__(self):
        super().__init__()
        self.operations, self.views, self.bytes, self.lines = 0, 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = tensors((args, kwargs))
        if function.name().startswith("rwkvinside::mixer"):
            self.operations += 1
            self.add(str(function), [])
            with self.inside():
                return function(*args, **kwargs or {})
        out = function(*args, **kwargs or {})
        storages = {x.untyped_storage().data_ptr() for x in read}
        if "empty" in function.name():
            return out
        if all(x.untyped_storage().data_ptr() in storages for x in tensors(out)) and not function._schema.is_mutable:
            self.views += 1
            return out
        self.operations += 1
        self.add(str(function), [*read, *tensors(out)])
        return out

    @contextlib.contextmanager
    def inside(self):
        """Count the bytes of what the mixer's ops run."""

        def run(launches, device):
            for launch in launches:
                self.add(f"  {launch.kernel.__name__}", tensors(list(launch.args.values())))
                self.add("  sums of blocks", tensors([launch.args.get(f"d{name}_") for name in ops.PARAMETERS]))

        def product(low, up, size):
            out = original["_product"](low, up, size)
            self.add("  product", [low, up, out])
            return out

        def factor_gradients(grad, low, up):
            out = original["_factor_gradients"](grad, low, up)
            self.add("  products backward", [grad, up, grad, low, *out])
            return out

        patches = {"run": run, "_product": product, "_factor_gradients": factor_gradients}
        original = {name: getattr(ops, name) for name in patches}
        try:
            for name, patch in patches.items():
                setattr(ops, name, patch)
            yield
        finally:
            for name, function in original.items():
                setattr(ops, name, function)

    def add(self, name, moved):
        size = sum(x.numel() * x.element_size() for x in moved)
        self.bytes += size
        self.lines.append((name, size))


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def layer(T, is_first=False, window=None):
    """A mixer with Qwen3-0.6B's sizes, and the arguments of its forward in align, on T tokens of one row."""
    torch.manual_seed(0)
    config = TimeMixerConfig.from_preset(
        "cxa079", qk_norm=True, hidden_size=D, num_heads=H, num_kv_heads=G, head_size=N, key_scale="decay",
        backend="triton", detach_first=True, **({} if window is None else WINDOWED),
    )  # fmt: skip
    mixer = TimeMixer(config, is_first)
    init_mixer(mixer, 1, 3)
    x = torch.randn(1, T, D)
    first = FirstLayerKV(*(torch.randn(1, T, G, N, dtype=torch.bfloat16) for _ in range(2)))
    rope = tuple(torch.randn(1, T, N) for _ in range(2))
    return mixer, x, {"first": None if is_first else first, "rope": rope, "keep_state": False}


def measure(fused, T, is_first=False, window=None):
    """Count the forward and the backward of a layer in align in bf16, and bytes kept between them.

    The recurrence runs in Triton, what is around it fused or in PyTorch, as is a window (True, False). In align no
    gradient leaves the layer. Parameters are kept anyway and do not count.
    """
    mixer, x, options = layer(T, is_first, window)
    kept: dict[int, int] = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks, autocast = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16)
    fusion = mock.patch.object(time_mixer, "is_fused_sequence", return_value=fused)
    windows = mock.patch.object(window_attention, "_runs_in_triton", return_value=window)
    with mock.patch.object(Launch, "run"), windows:
        with Count() as forward, hooks, autocast, fusion:
            y, *_ = mixer(x, **options)
        dy = torch.randn_like(y)
        with Count() as backward:
            y.backward(dy)
    return forward, backward, sum(kept.values())


def summary(fused, **options):
    """Return operations and views of a layer, and bytes moved and kept for each token."""
    lengths = LENGTHS if options.get("window") is None else LONGER
    (f1, b1, k1), (f2, b2, k2) = (measure(fused, T, **options) for T in lengths)
    tokens = lengths[1] - lengths[0]
    return {
        "operations": f2.operations + b2.operations,
        "views": f2.views + b2.views,
        "bytes": (f2.bytes + b2.bytes - f1.bytes - b1.bytes) / tokens,
        "kept": (k2 - k1) / tokens,
    }


def left_in_memory(window=None, **how):
    """Bytes a token by which memory has grown after a forward, without its result."""

    def grown(T):
        mixer, x, options = layer(T, window=window)
        autocast, fused = torch.autocast("cpu", torch.bfloat16), mock.patch.object(Launch, "run")
        windows = mock.patch.object(window_attention, "_runs_in_triton", return_value=window)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory, autocast, fused, windows:
            y, *_ = mixer(x, **options, **how)
        return sum(event.self_cpu_memory_usage for event in memory.key_averages()) - y.nbytes

    few, many = map(grown, LONGER)
    return (many - few) / (LONGER[1] - LONGER[0])


def recurrence_kept():
    """Return the bytes a token that the recurrence keeps for its backward: inputs; states and rows that b writes."""
    full, shared = (torch.empty(1, 1, heads, N, dtype=torch.bfloat16, device="meta") for heads in (H, G))
    inputs = (full, full.float(), full, shared, shared, full)
    _, (_, _, starts, u) = plan_forward(*inputs, precision="balanced", capability=None)
    length = u.shape[2]
    return sum(x.numel() * x.element_size() for x in inputs), (starts.nbytes + u.nbytes) / length


def test_a_layer_in_align():
    """Limits a little above what was counted when this was written."""
    found = summary(fused=True)
    assert found["operations"] <= 50  # of which 10 are casts that the ops would make 20 of
    assert found["bytes"] <= 500e3
    # in bf16 vectors of the hidden size: what the recurrence itself keeps, and all else
    inputs, states = (kept / (2 * D) for kept in recurrence_kept())
    others = found["kept"] / (2 * D) - inputs - states
    assert (inputs, states) == (12, 18) and others <= 13  # to compute one of them again would leave more than 20


def test_what_is_kept_where_the_recurrence_is_computed_again():
    """In bf16 vectors of the hidden size: x, receptance, key, value, the result, and narrow sides of low-rank maps."""
    for window in (None, True):
        whole, again = (left_in_memory(window=window, recompute=recompute) / (2 * D) for recompute in (False, True))
        assert whole > 40 and again <= 8.5, (whole, again)  # v_first and k_first are of all layers


def token(preset, fused=True, kv_heads=G, is_first=False):
    """Count what a token of one row launches in a layer in bf16: operations of PyTorch, and Triton kernels."""
    torch.manual_seed(0)
    config = TimeMixerConfig.from_preset(
        preset, qk_norm=True, hidden_size=D, num_heads=H, num_kv_heads=kv_heads, head_size=N, backend="triton"
    )
    mixer = TimeMixer(config, is_first).bfloat16()
    x, rope = torch.randn(1, 1, D).bfloat16(), tuple(torch.randn(1, 1, N) for _ in range(2))
    value, key = (torch.randn(1, 1, heads, N).bfloat16() for heads in (H if "full" in config.value_path else G, G))
    options = {"first": None if is_first else FirstLayerKV(value, key), "rope": rope, "inplace": True}
    launches = []
    how = mock.patch.object(time_mixer, "is_fused", return_value=fused)
    with torch.no_grad(), how, mock.patch.object(Launch, "run", lambda launch: launches.append(launch)):
        _, _, state = mixer(x, **options)
        launches.clear()
        with Count() as count:
            mixer(x, state=state, **options)
    return len(launches) + sum(not name.startswith("rwkvinside") for name, _ in count.lines)


def test_a_token():
    """Four products, two launches of low-rank maps, one of all between them; one more for a token shift."""
    assert token("cxa079") == token("arwkv7") == 7
    assert token("x070", kv_heads=H) == token("x070", kv_heads=H, is_first=True) == 8


def test_a_window_in_align():
    found = summary(fused=True, window=True)
    assert found["operations"] <= 60
    assert found["bytes"] <= 0.55e6 and found["kept"] <= 94e3


if __name__ == "__main__":
    for is_first in (True, False):
        for fused in (False, True):
            counts = summary(fused, is_first=is_first)
            print("first layer," if is_first else "later layer,", "fused" if fused else "PyTorch", counts)
    for window in (False, True):
        print("later layer, fused, window", "fused" if window else "PyTorch", summary(True, window=window))
    for name, count in zip(("forward", "backward"), measure(True, 1024, window=True), strict=False):
        print(name, *(f"    {line:60} {moved:10}" for line, moved in count.lines), sep="\n")
    print("kept by the recurrence:", recurrence_kept())
    for preset, kv_heads in (("cxa079", G), ("arwkv7", G), ("x070", H)):
        counts = {fused: token(preset, fused, kv_heads) for fused in (False, True)}
        print("a token,", preset, "in PyTorch around the recurrence and fused:", *counts.values())
    for window in (None, True):
        kept = [left_in_memory(window=window, recompute=recompute) for recompute in (False, True)]
        print("left in memory, recurrence kept and computed again, window", window, kept)
