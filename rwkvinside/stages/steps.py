"""One step per objective: a packed batch in, loss and metric sums out.

The trainer divides by the global count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..hybrid.row_states import RowStates
from ..losses.alignment import alignment_loss
from ..losses.chunked import ChunkedLoss
from ..losses.distillation import DistillationLoss
from ..losses.next_token import NextTokenLoss
from ..losses.router import router_loss
from ..losses.settings import DistillLossConfig
from ..teacher.signals import Teacher
from ..training.protocols import Step


@dataclass
class AlignStep:
    """Each mixer imitates its layer's attention (RADLADS step 1).

    It reads the teacher's own hidden states.

    Attributes:
        norms: {layer: mean squared norm per token of the teacher's attention output}, from `calibration.teacher_norms`.
    """

    norms: dict[int, float]
    _placed: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def count(self, batch: Batch) -> int:
        """Return the tokens of a batch."""
        return batch.num_tokens

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the alignment loss, and by layer under "layers"."""
        errors = model(batch, mode="align", norms=False)
        loss, layers = alignment_loss(errors, self._norms_on(batch.input_ids.device))
        return loss, {"layers": layers}

    def _norms_on(self, device: torch.device) -> Tensor:
        """Return the norms in the order of the layers, copied to a device once: a copy waits for it."""
        if self._placed is None or self._placed.device != device:
            self._placed = torch.tensor([self.norms[i] for i in sorted(self.norms)], device=device)
        return self._placed


@dataclass
class DistillStep:
    """The student's next-token distribution follows the teacher's.

    Cross-entropy on the text may be added.

    Attributes:
        teacher: where the distributions to follow come from.
        config: what is compared, and how.
        layers: modes of the student's layers that differ, see `HybridModel.forward`; None: none do.
    """

    teacher: Teacher
    config: DistillLossConfig = DistillLossConfig()
    layers: Mapping[int, str] | None = None

    def count(self, batch: Batch) -> int:
        """Return the labeled positions of a batch."""
        return batch.num_targets

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the distillation loss and its metrics."""
        signal = self.teacher.signal(model, batch)
        return student_loss(model, batch, DistillationLoss(signal, self.config), self.config.router, self.layers)


@dataclass
class SftStep:
    """Cross-entropy on the labeled positions (completions), no teacher.

    Attributes:
        loss: what the head's logits are compared by.
        router: weight of the balance of experts.
    """

    loss: NextTokenLoss = NextTokenLoss()
    router: float = 0.0

    def count(self, batch: Batch) -> int:
        """Return the labeled positions of a batch."""
        return batch.num_targets

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy."""
        return student_loss(model, batch, self.loss, self.router)


@dataclass
class StatefulStep:
    """A step whose rows begin with the states in which those of the step before have ended.

    No gradient goes back over that border: truncated backpropagation through time, a row long.

    Attributes:
        step: what is computed.
        states: of all streams of this process.
    """

    step: Step[Batch]
    states: RowStates

    def count(self, batch: Batch) -> int:
        """Return the step's count."""
        return self.step.count(batch)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the step's loss and metrics."""
        carried = self.states.enter(batch)
        result = self.step(partial(model, carried=carried), batch)  # type: ignore[arg-type]  # called as the model is
        self.states.leave(batch, carried)
        return result


def student_loss(
    model: nn.Module, batch: Batch, task: ChunkedLoss, router: float, layers: Mapping[int, str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss of the student's logits, and the balance of experts as "router" where it has a weight."""
    if not router:
        return model(batch, mode="student", task=task, layers=layers)
    (loss, metrics), routing = model(batch, mode="student", task=task, layers=layers, routers=True)
    balance = router_loss(routing, batch)
    return loss + router * balance, metrics | {"router": balance.detach()}
