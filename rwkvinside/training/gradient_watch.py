"""Making sure that adapters learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UserError
from .protocols import AnyBatch, Step


class GradientWatch(Generic[AnyBatch]):
    """A step that makes sure adapters learn.

    After the first micro-batch that counted, every adapter must have had a gradient that is not zero, in the factor
    that starts at zero.

    Args:
        step: see `training.protocols.Step`.
        parameters: those of adapters by name, without factors that have no gradient in the first step.
    """

    def __init__(self, step: Step[AnyBatch], parameters: Mapping[str, nn.Parameter]):
        self.step = step
        self._counted = 0
        self._reached: dict[str, Tensor | None] = {}
        self._hooks: list[RemovableHandle] = []
        for name, parameter in parameters.items():
            self._reached[name] = None
            self._hooks.append(parameter.register_hook(lambda g, name=name: self._note(name, g)))

    def count(self, batch: AnyBatch) -> int:
        """Return the step's count."""
        return self.step.count(batch)

    def __call__(self, model: nn.Module, batch: AnyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the step's loss and metrics; check the adapters once.

        Raises:
            UserError: names an adapter without a gradient.
        """
        if self._hooks:
            if self._counted:
                self._check()
            self._counted += self.count(batch) > 0
        return self.step(model, batch)

    def _note(self, name: str, gradient: Tensor) -> None:
        before = self._reached[name]
        self._reached[name] = gradient.detach().any() if before is None else before | gradient.detach().any()

    def _check(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if dead := sorted(name for name, reached in self._reached.items() if reached is None or not bool(reached)):
            raise UserError(
                f"{len(dead)} of {len(self._reached)} adapters got no gradient in the first step, first {dead[0]}",
                "the objective of this stage does not reach them: train them in another stage, or adapt other layers",
            )
