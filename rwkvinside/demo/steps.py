"""The steps of a demo: a heading for each, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class Steps:
    """A clock that starts when it is made.

    Args:
        console: where steps are shown.

    Attributes:
        seconds: of each finished step, by name.
    """

    def __init__(self, console: Console):
        self.seconds: dict[str, float] = {}
        self._console, self._started = console, time.monotonic()

    @property
    def minutes(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self._started) / 60

    @contextmanager
    def step(self, name: str, about: str) -> Iterator[None]:
        """Show a step with a line of what it is about, and its seconds at its end."""
        self._console.rule(f"[bold]{name}[/bold]", align="left", style="dim")
        self._console.print(about, style="dim", markup=False)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        self._console.print(f"[dim]{name}: {self.seconds[name]:.0f} s, {self.minutes:.1f} min since the start[/dim]")
