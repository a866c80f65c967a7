"""A finished run as a GGUF file for llama.cpp, verified: every number of the header, every tensor, and the logits."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ...errors import UserError, VerificationError
from ...hybrid.model import HybridModel
from ...runs.trained import TrainedRun, open_run
from ...support.extras import import_extra
from ...support.files import replacing
from ...support.progress import Progress
from ...support.quiet import quiet_libraries
from ...support.sealed import sealed_text, unsealed
from ..limits import reasons_against
from ..output import check_disk, check_new, failures_told
from ..probe import (
    batch_of,
    fixed_batch,
    make_plain_alike,
    max_difference,
    mean_kl,
    run_tokenizer,
    student_logits,
)
from ..record import adapters_record, conversion_record, quantized_record
from ..validation import beginnings
from .engine import GGUFModel
from .layout import ARCHITECTURE, NARROW, WIDE_HEADS, FileTensor, file_tensors
from .vocabulary import Vocabulary, vocabulary

logger = logging.getLogger(__name__)

# dtype of the matrices -> llama.cpp's type of tensors, and of the file
TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
CONVERSION = "rwkvinside.conversion"  # key of the record, sealed JSON
CONTEXT = 2**20  # tokens that llama.cpp says the model can read: a recurrence has no limit
# Of logits against the trained model's with the file's weights, in units of the largest: that model computes in fp32,
# and a wrong layout is as wrong as the logits are large.
TOLERANCE = 1e-3
# fields that the library writes or makes
OF_THE_FORMAT = {"general.architecture", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
SUFFIX = ".gguf"
HINT = "convert with --recipe gguf, whose students it can run, or export --to hf"


def export_gguf(
    run: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    checkpoint: str = "best",
    adapters: str = "merge",
    base_model: str | None = None,
) -> dict:
    """Write the trained model of a run as a GGUF file that llama.cpp runs (architecture `arwkv7`).

    Args:
        run: run directory; its last finished stage is exported.
        out: file to create.
        dtype: of the matrices: "float32", "float16", "bfloat16" or "q8_0"; None: the teacher's. Norms, low-rank maps
            and vectors are fp32.
        checkpoint: of the stage, see `export_hf`.
        adapters: "merge", the only way: llama.cpp has no adapters for this architecture.
        base_model: id of the base model; default is the teacher's hub id or its directory's name.

    Returns:
        The record that the file carries, and the result of the verification.

    Raises:
        UserError: `out` exists, `run` is not finished, llama.cpp does not compute such a student or has no such
            tokenizer, not enough disk.
        VerificationError: the file does not reproduce the trained model. Nothing is left at `out`.
    """
    quiet_libraries()
    import_extra("gguf", "a GGUF file")
    run, out = open_run(run, checkpoint), check_new(out)
    if out.is_dir() or out.suffix != SUFFIX:
        raise UserError(f"output {out} is {'a directory' if out.is_dir() else 'no GGUF file'}", "name a new FILE.gguf")
    check_supported(run)
    dtype = dtype or str(run.teacher_config().dtype or torch.float32).removeprefix("torch.")
    if dtype not in TYPES:
        raise UserError(f"dtype is {dtype!r}", f"allowed: {', '.join(TYPES)}")
    if adapters != "merge":
        raise UserError(f"adapters is {adapters!r}", "a GGUF file has them merged: leave it out")
    words = _vocabulary(run)
    with failures_told(out), replacing(out) as partial:
        trained = run.load_model()
        changes = {"quantized": quantized_record(trained), "adapters": adapters_record(run, "merge")}
        make_plain_alike(trained)
        tensors = list(file_tensors(trained))
        parameters = sum(p.numel() for p in {id(p): p for p in trained.canonical_parameters().values()}.values())
        record = conversion_record(run, trained.spec, base_model or run.teacher_id, dtype, parameters) | changes
        fields = header(trained, words, dtype) | {CONVERSION: sealed_text(record, indent=2)}
        write_file(partial, fields, tensors, dtype)
        record["verification"] = compare(partial, run, trained, fields, dtype)
    if fields[f"{ARCHITECTURE}.wkv.head_size"] > NARROW:
        logger.warning(WIDE_HEADS)
    return record


def verify_gguf(path: str | Path, against: str | Path) -> dict:
    """Compare a GGUF file with its run. Nothing is written.

    Args:
        path: of the file.
        against: run directory.

    Returns:
        The result, see `compare`.

    Raises:
        UserError: the file is not one of this run's, or a run that cannot be read.
        VerificationError: the file is damaged, or does not reproduce the run.
    """
    quiet_libraries()
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file", "name a file that `export --to gguf` wrote")
    text = GGUFModel(path).field(CONVERSION)
    if text is None:
        raise UserError(f"{path} was not exported by rwkvinside", "name a file that `export --to gguf` wrote")
    try:
        record = unsealed(text)
    except ValueError as error:
        raise VerificationError(f"{path} is damaged: its record: {error}") from error
    run = open_run(against, record["checkpoint"])
    if record["run"] != run.id:
        raise UserError(f"{path} was exported from run {record['run']}, {run.path} is run {run.id}", "name its own run")
    trained = run.load_model()
    make_plain_alike(trained)
    fields = header(trained, _vocabulary(run), record["dtype"]) | {CONVERSION: text}
    return compare(path, run, trained, fields, record["dtype"])


def check_supported(run: TrainedRun) -> None:
    """Refuse a run whose student llama.cpp does not compute, before its weights are loaded.

    Raises:
        UserError: says all that it does not compute.
    """
    if reasons := reasons_against(run.teacher_config(), run.spec)["gguf"]:
        raise UserError(f"llama.cpp does not compute this student: {'; '.join(reasons)}", HINT)


def header(model: HybridModel, words: Vocabulary, dtype: str) -> dict[str, Any]:
    """Return the header of the file but its record; of Python's types int means uint32 and float fp32.

    Args:
        model: the student.
        words: its tokenizer.
        dtype: see `export_gguf`.
    """
    gguf = import_extra("gguf", "a GGUF file")
    config, mixer = model.lm.config, next(iter(model.mixer_configs.values()))
    sizes = {
        "context_length": CONTEXT,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": 0,  # wanted, not read
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "wkv.head_size": mixer.head_size,
        "attention.decay_lora_rank": mixer.rank_decay,
        "attention.iclr_lora_rank": mixer.rank_iclr,
        "attention.value_residual_mix_lora_rank": mixer.rank_value,
        "attention.gate_lora_rank": mixer.rank_gate,
        "token_shift_count": 1,
    }
    lists = {"tokens": words.tokens, "token_type": words.types, "merges": words.merges, "scores": words.scores}
    flags = {"add_bos_token": words.add_bos, "add_eos_token": words.add_eos, "add_space_prefix": words.add_space_prefix}
    names = {"unk": "unknown", "pad": "padding"}
    tokenizer = {"model": words.model, "pre": words.pre, **lists, **flags}
    tokenizer |= {f"{names.get(name, name)}_token_id": i for name, i in words.ids.items()}
    fields = {f"{ARCHITECTURE}.{name}": value for name, value in sizes.items()}
    fields |= {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items() if value is not None}
    fields |= {f"tokenizer.{name}": text for name, text in words.chat_templates.items()}
    if dtype == "q8_0":
        fields["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    return {"general.type": "model", "general.file_type": int(gguf.LlamaFileType[TYPES[dtype][1]])} | fields


def write_file(path: Path, fields: dict[str, Any], tensors: Iterable[FileTensor], dtype: str) -> None:
    """Write a file, one tensor in memory at a time.

    Raises:
        UserError: the disk is too small, or a weight is too large for fp16.
    """
    gguf = import_extra("gguf", "a GGUF file")
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for name, value in fields.items():
        writer.add_key_value(name, value, gguf.GGUFValueType[kinds[type(value)]])
    needed = 0
    for tensor in tensors:
        shape, kind = tuple(tensor.read().shape), _kind(tensor, dtype)
        size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        needed += size
    check_disk(path.parent, needed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_stored(tensor, dtype))
    writer.close()


def compare(path: Path, run: TrainedRun, trained: HybridModel, fields: dict[str, Any], dtype: str) -> dict:
    """Compare a file with the run that it comes from, and what llama.cpp computes of it with the trained model.

    Args:
        path: of the file.
        run: where it comes from.
        trained: its model, plain; its matrices are rounded as those of the file.
        fields: of the header.
        dtype: of the matrices.

    Returns:
        The result: `fields` and `tensors` that were compared; `max_difference` of logits over fixed tokens and
        `validation_rows` documents of the run's validation data, against the trained model with its matrices rounded,
        and the `tolerance`; `rounding_kl`, the mean KL in nats from the trained fp32 model on the fixed tokens.

    Raises:
        VerificationError: says what differs.
    """
    file, tensors, batch = GGUFModel(path), list(file_tensors(trained)), fixed_batch(trained.lm.config.vocab_size)
    with Progress("verifying", 3, unit="parts") as progress:
        _compare_header(file, path, fields)
        _compare_tensors(file, path, tensors, dtype)
        progress.advance(detail="header and tensors")
        exact, fixed = student_logits(trained, batch), list(batch.input_ids)
        _round(tensors, dtype)
        rows = [*fixed, *beginnings(run)]
        # the file is read once for all; what stands behind the end of a row changes nothing before it
        computed = file.logits(pad_sequence(rows, batch_first=True))
        progress.advance(detail="what llama.cpp computes")
        apart = []
        for ids, theirs in zip(rows, computed, strict=True):
            ours = student_logits(trained, batch_of(ids[None]))[0]
            apart.append((max_difference(ours, theirs[: len(ids)]), ours.abs().max().item()))
        progress.advance(detail="logits")
    difference, largest = (max(values) for values in zip(*apart, strict=True))
    if not difference <= TOLERANCE * max(1.0, largest):
        raise VerificationError(f"{path} does not reproduce {run.path}: logits differ by {difference:.3g}")
    return {
        "passed": True,
        "dtype": dtype,
        "fields": len(fields),
        "tensors": len(tensors),
        "validation_rows": len(rows) - len(fixed),
        "max_difference": difference,
        "tolerance": TOLERANCE * max(1.0, largest),
        "rounding_kl": mean_kl(exact, computed[: len(fixed), : exact.shape[1]]),
    }


def _vocabulary(run: TrainedRun) -> Vocabulary:
    tokenizer, config = run_tokenizer(run), run.teacher_config()
    if tokenizer is None:
        raise UserError("the teacher has no tokenizer, which a GGUF file holds", "export --to hf")
    return vocabulary(tokenizer, config)


def _compare_header(file: GGUFModel, path: Path, fields: dict[str, Any]) -> None:
    if odd := [name for name in file.fields if name not in fields and name not in OF_THE_FORMAT]:
        raise VerificationError(f"{path} is damaged: {odd[0]!r} was not written")
    for name, wanted in fields.items():
        found = file.field(name)
        same = np.float32(wanted) == found if isinstance(wanted, float) else found == wanted
        if not same:
            raise VerificationError(f"{path}: {name} is not what this version writes for its run")


def _compare_tensors(file: GGUFModel, path: Path, tensors: list[FileTensor], dtype: str) -> None:
    if file.tensors.keys() != {tensor.name for tensor in tensors}:
        odd = min(file.tensors.keys() ^ {tensor.name for tensor in tensors})
        raise VerificationError(f"{path} does not reproduce its run: tensor {odd} is missing, or should not be there")
    for tensor in tensors:
        stored, wanted = file.tensors[tensor.name], _stored(tensor, dtype)
        shape = tuple(map(int, reversed(stored.shape)))
        same = (stored.tensor_type, shape) == (_kind(tensor, dtype), tuple(tensor.read().shape))
        if not same or stored.data.tobytes() != wanted.tobytes():
            raise VerificationError(f"{path} does not reproduce its run: tensor {tensor.name} differs")


def _kind(tensor: FileTensor, dtype: str) -> Any:
    """Return llama.cpp's type of a tensor; rows that its blocks do not divide stay fp16."""
    kinds = import_extra("gguf", "a GGUF file").GGMLQuantizationType
    if tensor.rounded is None:
        return kinds.F32
    if dtype == "q8_0" and tensor.rounded.shape[-1] % 32:
        return kinds.F16
    return kinds[TYPES[dtype][0]]


def _stored(tensor: FileTensor, dtype: str) -> np.ndarray:
    """Return a tensor as the file holds it."""
    gguf, kind = import_extra("gguf", "a GGUF file"), _kind(tensor, dtype)
    values = tensor.read().numpy()
    if kind == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise UserError(f"tensor {tensor.name} has weights that float16 does not hold", "export with --dtype bfloat16")
    return np.ascontiguousarray(gguf.quants.quantize(values, kind))


@torch.no_grad()
def _round(tensors: list[FileTensor], dtype: str) -> None:
    """Give the model's matrices the numbers of the file."""
    gguf = import_extra("gguf", "a GGUF file")
    for tensor in tensors:
        if (weight := tensor.rounded) is not None:
            kind = _kind(tensor, dtype)
            stored = gguf.quants.quantize(weight.detach().float().numpy(), kind)
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind).copy()).view_as(weight))
