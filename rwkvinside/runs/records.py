"""What a run notes about itself, so that an edited or mixed run directory is noticed.

RUN/run.json                   made once: the run's id, and what tells its teacher from another one
RUN/stages/<stage>/stage.json  the run's id, the digest of what came before, of the settings and of the stage's files

Each record is sealed with its own digest, and names the digest of its predecessor: that of the finished stage it starts
from, or of run.json. So the last record vouches for all of them. Runs of earlier versions have none.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import __version__
from ..errors import UserError
from ..support.files import write_json
from ..support.names import ALLOWED, is_name
from ..support.sealed import SEAL, read_sealed, sealed

IDENTITY, RECORD = "run.json", "stage.json"
FORMAT = 1
RESTORE = "restore it from a copy of the run, or begin a new run with --out"


@dataclass(frozen=True)
class Identity:
    """One run.

    Attributes:
        run: a random id.
        teacher: `teacher.files.model_identity` of the model that is converted.
        digest: of the file.
    """

    run: str
    teacher: dict[str, str]
    digest: str


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run.

    Attributes:
        run: id of the run.
        stage: its name.
        before: the stage that it starts from; None: from the teacher.
        after: digest of that stage's record when it was finished, or of run.json.
        settings: digest of the configuration, see `RunDirectory.settings_digest`.
        files: digests of what it wrote once, by path in its folder.
        second_teacher: `model_identity` of its own teacher, {} where it has none.
        checkpoint: name of its last checkpoint, once it is finished.
        best: name of the one with the best score on validation data, where that is another one.
        attention_layers: those that it has chosen to keep attention; None: it chose none.
        digest: of the file.
    """

    run: str
    stage: str
    before: str | None
    after: str
    settings: str
    files: dict[str, str] = field(default_factory=dict)
    second_teacher: dict[str, str] = field(default_factory=dict)
    checkpoint: str | None = None
    best: str | None = None
    attention_layers: list[int] | None = None
    digest: str = ""


class Records:
    """The records in a run directory.

    Every process may read, one may write.

    Args:
        path: of the run directory.
    """

    def __init__(self, path: Path):
        self.path = path

    def identity(self) -> Identity | None:
        """Return the run's identity.

        None: it has not begun, or an earlier version made it.

        Raises:
            UserError: it was changed.
        """
        file = self.path / IDENTITY
        if not file.exists():
            return None
        content, digest = _read(file)
        try:
            return Identity(content["run"], dict(content["teacher"]), digest)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is not the identity of a run: {error!r}", RESTORE) from error

    def make_identity(self, teacher: Mapping[str, str]) -> None:
        """Give a run that begins its id."""
        content = {"format": FORMAT, "run": uuid.uuid4().hex, "rwkvinside": __version__, "teacher": dict(teacher)}
        write_json(self.path / IDENTITY, sealed(content))

    def stage(self, name: str, later: tuple[str, ...] = ()) -> StageRecord | None:
        """Return the record of a stage that has begun, after checking what came before it.

        None: it has not begun.

        Args:
            name: of the stage.
            later: stages on whose behalf it is asked for, which cannot come before it.

        Raises:
            UserError: it was changed, is of another run or stage, or does not follow what is there.
        """
        file = self._file(name)
        if not file.exists():
            return None
        content, digest = _read(file)
        try:
            record = StageRecord(**content | {"digest": digest})
        except TypeError as error:
            raise UserError(f"{file} is not the record of a stage: {error}", RESTORE) from error
        identity = self.identity()
        if identity is None or record.run != identity.run:
            raise UserError(f"stage {name} in {self.path} is of another run", RESTORE)
        if record.stage != name:
            raise UserError(f"stage {name} in {self.path} is stage {record.stage}, renamed", RESTORE)
        if record.before in (name, *later):
            raise UserError(f"stage {name} in {self.path} says that it began after itself", RESTORE)
        if record.after != self.digest_before(record.before, (name, *later)):
            what = "another teacher" if record.before is None else f"another stage {record.before}"
            raise UserError(f"stage {name} in {self.path} began after {what} than the one that is there now", RESTORE)
        return record

    def finished(self, name: str, later: tuple[str, ...] = ()) -> StageRecord:
        """Return the record of a finished stage.

        Arguments are those of `stage`.

        Raises:
            UserError: its record does not say that it is finished; see also `stage`.
        """
        record = self.stage(name, later)
        if record is None or record.checkpoint is None:
            what = "is missing" if record is None else "names no last checkpoint"
            raise UserError(f"stage {name} does not count as finished: {self._file(name)} {what}", RESTORE)
        return record

    def followers(self, name: str) -> list[str]:
        """Return the stages that began after a stage.

        Raises:
            UserError: see `stage`.
        """
        files = sorted(self.path.glob(f"stages/*/{RECORD}"))
        records = [self.stage(file.parent.name) for file in files]
        return [record.stage for record in records if record is not None and record.before == name]

    def kept_layers(self, name: str) -> tuple[int, ...] | None:
        """Return the layers that a stage, or the nearest one before it, has chosen to keep attention; None: none has.

        Raises:
            UserError: see `stage`.
        """
        record = self.stage(name) if self.identity() is not None else None
        if record is None:
            return None
        if record.attention_layers is not None:
            return tuple(record.attention_layers)
        return record.before and self.kept_layers(record.before)

    def chosen_layers(self) -> tuple[int, ...] | None:
        """Return the layers that a stage of the run has chosen to keep attention; None: none has.

        Raises:
            UserError: see `stage`.
        """
        records = [self.stage(file.parent.name) for file in sorted(self.path.glob(f"stages/*/{RECORD}"))]
        found = [record.attention_layers for record in records if record and record.attention_layers is not None]
        return tuple(found[0]) if found else None

    def digest_before(self, before: str | None, later: tuple[str, ...] = ()) -> str:
        """Return what the record of a stage names as `after`.

        Args:
            before: the stage that it starts from; None: from the teacher.
            later: see `stage`.
        """
        if before is not None:
            return self.finished(before, later).digest
        identity = self.identity()
        if identity is None:
            raise UserError(f"{self.path / IDENTITY} is missing", RESTORE)
        return identity.digest

    def write(self, record: StageRecord) -> None:
        """Write the record of a stage, if it says something new."""
        content = {name: value for name, value in asdict(record).items() if name != "digest"}
        if record.attention_layers is None:  # as in records of stages that never choose
            del content["attention_layers"]
        content = sealed(content)
        if not self._file(record.stage).exists() or _read(self._file(record.stage))[1] != content[SEAL]:
            write_json(self._file(record.stage), content)

    def _file(self, name: str) -> Path:
        if not is_name(name):
            raise UserError(f"{self.path} names the stage {name!r}", f"{ALLOWED}; {RESTORE}")
        return self.path / "stages" / name / RECORD


def _read(file: Path) -> tuple[dict, str]:
    try:
        return read_sealed(file)
    except ValueError as error:
        raise UserError(f"{file.parent / str(error)}", RESTORE) from error
