"""Where the teacher's side of a stage can come from."""

from __future__ import annotations

from enum import Enum


class TeacherKind(Enum):
    """A source of teacher distributions; its value is that of `stages.<name>.teacher`."""

    SELF = "same"
    ONLINE = "separate"
    OFFLINE = "cache"

    @property
    def title(self) -> str:
        """Name in plans."""
        return {
            TeacherKind.SELF: "the student's own frozen weights",
            TeacherKind.ONLINE: "a second model",
            TeacherKind.OFFLINE: "logits on disk",
        }[self]
