"""Where a number first stopped being finite.

That is in the output of a module, or in the gradient of something.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .deepspeed_engine import Engine
from .protocols import AnyBatch, Step


class NaNProbe:
    """Watches a model's outputs and gradients while entered.

    Afterwards `first` is where the trouble began. Values are checked as they are computed, so that modules are named in
    the order of the computation, the innermost first. Costs one pass over every value: for a single micro-batch that is
    known to be bad.

    Attributes:
        places: what can be named, the same list on every process with the same model.
    """

    def __init__(self, model: nn.Module):
        self._modules = list(model.named_modules())
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        outputs = [f"the output of {name}" if name else "the loss" for name, _ in self._modules]
        gradients = [f"the gradient that reaches {name or 'the model'}" for name, _ in self._modules]
        self.places = [*outputs, *gradients, *(f"the gradient of {name}" for name, _ in self._parameters)]
        self._output: int | None = None
        self._gradient: int | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def first(self) -> int | None:
        """Index into `places` of where the trouble began.

        None while all is finite. A bad output counts before a bad gradient.
        """
        return self._gradient if self._output is None else self._output

    def __enter__(self) -> NaNProbe:
        for i, (_, module) in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(lambda *call, i=i: self._see_output(i, call[-1])))
        for i, (_, parameter) in enumerate(self._parameters, 2 * len(self._modules)):
            self._handles.append(parameter.register_hook(lambda gradient, i=i: self._see_gradient(i, gradient)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see_output(self, i: int, output: Any) -> None:
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.is_floating_point():
                if self._output is None and not value.isfinite().all():
                    self._output = i
                if value.requires_grad:
                    index = len(self._modules) + i
                    value.register_hook(lambda gradient, index=index: self._see_gradient(index, gradient))

    def _see_gradient(self, i: int, gradient: Tensor) -> None:
        if self._gradient is None and not gradient.isfinite().all():
            self._gradient = i


def find_nonfinite(
    engine: Engine, batches: Sequence[AnyBatch], step: Step[AnyBatch]
) -> tuple[str | None, AnyBatch | None]:
    """Run the micro-batches of a bad step again, up to the first bad one.

    That is the first in which some rank finds something.

    Returns:
        Where it begins (on the first rank that has found something), and the micro-batch if this rank has; None where
        the trouble does not show again.
    """
    for batch in batches:
        with NaNProbe(engine.model) as probe:
            engine.backward(batch, step)
        reports = engine.world.gather(0 if probe.first is None else 1 + probe.first)
        if any(reports):
            return probe.places[int(next(filter(None, reports))) - 1], None if probe.first is None else batch
    return None, None
