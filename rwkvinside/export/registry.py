"""The formats that a run can be exported to. Imports a format only when it is chosen."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..support.text import did_you_mean

# name -> ("module:function" of this package, one line of help); the function takes the run, the output and its options,
# verifies what it writes, and returns the content of conversion.json
FORMATS = {
    "hf": ("huggingface:export_hf", "Hugging Face transformers"),
    "rwkv-infer": ("rwkv_infer:export_rwkv_infer", "RWKV-Infer, a directory or FILE.pth"),
}


def export(run: str | Path, out: str | Path, to: str = "hf", **options: Any) -> dict:
    """Write the last finished stage of a run in one of the `FORMATS`, and verify it.

    Args:
        run: run directory.
        out: directory, or file of some formats, to create.
        to: name of the format.
        **options: of the format, see its function in `FORMATS`.

    Returns:
        The content of the export's conversion.json.

    Raises:
        UserError: an unknown format (names the nearest one), or whatever the format refuses.
        VerificationError: the export does not reproduce the trained model.
    """
    if to not in FORMATS:
        raise UserError(
            f"export format {to!r} is not known{did_you_mean(to, FORMATS)}", f"formats: {', '.join(FORMATS)}"
        )
    module, function = FORMATS[to][0].split(":")
    return getattr(import_module(f".{module}", __package__), function)(run, out, **options)
