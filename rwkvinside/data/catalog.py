"""Published texts by short names, such as `--data fineweb-edu`; they are read from the hub as they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Dataset(NamedTuple):
    """A data set of the hub.

    Attributes:
        source: as `DocumentReader` takes it.
        license: as its page says.
        size: about.
        about: what is in it.
    """

    source: str
    license: str
    size: str
    about: str


CATALOG = {
    "fineweb-edu": Dataset(
        "hub:HuggingFaceFW/fineweb-edu:sample-10BT", "ODC-By 1.0", "10B tokens", "web pages that teach, English"
    ),
    "fineweb-edu-100b": Dataset(
        "hub:HuggingFaceFW/fineweb-edu:sample-100BT", "ODC-By 1.0", "100B tokens", "more of fineweb-edu"
    ),
    "dclm": Dataset(
        "hub:mlfoundations/dclm-baseline-1.0-parquet", "CC-BY-4.0", "4T tokens", "filtered web pages, English"
    ),
    "tinystories": Dataset(
        "hub:roneneldan/TinyStories", "CDLA-Sharing-1.0", "2.1M stories", "stories in the words of small children"
    ),
    "smoltalk": Dataset(
        "hub:HuggingFaceTB/smoltalk:all", "Apache-2.0", "1M conversations", "instructions and answers, for sft"
    ),
}


def resolve_names(sources: Sequence[str]) -> list[str]:
    """Return sources with names of the catalog in the place of what they stand for; what exists as a file stays."""
    return [CATALOG[s].source if s in CATALOG and not Path(s).exists() else s for s in sources]
