"""train_distill.py as one of several ranks, of which only the first may write into the run directory."""

import os
import sys
from pathlib import Path

import train_distill

OUT = str(Path(sys.argv[sys.argv.index("--out") + 1]).resolve())
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


def refuse(event, arguments):
    """Refuse what changes something below OUT."""
    writes = event in CHANGES or event == "open" and (arguments[2] or 0) & WRITES
    if writes and any(str(argument).startswith(OUT) for argument in arguments):
        raise RuntimeError(f"rank {os.environ['RANK']} writes: {event} {arguments}")


if os.environ["RANK"] != "0":
    sys.addaudithook(refuse)
sys.exit(train_distill.main(sys.argv[1:]))
