"""The formats that a run can be exported to. Imports a format only when it is chosen."""

from __future__ import annotations

from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..support.text import did_you_mean

# name -> ("module:function" of this package, one line of help); the function takes the run, the output and its options,
# verifies what it writes, and returns the record that goes with it
FORMATS = {
    "hf": ("huggingface:export_hf", "Hugging Face transformers, a directory"),
    "gguf": ("gguf.write:export_gguf", "llama.cpp, a file"),
}


def export(run: str | Path, out: str | Path, to: str = "hf", **options: Any) -> dict:
    """Write the last finished stage of a run in one of the `FORMATS`, and verify it.

    Args:
        run: run directory.
        out: directory or file to create.
        to: name of the format.
        **options: of the format, see its function in `FORMATS`.

    Returns:
        The record of the export, see the format.

    Raises:
        UserError: an unknown format (names the nearest one), an option that it does not have, or whatever it refuses.
        VerificationError: the export does not reproduce the trained model.
    """
    if to not in FORMATS:
        raise UserError(
            f"export format {to!r} is not known{did_you_mean(to, FORMATS)}", f"formats: {', '.join(FORMATS)}"
        )
    write = _function(FORMATS[to][0])
    known = signature(write).parameters
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values())
    if not takes_all and (foreign := sorted(options.keys() - known.keys())):
        raise UserError(f"exports to {to} have no option {foreign[0]}", "leave it out, or export --to hf")
    return write(run, out, **options)


def verify(path: str | Path, against: str | Path) -> dict:
    """Compare an export with its run.

    Args:
        path: what `export` wrote, a directory or a file.
        against: run directory.

    Returns:
        The result, see the format.

    Raises:
        UserError: it is not an export, or a run that cannot be read.
        VerificationError: it is damaged, or does not reproduce the run.
    """
    of_file = Path(path).suffix == ".gguf"
    return _function("gguf.write:verify_gguf" if of_file else "verify:verify")(path, against)


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(import_module(f".{module}", __package__), function)
