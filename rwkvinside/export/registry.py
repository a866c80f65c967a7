"""The formats that a run can be exported to. Imports a format only when it is chosen."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..support.text import did_you_mean

RWKV_INFER = "rwkv_infer"  # model_type of directories for RWKV-Infer
MLX_FILE = "hybrid_mlx.py"  # model_file of directories for mlx-lm

# name -> ("module:function" of this package, one line of help); the function takes the run, the output and its options,
# verifies what it writes, and returns the record that goes with it
FORMATS = {
    "hf": ("huggingface:export_hf", "Hugging Face transformers, a directory"),
    "mlx": ("mlx.write:export_mlx", "MLX on Apple silicon (mlx-lm), a directory"),
    "gguf": ("gguf.write:export_gguf", "llama.cpp, a file"),
    "rwkv-infer": ("rwkv_infer:export_rwkv_infer", "RWKV-Infer, a directory or FILE.pth"),
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
    return _function(_verifier(Path(path)))(path, against)


def _verifier(path: Path) -> str:
    """Return the function that verifies an export, by its name and what its config.json says."""
    of_files = {".gguf": "gguf.write:verify_gguf", ".pth": "rwkv_infer:verify_rwkv_infer"}
    with suppress(OSError, UnicodeDecodeError):
        config = (path / "config.json").read_text(encoding="utf-8")
        if f'"{RWKV_INFER}"' in config:
            return of_files[".pth"]
        if '"mlx_module"' in config:
            return "mlx.write:verify_mlx"
    return of_files.get(path.suffix, "verify:verify")


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(import_module(f".{module}", __package__), function)
