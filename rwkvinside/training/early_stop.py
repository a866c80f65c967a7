"""When a stage ends early: its evaluations on validation data have stopped improving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from .metrics import Score
from .settings import EarlyStopConfig


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
        return f"validation {self.best.measure} has not improved{by} in {once}; {best}"


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
