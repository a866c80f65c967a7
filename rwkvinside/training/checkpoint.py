"""Checkpoints of a stage: directories that are complete or absent.

They are checked by size and SHA-256 before they are used.

    step-00000150/model.safetensors        weights by name
                  optimizer.safetensors    moments by name (absent where a stage has no optimizer)
                  carried.safetensors      what the rows of its last step leave for the next (only of stateful stages)
                  state.json               everything else, the digests of the files above, and where all this belongs

Nothing is pickled. What the tensors and the state mean is up to the caller.
"""

from __future__ import annotations

import errno
import json
import logging
import random
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..support.files import (
    file_digest,
    free_bytes,
    fsync_tree,
    publish,
    remove_unfinished,
    rename,
    temporary_sibling,
)
from ..support.names import is_name
from ..support.sealed import read_sealed, sealed
from ..support.text import rounded_bytes
from .metrics import Score

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
CARRIED = "carried.safetensors"
MARGIN = 16 * 2**20  # bytes for headers, state.json and what else grows in a run directory

logger = logging.getLogger(__name__)


class CorruptCheckpoint(UserError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint, whose tensors are read when asked for.

    Attributes:
        path: its directory.
        state: what was passed to `Checkpointer.save`, JSON values.
    """

    path: Path
    state: dict

    @property
    def step(self) -> int:
        """Optimizer steps that were done."""
        return step_of(self.path)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, on the CPU."""
        return load_file(self.path / MODEL)

    def optimizer(self) -> dict[str, Tensor] | None:
        """Return the optimizer state by name, on the CPU.

        None where the stage had none.
        """
        return load_file(self.path / OPTIMIZER) if (self.path / OPTIMIZER).exists() else None

    def carried(self) -> dict[str, Tensor]:
        """Return what the rows of its last step leave for the next, by name, on the CPU; {} where rows begin anew."""
        return load_file(self.path / CARRIED) if (self.path / CARRIED).exists() else {}


class Checkpointer:
    """Writes and reads the checkpoints of one stage.

    Only one process may write.

    Args:
        directory: made when the first checkpoint is written.
        fingerprint: JSON values that say which student the weights belong to; another one is refused at load.
        run: id of the run; a checkpoint of another one is refused at load. None: it is not known.
        keep: how many of the newest checkpoints stay, at least 1; the one with the best score stays besides.
        on_disk_full: "stop" raises, "continue" logs a warning and lets training go on to the next one.
    """

    def __init__(
        self,
        directory: Path | str,
        fingerprint: Mapping,
        keep: int = 2,
        on_disk_full: str = "stop",
        run: str | None = None,
    ):
        if keep < 1:
            raise UserError(f"checkpoint.keep={keep}", "keep at least 1 checkpoint")
        if on_disk_full not in ("stop", "continue"):
            raise UserError(f"checkpoint.on_disk_full={on_disk_full!r}", "allowed: stop, continue")
        self.directory = Path(directory)
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.keep = keep
        self.on_disk_full = on_disk_full
        self.run = run

    def names(self) -> list[str]:
        """Return the names of finished checkpoints, oldest first.

        They need not be intact.
        """
        return [path.name for path in checkpoint_directories(self.directory)]

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor] | None,
        state: Mapping,
        required: bool = False,
        score: Score | None = None,
        carried: Mapping[str, Tensor] | None = None,
    ) -> Path | None:
        """Write a checkpoint, then remove older ones beyond `keep`, but never the best one.

        It is written under a temporary name and then renamed. Checkpoints of later steps, which a run leaves that is
        resumed from an earlier one, become `abandoned-...`.

        Args:
            step: optimizer steps done.
            tensors: weights by name.
            optimizer: its state by name; None: the stage has none.
            state: JSON values.
            required: raise when the disk is full even if `on_disk_full` is "continue".
            score: of these weights on validation data; None: they were not evaluated.
            carried: what rows leave for the next step, by name; None: they begin anew.

        Returns:
            Its directory, or None when there was no space and training may go on.

        Raises:
            UserError: there is no space, or the directory cannot be written.
        """
        optional = {OPTIMIZER: optimizer, CARRIED: carried}
        files = {MODEL: tensors} | {name: content for name, content in optional.items() if content is not None}
        needed = sum(t.numel() * t.element_size() for f in files.values() for t in f.values()) + MARGIN
        target = self.directory / f"step-{step:08d}"
        try:
            with temporary_sibling(target) as temporary:
                remove_unfinished(self.directory, "step-*")
                if (free := free_bytes(self.directory)) < needed:
                    self._no_space(target, f"{rounded_bytes(needed)} needed, {rounded_bytes(free)} free", required)
                    return None
                temporary.mkdir()
                for name, content in files.items():
                    save_file({k: t.detach().cpu().contiguous() for k, t in content.items()}, temporary / name)
                facts = {name: _facts(temporary / name) for name in files}
                place = {"run": self.run, "stage": self.directory.name, "step": step}
                described = {"fingerprint": self.fingerprint, "place": place, "files": facts, "state": dict(state)}
                _write_state(temporary / STATE, described | {"score": score and asdict(score)})
                fsync_tree(temporary)  # before another one makes room
                self._set_aside(step)
                publish(temporary, target)
            best = best_checkpoint(self.directory)
            for path in checkpoint_directories(self.directory)[: -self.keep]:
                if path != best:
                    shutil.rmtree(path)
        except (OSError, SafetensorError) as error:  # safetensors reports a failed write as its own error
            if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"cannot write checkpoint {target}: {error}", "make the directory writable") from error
            self._no_space(target, str(error), required)
            return None
        return target

    def load(self, name: str | None = None) -> Checkpoint:
        """Return the newest checkpoint, or the one named.

        Every byte of it is checked.

        Raises:
            CorruptCheckpoint: names the checkpoint, what is wrong, and the newest intact one. It may also be that of
                another run, stage or step.
            UserError: there is none, or it belongs to another student.
        """
        names = self.names()
        if not names:
            raise UserError(f"no checkpoint in {self.directory}", "start without --resume")
        chosen = name or names[-1]
        if chosen not in names:
            raise UserError(f"no checkpoint {chosen} in {self.directory}", f"there are: {', '.join(names)}")
        try:
            content = _read(self.directory / chosen, self.run)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(error.cause, self._other(chosen)) from error
        if differences := _differences(content["fingerprint"], self.fingerprint):
            raise UserError(
                f"checkpoint {self.directory / chosen} belongs to another student: {differences}",
                "use the student settings it was made with, or another --out",
            )
        return Checkpoint(self.directory / chosen, content["state"])

    def _other(self, corrupt: str) -> str:
        """Return the hint for a corrupt checkpoint.

        It names the newest intact one.
        """
        for name in reversed(self.names()):
            if name != corrupt:
                try:
                    _read(self.directory / name, self.run)
                except CorruptCheckpoint:
                    continue
                return f"the newest intact one is {name}: use --resume-from {name}"
        return "there is no other intact one: start the stage again without --resume"

    def _set_aside(self, step: int) -> None:
        for name in self.names():
            if _number(name) >= step:
                aside = self.directory / f"abandoned-{name}"
                if aside.exists():
                    shutil.rmtree(aside)
                rename(self.directory / name, aside)
                if _number(name) == step:  # the same step written again
                    shutil.rmtree(aside)

    def _no_space(self, target: Path, problem: str, required: bool) -> None:
        cause = f"cannot write checkpoint {target}: {problem}"
        if required or self.on_disk_full == "stop":
            raise UserError(cause, "free space or move --out, then --resume; checkpoint.keep=1 needs least")
        logger.warning("%s; training goes on to the next one", cause)


