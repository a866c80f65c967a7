"""RUN/layers.json: scores of the layers of a run's student, so that they are measured once.

Sealed as records are, and of one student on one text: of another one nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UserError
from ..support.files import write_json
from ..support.sealed import read_sealed, sealed

FILE, PICTURE = "layers.json", "layers.png"


@dataclass(frozen=True)
class Scored:
    """What was measured.

    Attributes:
        run: id of the run.
        student: digest of the record of the stage that left it.
        checkpoint: of that stage.
        text: digest of the tokens.
    """

    run: str
    student: str
    checkpoint: str
    text: str


def read_scores(run: Path, of: Scored) -> dict[str, dict]:
    """Return the scores by method, as plain values; {} where there are none of this student and text.

    Args:
        run: directory of the run.
        of: what they must be of.

    Raises:
        UserError: the file was changed, or cannot be read.
    """
    file = run / FILE
    if not file.exists():
        return {}
    try:
        content, _ = read_sealed(file)
    except ValueError as error:
        raise UserError(f"{run / str(error)}", f"remove {file}: the scores are measured again") from error
    return dict(content["scores"]) if content.get("of") == asdict(of) else {}


def write_scores(run: Path, of: Scored, scores: Mapping[str, Mapping]) -> None:
    """Write the scores by method, in place of those that are there."""
    write_json(run / FILE, sealed({"of": asdict(of), "scores": dict(scores)}))
