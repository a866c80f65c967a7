"""The files of a teacher: where they are on this machine, and what tells one teacher from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from ..errors import UserError
from ..support.digests import FileDigests
from ..support.weight_index import check_shards
from .settings import TeacherConfig
from .tokenizer_files import TOKENIZER_FILES, tokenizer_folder

# Of a teacher's repository, what a release passes on unchanged beside the tokenizer
LEGAL_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
CONFIGURATION = ("config.json", "generation_config.json")
WEIGHTS = ("*.safetensors", "*.bin")  # the second kind counts where there is none of the first


def model_folder(path: str, revision: str | None) -> Path:
    """Return the directory of a model with its weights, downloaded where it is a hub id.

    Raises:
        UserError: it is neither here nor on the hub.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        for kind in WEIGHTS:
            patterns = [kind, "*.index.json", *CONFIGURATION, *TOKENIZER_FILES]
            # other copies of the same weights, which transformers does not read
            nested = ["*/*.safetensors", "*/*.bin", "consolidated*"]
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=nested))
            if any(folder.glob(kind)):
                break
    except (OSError, ValueError) as error:
        raise UserError(
            f"the weights of teacher {path} cannot be loaded: {' '.join(str(error).split())}",
            "check the directory or the hub id, the network and your access",
        ) from error
    return folder


def model_identity(path: str, revision: str | None, digests: FileDigests) -> dict[str, str]:
    """Return what tells a model from another one, as JSON values by a name that a message can use.

    Args:
        path: local directory or hub id, which is downloaded.
        revision: of the hub repository.
        digests: remember what was read before.

    Raises:
        UserError: there is no such model, or its index names files elsewhere.
    """
    folder = model_folder(path, revision)
    check_shards(folder)
    try:
        return {
            "weights": _hash(sorted(digests.of_all(_weights(folder)))),
            "tokenizer": _named(folder, TOKENIZER_FILES, digests),
            "configuration": _named(folder, CONFIGURATION, digests),
        }
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}", "restore the teacher's files") from error


def base_identity(teacher: TeacherConfig, digests: FileDigests) -> dict[str, str]:
    """Return what tells the model that a run starts from from another one, see `model_identity`.

    A fresh one has no files but those of its tokenizer; its weights follow from its configuration and the run's seed.
    """
    if not teacher.fresh:
        return model_identity(teacher.path, teacher.revision, digests)
    folder = tokenizer_folder(teacher.path, teacher.revision)
    configuration = _hash([json.dumps(teacher.config, sort_keys=True)])
    return {"tokenizer": _named(folder, TOKENIZER_FILES, digests), "configuration": configuration}


def check_unchanged(what: str, noted: dict[str, str], current: dict[str, str]) -> None:
    """Refuse a model that is not the one that a run was begun with.

    Args:
        what: the model, for the message.
        noted, current: of `model_identity`.

    Raises:
        UserError: says which of its files differ.
    """
    if changed := [name for name in noted if noted[name] != current.get(name)]:
        raise UserError(
            f"{what} is not the one that the run was begun with: its {' and '.join(changed)} changed",
            "put the original files back (for a hub id: pin teacher.revision), or begin a new run with --out",
        )


def local_hashes(path: str, revision: str | None, digests: FileDigests) -> tuple[str, str] | tuple[None, None]:
    """Return a hash of a model's weights, whatever its files are called, and one of its configuration.

    None: it is not on this machine.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(cached_file(path, CONFIGURATION[0], revision=revision, local_files_only=True)).parent
        except OSError:
            return None, None
    files = _weights(folder)
    if not files:
        return None, None
    return _hash(sorted(digests.of_all(files)))[:16], _named(folder, CONFIGURATION[:1], digests)[:16]


def _weights(folder: Path) -> list[Path]:
    return next((files for kind in WEIGHTS if (files := sorted(folder.glob(kind)))), [])


def _named(folder: Path, names: Iterable[str], digests: FileDigests) -> str:
    files = sorted({file for name in names for file in folder.glob(name) if file.is_file()})
    named = zip(files, digests.of_all(files), strict=True)
    return _hash(f"{file.relative_to(folder)} {digest}" for file, digest in named)


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(lines).encode()).hexdigest()
