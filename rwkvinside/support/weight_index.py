"""The index of a model's weights, which says in which file each tensor is."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from .names import is_name


def check_shards(folder: Path) -> None:
    """Refuse indexes of weights that name files elsewhere.

    Libraries join these names with the directory, so that `../x` or an absolute path reads another file.

    Args:
        folder: of a model.

    Raises:
        UserError: an index that cannot be read, or a name that is not that of a file beside it.
    """
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} cannot be read as an index of weights: {error!r}", "restore the file") from error
        for name in names:
            if not is_name(name):
                raise UserError(f"{index} names the file {name!r}", "only plain names of files beside it are allowed")
