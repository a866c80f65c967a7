"""The length of a stage, when it ends before that, and the learning rate of each step.

Pure arithmetic on tokens, steps and scores, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ..errors import UserError
from .metrics import Score
from .settings import EarlyStopConfig


@dataclass(frozen=True)
class StageLength:
    """A stage's length, cut into optimizer steps of whole rows.

    Attributes:
        total_tokens: what the stage may consume; the last step is a full one, so up to one step more is used.
        batch_tokens: tokens of one optimizer step over all ranks and micro-batches, rounded down to whole rows.
        seq_len: tokens of a row. Padding counts: a row is always `seq_len` tokens.

    Raises:
        UserError: a step has no row, or the stage no tokens.
    """

    total_tokens: int
    batch_tokens: int
    seq_len: int

    def __post_init__(self) -> None:
        if min(self.total_tokens, self.seq_len) < 1:
            raise UserError(f"tokens={self.total_tokens}, seq_len={self.seq_len}", "both must be at least 1")
        if self.batch_tokens < self.seq_len:
            raise UserError(
                f"batch.tokens={self.batch_tokens} is less than one row of data.seq_len={self.seq_len}",
                "raise batch.tokens or lower data.seq_len",
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all ranks."""
        return self.batch_tokens // self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all ranks."""
        return self.rows_per_step * self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return math.ceil(self.total_tokens / self.tokens_per_step)

    @property
    def tokens_read(self) -> int:
        """Tokens of all steps; the last one is a full step."""
        return self.steps * self.tokens_per_step

    def steps_for(self, tokens: int) -> int:
        """Return the nearest number of steps, at least 1, that consume `tokens`."""
        return max(1, round(tokens / self.tokens_per_step))


@dataclass(frozen=True)
class EarlyEnd:
    """Where and why a stage ended before its last step.

    Attributes:
        step, steps: those done, and those that the stage was to have.
        best: the evaluation that later ones did not improve on.
        patience, min_delta: see `EarlyStopConfig`.
    """

    step: int
    steps: int
    best: Score | None
    patience: int
    min_delta: float

    @property
    def reason(self) -> str:
        """Why, in words."""
        once = "the last evaluation" if self.patience == 1 else f"{self.patience} evaluations"
        by = f" by {self.min_delta:g}" if self.min_delta else ""
        if self.best is None:
            return f"no number to compare in {once}"
        best = f"best {self.best.value:.4g} at step {self.best.step}"
        return f"validation {self.best.measure.upper()} has not improved{by} in {once}; {best}"


class EarlyStop:
    """Counts evaluations in a row that are no improvement on the best one before them.

    Slow progress adds up: the best one changes only when it is improved on by `min_delta`.

    Args:
        settings: of the stage.

    Attributes:
        best: the evaluation to improve on; None: there was none.
        waited: evaluations since then.
    """

    def __init__(self, settings: EarlyStopConfig):
        self.settings = settings
        self.best: Score | None = None
        self.waited = 0

    @property
    def due(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.settings.patience

    def note(self, score: Score | None) -> None:
        """Count an evaluation.

        Args:
            score: None where it has no finite number, which is no improvement. One that measures something else than
                the best one does takes its place.
        """
        best = self.best
        if score is not None and (
            best is None or not best.comparable(score) or score.value < best.value - self.settings.min_delta
        ):
            self.best, self.waited = score, 0
        else:
            self.waited += 1

    def state(self) -> dict:
        """Return what a checkpoint keeps, as JSON values."""
        return {"best": self.best and asdict(self.best), "waited": self.waited}

    def restore(self, state: Mapping) -> None:
        """Go on counting from a checkpoint."""
        self.best, self.waited = Score(**state["best"]) if state["best"] else None, state["waited"]

    def end(self, step: int, steps: int) -> EarlyEnd:
        """Return the end of a stage after so many of its steps."""
        return EarlyEnd(step, steps, self.best, self.settings.patience, self.settings.min_delta)


@dataclass(frozen=True)
class Schedule:
    """Learning rates by step.

    Linear warm-up in steps, constant, decay between two fractions of the tokens, flat.

    Attributes:
        peak: learning rate per group.
        final: value per group that the decay ends at; a group that is not named here stays at its peak.
        first: steps done when a group began to train, 0 where not named: each has its own warm-up.
        warmup_steps: the n-th step of these has n / warmup_steps of the rate.
        shape: "cosine" or "linear".
        start, end: fractions of the stage's tokens between which the rate moves from peak to final. Counted where a
            step begins; where start equals end the rate drops at once.
    """

    peak: Mapping[str, float]
    final: Mapping[str, float]
    first: Mapping[str, int] = field(default_factory=dict)
    warmup_steps: int = 0
    shape: str = "cosine"
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in ("cosine", "linear"):
            raise UserError(f"optim.decay.shape={self.shape!r}", "allowed: cosine, linear")
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(
                f"optim.decay from start={self.start} to end={self.end}", "fractions with 0 <= start <= end <= 1"
            )

    def rates(self, step: int, length: StageLength) -> dict[str, float]:
        """Return the learning rate of every group for update `step`, from 1."""
        seen = (step - 1) * length.tokens_per_step / length.total_tokens
        if seen >= self.end:
            progress = 1.0
        elif seen <= self.start:
            progress = 0.0
        else:
            progress = (seen - self.start) / (self.end - self.start)
        left = 1 - progress if self.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
        rates = {}
        for group, peak in self.peak.items():
            final = self.final.get(group, peak)
            trained = step - self.first.get(group, 0)
            warm = min(1.0, trained / self.warmup_steps) if self.warmup_steps else 1.0
            rates[group] = warm * (final + (peak - final) * left)
        return rates