def open_checkpoint(path: Path, run: str | None = None) -> Checkpoint:
    """Return a checkpoint of any student, to be read only.

    Args:
        path: its directory.
        run: id of the run that it must be of; None: any.

    Raises:
        UserError: it is not what was written (`CorruptCheckpoint`), or of another format.
    """
    return Checkpoint(path, _read(path, run)["state"])


def checkpoint_directories(stage_folder: Path) -> list[Path]:
    """Return the finished checkpoints in the folder of a stage.

    They are in the order of their steps, and need not be intact.
    """
    if not stage_folder.is_dir():
        return []
    directories = (path for path in stage_folder.iterdir() if re.fullmatch(r"step-\d+", path.name))
    return sorted(directories, key=lambda path: _number(path.name))


def newest_checkpoint(stage_folder: Path) -> Path | None:
    """Return the finished checkpoint of the latest step of a stage.

    None where its folder has none.
    """
    return next(reversed(checkpoint_directories(stage_folder)), None)


def read_score(path: Path) -> Score | None:
    """Return the score that a checkpoint was saved with, None where it has none or cannot be read."""
    with suppress(UserError, TypeError):
        if score := _read_state(path / STATE).get("score"):
            return Score(**score)
    return None


def best_checkpoint(stage_folder: Path) -> Path | None:
    """Return the finished checkpoint of a stage with the lowest score, of equal ones the latest.

    Only scores that measure what the latest one does are compared. None where no checkpoint has one.
    """
    scores = {path: score for path in reversed(checkpoint_directories(stage_folder)) if (score := read_score(path))}
    newest = next(iter(scores.values()), None)
    compared = {path: score.value for path, score in scores.items() if newest and score.comparable(newest)}
    return min(compared, key=compared.__getitem__, default=None)


