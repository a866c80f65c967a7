"""What one layer of a student costs around its products, counted in Triton's interpreter. Run by test_mixer.py.

Operations are what PyTorch dispatches (an op of ours counts as one); bytes are those of the inputs and outputs of every
operation that is not a view. Tokens are counted as the slope between two lengths, so that weights and their casts, which
many tokens share, drop out.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkvinside.modeling.first_layer import FirstLayerKV
from rwkvinside.modeling.mixer_init import init_mixer
from rwkvinside.modeling.mixer_presets import TimeMixerConfig
from rwkvinside.modeling.time_mixer import TimeMixer

# Qwen3-0.6B
D, H, G, N = 1024, 16, 8, 128
LENGTHS = (32, 64)


class Count(TorchDispatchMode):
    """Counts operations and bytes, views apart."""

    def __init__(self):
        super().__init__()
        self.operations, self.views, self.bytes, self.names = 0, 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in read}
        if function.is_view or written and all(x.untyped_storage().data_ptr() in storages for x in written):
            self.views += 1
            return out
        self.operations += 1
        moved = sum(x.numel() * x.element_size() for x in (*read, *written))
        self.bytes += moved
        self.names.append((str(function), moved))
        return out


def measure(backend, T, is_first=False, qk_norm=True, stream_gradient=False):
    """Return counts forward and backward, and bytes kept between them, of a layer in align with T tokens in bf16."""
    torch.manual_seed(0)
    config = TimeMixerConfig.from_preset(
        "cxa079", qk_norm=qk_norm, hidden_size=D, num_heads=H, num_kv_heads=G, head_size=N, key_scale="decay",
        backend=backend, detach_first=True,
    )  # fmt: skip
    mixer = TimeMixer(config, is_first)
    init_mixer(mixer, 1, 3)
    x = torch.randn(1, T, D, requires_grad=stream_gradient)
    first = FirstLayerKV(*(torch.randn(1, T, G, N, dtype=torch.bfloat16) for _ in range(2)))
    rope = tuple(torch.randn(1, T, N) for _ in range(2))
    kept: dict[int, int] = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    target = torch.randn(1, T, D)
    with Count() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            y, *_ = mixer(x, first=None if is_first else first, rope=rope)
    with Count() as backward:
        y.backward(target.to(y.dtype))
    return forward, backward, sum(kept.values())


def summary(backend, **options):
    """Return operations, views, bytes moved and bytes kept a token."""
    (f1, b1, k1), (f2, b2, k2) = (measure(backend, T, **options) for T in LENGTHS)
    tokens = LENGTHS[1] - LENGTHS[0]
    return {
        "operations": f2.operations + b2.operations,
        "views": f2.views + b2.views,
        "bytes": (f2.bytes + b2.bytes - f1.bytes - b1.bytes) / tokens,
        "kept": (k2 - k1) / tokens,
    }


if __name__ == "__main__":
    for backend in ("chunked", "triton"):
        f, b, kept = measure(backend, 32)
        print(backend, summary(backend))
        if backend == "triton":
            for name, count in (("forward", f), ("backward", b)):
                print(name)
                for line in count.names:
                    print("   ", *line)
