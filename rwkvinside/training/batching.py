"""How the rows of an optimizer step are cut into micro-batches and shared by ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..stages.settings import StageConfig


def micro_rows(stage: StageConfig, ranks: int) -> int:
    """Rows of a micro-batch on one rank."""
    share = -(-stage.rows // ranks)
    return min(share, stage.batch.micro_rows or max(1, MICRO_TOKENS // stage.data.seq_len))


def step_shape(stage: StageConfig, ranks: int) -> StepShape:
    """How the rows of a step are cut."""
    return StepShape(stage.rows, micro_rows(stage, ranks), ranks)


MICRO_TOKENS = 4096  # of a micro-batch, unless batch.micro_rows says otherwise


@dataclass(frozen=True)
class StepShape:
    """How the rows of an optimizer step are cut.

    Args:
        rows: of a step, over all ranks.
        micro_rows: of one forward pass.
        ranks: processes that share the rows as evenly as possible.
    """

    rows: int
    micro_rows: int
    ranks: int

    @property
    def micro_batches(self) -> int:
        """Forward passes of a step, the same on every rank."""
        return math.ceil(math.ceil(self.rows / self.ranks) / self.micro_rows)
