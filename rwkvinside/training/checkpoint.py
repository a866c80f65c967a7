"""Checkpoints of a stage: directories that are complete or absent, checked by size and SHA-256 before they are used.

    step-00000150/model.safetensors        weights by name
                  optimizer.safetensors    moments by name (absent where a stage has no optimizer)
                  state.json               everything else, and the digests of the files above

Nothing is pickled. What the tensors and the state mean is the caller's affair.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..support.files import file_digest, free_bytes, fsync_tree, publish, remove_unfinished, temporary_sibling
from ..support.text import rounded_bytes

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MARGIN = 16 * 2**20  # bytes for headers, state.json and what else grows in a run directory

logger = logging.getLogger(__name__)


class CorruptCheckpoint(UserError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint. Tensors are read when asked for.

    Args:
        path: its directory.
        state: what was given to `Checkpointer.save`, JSON values.
    """

    path: Path
    state: dict

    @property
    def step(self) -> int:
        return _number(self.path.name)

    def tensors(self) -> dict[str, Tensor]:
        """Weights by name, on the CPU."""
        return load_file(self.path / MODEL)

    def optimizer(self) -> dict[str, Tensor] | None:
        """Optimizer state by name, on the CPU; None where the stage had none."""
        return load_file(self.path / OPTIMIZER) if (self.path / OPTIMIZER).exists() else None


