"""Names that become files and directories.

A name that somebody else wrote (a configuration, an index, a record) must not lead out of the directory it is in.
"""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
ALLOWED = "names have letters, digits, - _ and ., do not begin with a dot, and have at most 100 characters"


def is_name(text: object) -> bool:
    """Return whether a text can be the name of a file or a directory, see `ALLOWED`."""
    return isinstance(text, str) and NAME.fullmatch(text) is not None
