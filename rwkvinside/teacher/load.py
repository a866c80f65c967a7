"""Load a teacher: its configuration, tokenizer and weights."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from ..errors import UserError
from ..families.fused_layers import NOTHING, Fused, fuse_layers
from ..families.registry import find
from ..support.weight_index import check_shards
from .fresh import fresh_model
from .settings import TeacherConfig
from .tokenizer_files import tokenizer_source

# What transformers raises over values of a configuration that it did not expect.
BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)
# The same over files with weights, those of pytorch_model.bin included.
DAMAGED = (*BROKEN, EOFError, SafetensorError, UnpicklingError, struct.error)
POINTER = b"version https://git-lfs"


def load_teacher(path: str, revision: str | None, dtype: torch.dtype, *, fused: Fused = NOTHING) -> PreTrainedModel:
    """Return a teacher with its weights, on the CPU, in evaluation mode.

    Args:
        path: local directory or hub id.
        revision: branch, tag or commit of the hub repository.
        dtype: to load the weights in.
        fused: what runs as one kernel, see `fuse_layers`.

    Raises:
        UserError: weights that are missing, damaged, incomplete or not all used.
    """
    check_shards(Path(path))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, output_loading_info=True
        )
    except DAMAGED as error:
        raise UserError(
            f"the weights of teacher {path} cannot be loaded: {_one_line(error)}",
            "check the directory or the hub id, the network and your access",
        ) from error
    if problems := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise UserError(f"the weights of teacher {path} do not fit its configuration: {problems}")
    fuse_layers(model, fused)
    return model.eval()


def load_base(teacher: TeacherConfig, dtype: torch.dtype, *, fused: Fused = NOTHING) -> PreTrainedModel:
    """Return the model that a student is made from, on the CPU, in evaluation mode: a teacher, or a fresh one.

    Args:
        teacher: settings of the run.
        dtype: of the weights.
        fused: see `load_teacher`.

    Raises:
        UserError: see `load_teacher`.
    """
    if not teacher.fresh:
        return load_teacher(teacher.path, teacher.revision, dtype, fused=fused)
    model = fresh_model(teacher_config(teacher), dtype)
    fuse_layers(model, fused)
    return model


def teacher_config(teacher: TeacherConfig) -> PretrainedConfig:
    """Return a teacher's Hugging Face configuration.

    Where the teacher's preset has it, no network is needed.

    Raises:
        UserError: the configuration contradicts itself.
    """
    where = "teacher.config" if teacher.config else f"the configuration of teacher {teacher.path}"
    try:
        return _config(teacher)
    except BROKEN as error:
        raise UserError(f"{where} is not usable: {_problem(error)}", "correct it or leave it out") from error


def _config(teacher: TeacherConfig) -> PretrainedConfig:
    fields = dict(teacher.config or {})
    if fields:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoConfig.from_pretrained(teacher.path, revision=teacher.revision)


def open_tokenizer(teacher: TeacherConfig) -> PreTrainedTokenizerBase:
    """Return a teacher's tokenizer.

    Raises:
        UserError: there is none, it fails at a letter, or it comes with code that was not allowed.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_source(teacher.path), revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
        )
        tokenizer("a")  # settings of a wrong type are loaded, and fail at the first use
        return tokenizer
    except Exception as error:  # tokenizers raises nothing narrower for a file that it cannot read
        whose = "" if teacher.fresh else "of teacher "
        needs = "the directory needs a tokenizer.json; teacher.trust_remote_code=true runs code that comes with it"
        if teacher.fresh:
            needs = "give tokenizer=DIR with a tokenizer.json, or a hub id and a network; --config tiny needs neither"
        raise UserError(f"the tokenizer {whose}{teacher.path} cannot be loaded: {_one_line(error)}", needs) from error


def meta_teacher(teacher: TeacherConfig) -> PreTrainedModel:
    """Return a teacher without its weights, on the meta device.

    Raises:
        UserError: its configuration contradicts itself, or its family cannot compute it.
    """
    config = teacher_config(teacher)
    try:
        find(config.model_type).check(config)
    except UserError as error:
        raise UserError(error.cause.replace("the teacher", f"teacher {teacher.path}", 1), error.hint) from error
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except BROKEN as error:
        raise UserError(
            f"no model can be made from the configuration of teacher {teacher.path}: {_problem(error)}",
            "correct its config.json, or use the original",
        ) from error


def check_files(teacher: TeacherConfig) -> None:
    """Refuse a teacher on this machine whose files are damaged or of another model; read no weights.

    Raises:
        UserError: names the file and what it is: a git-lfs pointer, cut off, or with tensors of other shapes.
    """
    model, folder = meta_teacher(teacher), Path(teacher.path)
    if teacher.fresh or not folder.is_dir():
        return
    for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.bin")):
        _check_pointer(file)
    for file in sorted(folder.glob("pytorch_model*.bin")):
        _check_pickle(file)
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        files = [folder / name for name in sorted(set(_json_object(index).get("weight_map", {}).values()))]
    shapes: dict[str, tuple[Path, list[int]]] = {}
    for file in files:
        shapes |= {name: (file, shape) for name, shape in _tensor_shapes(file).items()}
    hint = "config.json and weights are not of one model: copy both again"
    own = model.state_dict()
    # published files may have other tensors than the model: one for each expert, say
    forms = [{n: list(t.shape) for n, t in form.items()} for form in (own, revert_weight_conversion(model, own))]
    wanted = max(forms, key=lambda form: len(form.keys() & shapes.keys()))
    for name, (file, shape) in shapes.items():
        if name in wanted and shape != wanted[name]:
            raise UserError(f"{file}: {name} has shape {shape}, the configuration wants {wanted[name]}", hint)
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    missing = wanted.keys() - shapes.keys() - tied
    if missing and not shapes.keys().isdisjoint(wanted):
        raise UserError(f"{folder}: the weights lack {min(missing)} (of {len(missing)} that are missing)", hint)


def _check_pointer(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file} does not exist", "copy the whole model directory")
    with file.open("rb") as content:
        if content.read(len(POINTER)) == POINTER:
            raise UserError(f"{file} is a git-lfs pointer, not the file itself", "fetch it: git lfs pull")


def _check_pickle(file: Path) -> None:
    with file.open("rb") as content:
        is_old = content.read(1) == b"\x80"  # a pickle without a zip around it
    if not is_old and not zipfile.is_zipfile(file):
        raise UserError(f"{file} is damaged, or not a file of weights", "copy it again")


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes in the header of a .safetensors file.

    Raises:
        UserError: it is cut off, or something else.
    """
    _check_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = content.read(min(length, size))
    try:
        tensors = {name: facts for name, facts in json.loads(header).items() if name != "__metadata__"}
        whole = 8 + length + max((facts["data_offsets"][1] for facts in tensors.values()), default=0)
        shapes = {name: facts["shape"] for name, facts in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        what = f"cut off at {size:,} bytes" if 8 + length > size else "not a .safetensors file, or damaged"
        raise UserError(f"{file} is {what}", "copy it again") from error
    if size < whole:
        raise UserError(f"{file} is cut off at {size:,} of {whole:,} bytes", "copy it again")
    if size > whole:
        raise UserError(f"{file} has {size:,} bytes, its header tells of {whole:,}", "copy it again")
    return shapes


def _json_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {_problem(error)}", "copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object", "copy it again")
    return content


def _problem(error: Exception) -> str:
    """Return an error of a library in one line that also says what kind it is, such as a missing key."""
    return f"{type(error).__name__}: {_one_line(error)}"[:400]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