class Checkpointer:
    """Writes and reads the checkpoints of one stage. Only one process may write.

    Args:
        directory: made when the first checkpoint is written.
        fingerprint: JSON values that say which student the weights belong to; another one is refused at load.
        keep: how many of the newest checkpoints stay, at least 1.
        on_disk_full: "stop" raises, "continue" logs a warning and lets training go on to the next one.
    """

    def __init__(self, directory: Path | str, fingerprint: Mapping, keep: int = 2, on_disk_full: str = "stop"):
        if keep < 1:
            raise UserError(f"checkpoint.keep={keep}", "keep at least 1 checkpoint")
        if on_disk_full not in ("stop", "continue"):
            raise UserError(f"checkpoint.on_disk_full={on_disk_full!r}", "allowed: stop, continue")
        self.directory = Path(directory)
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.keep = keep
        self.on_disk_full = on_disk_full

    def names(self) -> list[str]:
        """Finished checkpoints, oldest first; nothing is said about their health."""
        return [path.name for path in checkpoint_directories(self.directory)]

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor] | None,
        state: Mapping,
        required: bool = False,
    ) -> Path | None:
        """Write a checkpoint under a temporary name, then rename it; afterwards older ones beyond `keep` go.

        Checkpoints of later steps, left behind by a run that is resumed from an earlier one, become `abandoned-...`.

        Args:
            step: optimizer steps done.
            required: raise when the disk is full even if `on_disk_full` is "continue".

        Returns:
            Its directory, or None when there was no space and training may go on.

        Raises:
            UserError: no space, or the directory cannot be written.
        """
        files = {MODEL: tensors} | ({} if optimizer is None else {OPTIMIZER: optimizer})
        needed = sum(t.numel() * t.element_size() for f in files.values() for t in f.values()) + MARGIN
        target = self.directory / f"step-{step:08d}"
        try:
            with temporary_sibling(target) as temporary:
                remove_unfinished(self.directory, "step-*")
                if (free := free_bytes(self.directory)) < needed:
                    problem = f"{rounded_bytes(needed)} needed, {rounded_bytes(free)} free"
                    return self._no_space(target, problem, required)
                temporary.mkdir()
                for name, content in files.items():
                    save_file({k: t.detach().cpu().contiguous() for k, t in content.items()}, temporary / name)
                facts = {name: _facts(temporary / name) for name in files}
                _write_state(temporary / STATE, {"fingerprint": self.fingerprint, "files": facts, "state": dict(state)})
                fsync_tree(temporary)  # before another one makes room
                self._set_aside(step)
                publish(temporary, target)
            for path in checkpoint_directories(self.directory)[: -self.keep]:
                shutil.rmtree(path)
        except (OSError, SafetensorError) as error:  # safetensors reports a failed write as its own error
            if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"cannot write checkpoint {target}: {error}", "make the directory writable") from error
            return self._no_space(target, str(error), required)
        return target

    def load(self, name: str | None = None) -> Checkpoint:
        """Open the newest checkpoint, or the one named, after checking every byte of it.

        Raises:
            CorruptCheckpoint: names the checkpoint, what is wrong, and the newest intact one.
            UserError: there is none, or it belongs to another student.
        """
        names = self.names()
        if not names:
            raise UserError(f"no checkpoint in {self.directory}", "start without --resume")
        chosen = name or names[-1]
        if chosen not in names:
            raise UserError(f"no checkpoint {chosen} in {self.directory}", f"there are: {', '.join(names)}")
        try:
            content = _read(self.directory / chosen)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(error.cause, self._other(chosen)) from error
        if differences := _differences(content["fingerprint"], self.fingerprint):
            raise UserError(
                f"checkpoint {self.directory / chosen} belongs to another student: {differences}",
                "use the student settings it was made with, or another --out",
            )
        return Checkpoint(self.directory / chosen, content["state"])

    def _other(self, corrupt: str) -> str:
        """The way out of a corrupt checkpoint: the newest intact one."""
        for name in reversed(self.names()):
            if name != corrupt:
                try:
                    _read(self.directory / name)
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
                (self.directory / name).rename(aside)
                if _number(name) == step:  # the same step written again
                    shutil.rmtree(aside)

    def _no_space(self, target: Path, problem: str, required: bool) -> None:
        cause = f"cannot write checkpoint {target}: {problem}"
        if required or self.on_disk_full == "stop":
            raise UserError(cause, "free space or move --out, then --resume; checkpoint.keep=1 needs least")
        logger.warning("%s; training goes on to the next one", cause)


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of any student, for those who only read it.

    Raises:
        UserError: it is not what was written (`CorruptCheckpoint`), or of another format.
    """
    return Checkpoint(path, _read(path)["state"])


def checkpoint_directories(stage_folder: Path) -> list[Path]:
    """Return the finished checkpoints in the folder of a stage, by their step; nothing is said about their health."""
    if not stage_folder.is_dir():
        return []
    found = (path for path in stage_folder.iterdir() if re.fullmatch(r"step-\d+", path.name))
    return sorted(found, key=lambda path: _number(path.name))


def newest_checkpoint(stage_folder: Path) -> Path | None:
    """Return the finished checkpoint of the latest step in the folder of a stage; None where there is none."""
    return next(reversed(checkpoint_directories(stage_folder)), None)


def _number(name: str) -> int:
    return int(name.removeprefix("step-"))


def _read(path: Path) -> dict:
    """state.json of a checkpoint, after its files were compared with what state.json says of them."""
    content = _read_state(path / STATE)
    for file, wanted in content["files"].items():
        if not (path / file).is_file():
            raise CorruptCheckpoint(f"checkpoint {path} is corrupt: {file} is missing")
        if (size := (path / file).stat().st_size) != wanted["bytes"]:
            raise CorruptCheckpoint(
                f"checkpoint {path} is corrupt: {file} has {size} bytes, {wanted['bytes']} were written"
            )
        if _facts(path / file) != wanted:
            raise CorruptCheckpoint(f"checkpoint {path} is corrupt: the SHA-256 of {file} is not the one written")
    return content


def _facts(path: Path) -> dict:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _write_state(path: Path, content: dict) -> None:
    content = {"format": FORMAT} | content
    text = json.dumps({"sha256": _digest(content)} | content, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _read_state(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest, form = content.pop("sha256"), content["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"checkpoint {path.parent} is corrupt: {path.name} cannot be read") from error
    if form != FORMAT:
        raise UserError(f"checkpoint {path.parent} has format {form!r}", f"this version reads format {FORMAT}")
    if digest != _digest(content):
        raise CorruptCheckpoint(f"checkpoint {path.parent} is corrupt: {path.name} was changed after it was written")
    return content


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _differences(written: Mapping, wanted: Mapping) -> str:
    keys = [k for k in sorted(set(written) | set(wanted)) if written.get(k) != wanted.get(k)]
    return ", ".join(f"{k} is {written.get(k)!r} there and {wanted.get(k)!r} here" for k in keys)
