"""The files of a teacher's tokenizer: what an export carries of them, and what it cannot carry."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..errors import UserError
from .settings import TeacherConfig

# Below a model's directory, of whatever tokenizer; its own code is found by `tokenizer_files`.
TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
BYTES = "bytes"  # the name of the shipped tokenizer: one id a byte, and one for the end of a text
MODELING = Path(__file__).parent.parent / "modeling"  # its files are in every export, too


def tokenizer_source(name: str) -> str:
    """Return what transformers loads a tokenizer from: the directory of the shipped one, or the name itself."""
    return str(files("rwkvinside.recipes").joinpath("lm", BYTES)) if name == BYTES else name


def tokenizer_folder(name: str, revision: str | None) -> Path:
    """Return the directory of a tokenizer without a model, downloaded where it is a hub id.

    Raises:
        UserError: it is neither here nor on the hub.
    """
    source = tokenizer_source(name)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[*TOKENIZER_FILES, "*.py"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer {name} cannot be loaded: {' '.join(str(error).split())}",
            f"give {BYTES}, the directory of a tokenizer, or a hub id; check the network",
        ) from error


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of the tokenizer in a model's directory, the code that comes with it included.

    Code is what `auto_map` of tokenizer_config.json names, and what that imports from the same directory.
    """
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.suffix != ".py"}
    for module in _modules(_classes(str(folder), None)):
        code = folder / f"{module}.py"
        if code.is_file():
            files |= {code, *map(Path, get_relative_import_files(str(code)))}
    return sorted(file for file in files if file.is_file())


def check_tokenizer_code(teacher: TeacherConfig) -> None:
    """Refuse a tokenizer whose own code is not to be run, or cannot travel with an export.

    Raises:
        UserError: code that was not allowed, although users of the export would run it; code that is in another
            repository, is missing, or has the name of a file that exports have already.
    """
    classes = _classes(teacher.path, teacher.revision)
    if not classes:
        return
    cause = f"the tokenizer of teacher {teacher.path} comes with code of its own ({', '.join(classes)})"
    if not teacher.trust_remote_code:
        raise UserError(
            f"{cause}, which was not allowed to run, and users of the export would run it",
            "teacher.trust_remote_code=true runs it; or remove auto_map from its tokenizer_config.json",
        )
    if elsewhere := [name for name in classes if "--" in name]:
        raise UserError(
            f"{cause} from another repository: {elsewhere[0]}", "copy the code into the teacher's directory"
        )
    folder = Path(teacher.path)
    if not folder.is_dir():  # a hub id: its files are downloaded for the export
        return
    if missing := [module for module in _modules(classes) if not (folder / f"{module}.py").is_file()]:
        raise UserError(f"{cause}, and {folder / missing[0]}.py is missing", "copy it into the teacher's directory")
    if taken := [file.name for file in tokenizer_files(folder) if (MODELING / file.name).exists()]:
        raise UserError(f"{cause}, and {taken[0]} is the name of a file of every export", "rename the tokenizer's file")


def _classes(path: str, revision: str | None) -> list[str]:
    """Return the tokenizer classes that a model brings along, such as "tok.MyTokenizer"."""
    try:
        auto_map = get_tokenizer_config(tokenizer_source(path), revision=revision).get("auto_map") or ()
    except (OSError, ValueError):  # there is no such model: who loads it says so
        return []
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    return [name for name in ([entry] if isinstance(entry, str) else entry or ()) if name]


def _modules(classes: list[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[0] for name in classes if "--" not in name})
