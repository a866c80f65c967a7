"""Progress of long work: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext, suppress
from typing import TextIO

DELAY = 0.5  # seconds; shorter work is not worth a bar
INTERVAL = 10.0  # seconds between lines


class Progress:
    """Shows how far some work is, while the `with` block runs.

    Work that is done at once shows nothing.

    Args:
        label: of the work.
        total: how many there are of what is counted; None where it is not known.
        unit: what is counted, in the plural.
        done: how many of `total` were done before; they do not count for the speed.
        stream: where to write; None is standard error.
        delay: seconds before a terminal has a bar.
        interval: seconds between lines elsewhere; None: only the lines of `say`.
        within: work that this is a part of, see `part`.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        unit: str = "",
        done: int = 0,
        stream: TextIO | None = None,
        delay: float = DELAY,
        interval: float | None = INTERVAL,
        within: Progress | None = None,
    ):
        self.label, self.total, self.unit = label, total, unit
        self.done = self._before = done
        self.stream = stream or sys.stderr
        self._delay, self._interval = delay, interval
        self._detail = ""
        self._start = self._last_line = time.monotonic()
        self._shown: int | None = None  # what the last line said
        self._bar = self._task = None
        self._within = within

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        self._draw()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self._bar is not None:
            if self._within is not None and self._bar is self._within._bar:
                self._bar.remove_task(self._task)
            else:
                self._bar.stop()
            self._bar = None
        elif kind is None and self._shown is not None and self._shown != self.done:
            self._line()  # work that had lines has one for its end

    def part(self, label: str, total: int | None = None, *, unit: str = "") -> Progress:
        """Return the progress of a part of this work, such as an evaluation between two steps.

        On a terminal its bar stands below that of the whole. A line that cannot be printed is left out: what the whole
        prints next says so.

        Args:
            label: follows that of the whole.
            total, unit: as of the whole.
        """
        return Progress(f"{self.label} {label}", total, unit=unit, stream=self.stream, within=self)

    @property
    def rate(self) -> float:
        """How many of what is counted are done in a second, since the beginning."""
        return (self.done - self._before) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, count: int = 1, detail: str = "") -> None:
        """Count so many more as done.

        Arguments are those of `update`.
        """
        self.update(self.done + count, detail)

    def update(self, done: int, detail: str = "") -> None:
        """Set how many are done.

        Args:
            done: how many.
            detail: more to show, such as a loss.
        """
        self.done, self._detail = done, detail
        self._draw()
        if (
            not self.stream.isatty()
            and self._interval is not None
            and time.monotonic() - self._last_line >= self._interval
        ):
            self._line()

    def say(self, line: str) -> None:
        """Show a line of text, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False)
        else:
            self.stream.write(line + "\n")
            self.stream.flush()

    def _line(self) -> None:
        self._last_line, self._shown = time.monotonic(), self.done
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        left = f"ETA {clock((self.total - self.done) / self.rate)}" if self.total is not None and self.rate else ""
        counted = f"{self.label} {count} {self.unit}".rstrip()
        with nullcontext() if self._within is None else suppress(OSError):
            self.say("  ".join(filter(None, (counted, self._detail, left))))

    def _draw(self) -> None:
        """Bring the bar of a terminal up to date.

        It begins when the work has taken a while.
        """
        if self._bar is None:
            if not self.stream.isatty() or time.monotonic() - self._start < self._delay:
                return
            self._begin_bar()
        self._bar.update(self._task, completed=self.done, detail=f"{self.unit}  {self._detail}".strip())

    def _begin_bar(self) -> None:
        if self._within is not None and self._within._bar is not None:  # two live bars would write over each other
            self._bar = self._within._bar
            self._task = self._bar.add_task(self.label, total=self.total, detail="")
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        text = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[detail]"))
        label, detail = text
        columns = (label, BarColumn(), MofNCompleteColumn(), detail, TimeRemainingColumn())
        terminal = Console(file=self.stream, soft_wrap=True, highlight=False)
        self._bar = Bar(*columns, console=terminal, transient=True)
        self._task = self._bar.add_task(self.label, total=self.total, detail="")
        self._bar.start()


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds: 1:02:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
