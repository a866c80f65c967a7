"""A stand-in for a CUDA graph on a CPU: what a capture records is run again on the very same memory.

As on a GPU, a replay runs no Python of the model: numbers, shapes and addresses are those of the capture. Unlike there,
what is captured also runs, so `Capture` undoes it.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_WAITS = (
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"),
    *("masked_select", "_unique2", "unique_dim"),
)
INDEX = ("index", "index_put", "index_put_", "_index_put_impl_")  # by booleans they look for their places first


class RecordedGraph:
    """Takes the place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.calls = []
        self.replays = 0

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, outputs in self.calls:
            for kept, new in zip(outputs, tensors(func(*args, **kwargs)), strict=True):
                if kept is not new:
                    assert kept.shape == new.shape, f"{func} gives other shapes for other values"
                    kept.copy_(new)


class Capture(TorchDispatchMode):
    """Takes the place of `torch.cuda.graph`."""

    def __init__(self, graph, strict=False):
        super().__init__()
        self.graph, self.strict, self.before, self.random = graph, strict, [], torch.get_rng_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in HOST_WAITS, f"{name} waits for the GPU, which a capture forbids"
        given = tensors((args, kwargs))
        made = self.strict and name == "lift_fresh"  # also where an item is set to a number, which is no copy
        assert not made, "a tensor is made of numbers of the host, which a capture cannot copy"
        looks = name in INDEX and any(x.dtype == torch.bool for x in tensors(args[1]))
        assert not looks, f"{name} by booleans waits for the GPU, which a capture forbids"
        written = [
            x for x, a in zip(args, func._schema.arguments, strict=False) if a.alias_info and a.alias_info.is_write
        ]
        written += [
            kwargs[a.name]
            for a in func._schema.arguments
            if a.name in kwargs and a.alias_info and a.alias_info.is_write
        ]
        self.before += [(x, x.clone()) for x in tensors(written)]
        result = func(*args, **kwargs)
        storages = {x.untyped_storage().data_ptr() for x in given}
        outputs = tensors(result)
        is_view = not written and outputs and all(x.untyped_storage().data_ptr() in storages for x in outputs)
        if not is_view:  # a view is an address, which stays
            self.graph.calls.append((func, args, kwargs, outputs))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random)
        for x, content in reversed(self.before):
            x.copy_(content)


class Recorder:
    """Takes the place of `training.cuda_graphs.CudaRecorder`.

    Attributes:
        graphs: that were made.
    """

    required = True

    def __init__(self):
        self.graphs = []

    def warm(self, work):
        return work()

    def record(self, work):
        self.graphs.append(RecordedGraph())
        with Capture(self.graphs[-1], strict=True):
            result = work()
        return self.graphs[-1].replay, result


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
