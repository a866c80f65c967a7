"""RUN/layers.json: scores of the layers of a run's student, so that they are measured once.

Sealed as records are, and of one student on one text: of another one nothing is read. Results of single trials are
there as soon as they are known, so that an interrupted choice goes on where it was.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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


@dataclass
class LayerScores:
    """What was measured of a student on a text, as plain values.

    Attributes:
        scores: by method.
        trials: KL by candidate and tokens, by the identity of what short distillations train with.
    """

    scores: dict[str, dict] = field(default_factory=dict)
    trials: dict[str, dict[str, float]] = field(default_factory=dict)


def read_scores(run: Path, of: Scored) -> LayerScores:
    """Return what is known of this student on this text.

    Args:
        run: directory of the run.
        of: what they must be of.

    Raises:
        UserError: the file was changed, or cannot be read.
    """
    file = run / FILE
    if not file.exists():
        return LayerScores()
    try:
        content, _ = read_sealed(file)
    except ValueError as error:
        raise UserError(f"{run / str(error)}", f"remove {file}: the scores are measured again") from error
    if content.get("of") != asdict(of):
        return LayerScores()
    return LayerScores(content["scores"], content.get("trials", {}))


def write_scores(run: Path, of: Scored, measured: LayerScores) -> None:
    """Write what was measured, in place of what is there."""
    write_json(run / FILE, sealed({"of": asdict(of)} | asdict(measured)))
