"""Where an export is written: a new place, with enough room, and errors of the disk in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from ..support.files import free_bytes
from ..support.text import rounded_bytes


def check_new(out: str | Path) -> Path:
    """Return the path of an export that overwrites nothing.

    Raises:
        UserError: it is a file, or a directory with something in it.
    """
    out = Path(out)
    if out.is_file():
        raise UserError(f"output {out} exists", "name a new file, or remove it first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"output directory {out} exists and is not empty", "name a new directory, or remove it first")
    return out


def check_disk(folder: Path, needed: int) -> None:
    """Refuse a disk on which an export of so many bytes has no room.

    Raises:
        UserError: says how much is free and needed.
    """
    if (free := free_bytes(folder)) < needed * 1.02:
        raise UserError(
            f"{folder} has {rounded_bytes(free)} free, but the export needs {rounded_bytes(needed)}", "free some space"
        )


@contextmanager
def failures_told(out: Path) -> Iterator[None]:
    """Turn what the disk refuses into a `UserError`; safetensors reports a failed write as its own error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        hint = "free space, or name a place that can be written"
        raise UserError(f"the export to {out} failed: {error}", hint) from error
