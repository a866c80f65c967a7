"""The files of an export, whether they are those that were written, and the run that they come from."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError, VerificationError
from ..runs.trained import TrainedRun, at_stage, open_run
from ..support.files import file_digest
from ..support.sealed import unsealed
from .weights import DTYPES

CONVERSION = "conversion.json"  # with the SHA-256 of all other files, and a seal of its own


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a directory but conversion.json and what begins with a dot."""
    return {name: file_digest(file) for name, file in sorted(files_of(folder).items()) if name != CONVERSION}


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files below a directory by their names, without what begins with a dot (git's and the hub's)."""
    files = {file.relative_to(folder): file for file in folder.rglob("*") if not file.is_dir()}
    return {str(name): file for name, file in files.items() if not any(part.startswith(".") for part in name.parts)}


def read_export(folder: Path) -> dict:
    """Return conversion.json of an exported directory.

    Raises:
        UserError: it is not an exported directory.
        VerificationError: conversion.json is not what was written.
    """
    try:
        text = (folder / CONVERSION).read_text(encoding="utf-8")
        dtype = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _not_an_export(folder, error) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"{folder} is damaged: config.json or {CONVERSION} cannot be read: {error}") from error
    try:
        conversion = unsealed(text)
    except ValueError as error:
        raise VerificationError(
            f"{folder / CONVERSION} is damaged: {error}", "export again; an earlier version wrote no seal"
        ) from error
    if dtype not in DTYPES or "files" not in conversion:
        raise _not_an_export(folder, f"dtype {dtype!r}")
    return conversion


def read_with_run(folder: Path, against: str | Path) -> tuple[dict, TrainedRun]:
    """Return conversion.json of an exported directory, whose files are as they were written, and its run.

    Args:
        folder: exported directory.
        against: run directory; it is opened at the stage and checkpoint of the export, where it is the last stage.

    Raises:
        UserError: not an exported directory, one of another run, or a run that cannot be read.
        VerificationError: a file is damaged.
    """
    conversion = read_export(folder)
    check_files(folder, conversion["files"])
    run = open_run(against)
    if conversion.get("run") not in (None, run.id):  # exports of runs without an id name none
        raise UserError(
            f"{folder} was exported from run {conversion['run']}, {run.path} is run {run.id}", "name its own run"
        )
    if conversion.get("stage") == run.stage:
        run = at_stage(run.directory, run.stage, conversion["checkpoint"])
    return conversion, run


def check_files(folder: Path, written: dict[str, str]) -> None:
    """Compare the files of an export with what was written.

    Args:
        written: SHA-256 of each file, see `digests`.

    Raises:
        VerificationError: a file is missing, has changed, or was added.
    """
    found = files_of(folder)
    found.pop(CONVERSION, None)
    if missing := sorted(written.keys() - found.keys()):
        raise VerificationError(f"{folder} is damaged: {missing[0]} is missing", "copy it again")
    if added := sorted(found.keys() - written.keys()):
        raise VerificationError(f"{folder} holds {added[0]}, which was not exported", "remove it")
    for name, digest in written.items():
        if file_digest(found[name]) != digest:
            raise VerificationError(
                f"{folder} is damaged: the SHA-256 of {name} is not the one written", "copy it again"
            )


def _not_an_export(folder: Path, reason: object) -> UserError:
    return UserError(f"{folder} is not an exported model: {reason}", "name a directory that `rwkvinside export` wrote")
