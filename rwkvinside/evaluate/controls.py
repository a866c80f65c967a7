"""What a student is compared with besides its teacher: the teacher cut to its windows, itself without recurrence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batch import IGNORE, Batch
from ..hybrid.document_attention import Window, cut_to_windows, windows_in
from ..teacher.signals import TeacherModel


class CutTeacher:
    """A windowed student's control: the teacher, its attention cut to the windows for the time of a call.

    Args:
        teacher: a causal language model of a known family.
        windows: by layer, see `windows_in`.
    """

    def __init__(self, teacher: PreTrainedModel, windows: Mapping[int, Window]):
        self.teacher, self.windows = teacher, windows

    @classmethod
    def of(cls, student: PreTrainedModel, teacher: PreTrainedModel) -> CutTeacher | None:
        """Return the control of a student; None for one without a window, or that is no hybrid."""
        windows = windows_in(student.config)
        return cls(teacher, windows) if windows else None

    def logits(self, batch: Batch) -> Tensor:
        """Return all logits of a batch (B, T, V)."""
        return self._logits(batch, batch.input_ids.shape[1])

    def last_logits(self, ids: Tensor, count: int) -> Tensor:
        """Return the logits (B, count, V) at the end of rows (B, T) that are one document each."""
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        one = torch.ones_like(ids, dtype=torch.int32)
        return self._logits(Batch(ids, torch.full_like(ids, IGNORE), positions, one, tuple(range(len(ids)))), count)

    def _logits(self, batch: Batch, count: int) -> Tensor:
        implementation = self.teacher.config._attn_implementation
        try:
            model = TeacherModel(self.teacher)
            with cut_to_windows(self.teacher, self.windows):
                return model.head.forward(model(batch.to(self.teacher.device))[:, -count:])
        finally:
            self.teacher.set_attn_implementation(implementation)


@contextmanager
def without_recurrence(student: PreTrainedModel) -> Iterator[int]:
    """Within it, the recurrences of a hybrid give zero: what is left are windows, bonus and kept attention.

    Args:
        student: exported model, whose code may be its own, or one built from a run.

    Yields:
        How many mixers the model has; 0 for a model that is no hybrid.
    """
    mixers = [module for module in student.modules() if _is_mixer(module)]
    for mixer in mixers:
        mixer.recur = _silent(mixer)  # type: ignore[assignment]
        # else a zero would take its share of the softmax; exports of earlier versions hand it their queries
        mixer.beyond = lambda *_: None  # type: ignore[assignment]
    try:
        yield len(mixers)
    finally:
        for mixer in mixers:
            del mixer.recur, mixer.beyond


def _is_mixer(module: nn.Module) -> bool:
    return type(module).__name__ == "TimeMixer" and hasattr(module, "recur")  # an export brings its own class


def _silent(mixer: nn.Module) -> Any:
    """Return a `recur` of a mixer that runs as its own does and returns zeros with its state."""
    recur = mixer.recur

    def run(*args: Any, **kwargs: Any) -> Any:
        y, state = recur(*args, **kwargs)  # type: ignore[operator]
        return torch.zeros_like(y), state

    return run
