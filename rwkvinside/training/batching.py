"""How an optimizer step's rows are cut into micro-batches and shared by ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .schedule import StageLength

MICRO_TOKENS = 4096  # of a micro-batch, unless batch.micro_rows says otherwise or a GPU has room for more (planning)


@dataclass(frozen=True)
class StepShape:
    """How the rows of an optimizer step are cut.

    Attributes:
        rows: of a step, over all ranks.
        micro_rows: of one forward pass.
        ranks: processes that share the rows as evenly as possible.
    """

    rows: int
    micro_rows: int
    ranks: int

    @classmethod
    def of(cls, length: StageLength, micro_rows: int | None, ranks: int) -> StepShape:
        """Return how the steps of a stage are cut.

        Args:
            length: of the stage.
            micro_rows: rows that run at a time; None: about `MICRO_TOKENS`.
            ranks: processes that share the rows.
        """
        share = -(-length.rows_per_step // ranks)
        return cls(length.rows_per_step, min(share, micro_rows or rows_within(MICRO_TOKENS, length.seq_len)), ranks)

    @property
    def micro_batches(self) -> int:
        """Forward passes of a step, the same on every rank."""
        return math.ceil(math.ceil(self.rows / self.ranks) / self.micro_rows)


def rows_within(tokens: int, seq_len: int) -> int:
    """Return the whole rows that fit into so many tokens, at least one."""
    return max(1, tokens // seq_len)