def step_of(path: Path) -> int:
    """Return the optimizer steps that were done when a checkpoint was written."""
    return _number(path.name)


def _number(name: str) -> int:
    return int(name.removeprefix("step-"))


def _read(path: Path, run: str | None) -> dict:
    """Return state.json of a checkpoint, after checking its place and its files.

    They are compared with what state.json says of them.
    """
    content = _read_state(path / STATE)
    _check_place(path, content.get("place"), run)
    if more := [
        file for file in (MODEL, OPTIMIZER, CARRIED) if file not in content["files"] and (path / file).exists()
    ]:
        raise CorruptCheckpoint(f"checkpoint {path} is corrupt: {more[0]} was not written with it")
    for file, written in content["files"].items():
        if not is_name(file) or not (path / file).is_file():
            raise CorruptCheckpoint(f"checkpoint {path} is corrupt: {file} is missing")
        if (size := (path / file).stat().st_size) != written["bytes"]:
            raise CorruptCheckpoint(
                f"checkpoint {path} is corrupt: {file} has {size} bytes, {written['bytes']} were written"
            )
        if _facts(path / file) != written:
            raise CorruptCheckpoint(f"checkpoint {path} is corrupt: the SHA-256 of {file} is not the one written")
    return content


def _check_place(path: Path, place: Mapping | None, run: str | None) -> None:
    """Refuse a checkpoint that was moved here from elsewhere.

    Those of earlier versions do not know their place, nor do their runs have an id.
    """
    if place is None and run is None:
        return
    if place is None:
        raise CorruptCheckpoint(f"checkpoint {path} does not say of which run it is, and the run knows its own")
    here = {"stage": path.parent.name, "step": _number(path.name)} | ({} if run is None else {"run": run})
    for name, value in here.items():
        if (written := place.get(name)) != value:
            raise CorruptCheckpoint(f"checkpoint {path} was moved: it is of {name} {written}, not {value}")


def _facts(path: Path) -> dict:
    """Return size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _write_state(path: Path, content: dict) -> None:
    text = json.dumps(sealed({"format": FORMAT} | content), allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _read_state(path: Path) -> dict:
    try:
        content, _ = read_sealed(path)
        version = content["format"]
    except (ValueError, KeyError) as error:
        problem = error if isinstance(error, ValueError) else f"{path.name} cannot be read"
        raise CorruptCheckpoint(f"checkpoint {path.parent} is corrupt: {problem}") from error
    if version != FORMAT:
        raise UserError(f"checkpoint {path.parent} has format {version!r}", f"this version reads format {FORMAT}")
    return content


def _differences(written: Mapping, current: Mapping) -> str:
    keys = [k for k in sorted(set(written) | set(current)) if written.get(k) != current.get(k)]
    return ", ".join(f"{k} is {written.get(k)!r} there and {current.get(k)!r} here" for k in keys)


def rng_state() -> dict:
    """Return the random state of Python, NumPy and torch as JSON values: a resumed run draws what a straight one would.

    The state of CUDA is that of the current device, absent where CUDA was not used.
    """
    version, values, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state = {
        "python": [version, list(values), gauss],
        "numpy": numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict) -> None:
    """Set what `rng_state` returned.

    A CUDA state is left alone on a machine without CUDA.
    """
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy | {"state": {"key": key, "pos": numpy["state"]["pos"]}})
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
