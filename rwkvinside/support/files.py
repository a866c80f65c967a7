"""Files that are complete or absent."""

import json
import os
from pathlib import Path


def write_json(values: dict, path: Path) -> None:
    """Write under a temporary name and rename it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
