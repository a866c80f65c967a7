"""A finished run as a directory that mlx-lm loads, verified: what mlx-lm computes of it is what was trained.

The tensors are those of the export for transformers; the model file is `hybrid_mlx.py`, as it is here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...errors import UserError, VerificationError
from ...hybrid.model import HybridModel
from ...modeling import mlx as mlx_models
from ...runs.trained import TrainedRun, open_run
from ...support.files import replacing
from ...support.progress import Progress
from ...support.quiet import quiet_libraries
from ...support.sealed import sealed_text
from ...teacher.settings import TeacherConfig
from ...teacher.tokenizer_files import check_tokenizer_code
from ..build import build_hybrid, copy_teacher_files
from ..card import model_card
from ..limits import reasons_against
from ..manifest import CONVERSION, digests, read_with_run
from ..output import check_disk, check_new, failures_told
from ..probe import batch_of, fixed_batch, make_plain_alike, student_logits
from ..record import adapters_record, conversion_record, quantized_record
from ..registry import MLX_FILE
from ..validation import beginnings
from ..weights import DTYPES, stored_dtype
from .configuration import configuration, name_of
from .engine import Engine, mlx_lm
from .limits import MODULES, TIED, UNTIED

# Of fp32 logits, in units of the largest, for any token and for the median one: where activations are massive, as at
# the first token of many models, they make much of what another order of sums leaves
TOLERANCE, TYPICAL = 1e-3, 3e-5
DOCUMENTS, BEGINNING = 2, 64  # of validation data, and their tokens: MLX is slow on a CPU

USAGE = """For [mlx-lm](https://github.com/ml-explore/mlx-lm) on Apple silicon, with the model code of this directory:

```sh
pip install mlx-lm
mlx_lm.generate --model {name} --trust-remote-code --prompt "Once upon a time"
mlx_lm.chat --model {name} --trust-remote-code
mlx_lm.convert --hf-path {name} --mlx-path {name}-4bit --quantize --trust-remote-code    # smaller and faster
```"""


def export_mlx(
    run: str | Path,
    out: str | Path,
    dtype: str | None = None,
    tie_embeddings: bool | None = None,
    *,
    checkpoint: str = "best",
    adapters: str = "merge",
    base_model: str | None = None,
    max_shard_size: str = "5GB",
) -> dict:
    """Write the trained model of a run as a directory for mlx-lm, with the model file that it loads.

    Args:
        run: run directory; its last finished stage is exported.
        out: directory to create.
        dtype, tie_embeddings, checkpoint, base_model, max_shard_size: as of `export_hf`.
        adapters: "merge", the only way.

    Returns:
        conversion.json of the export, see `export_hf`.

    Raises:
        UserError: mlx-lm is not installed, `out` is not empty, `run` is not finished, the student or its teacher is
            something that mlx-lm does not compute, not enough disk, or a file cannot be written.
        VerificationError: what was written does not reproduce the trained model. Nothing is left at `out`.
    """
    quiet_libraries()
    mlx_lm()
    run, out = open_run(run, checkpoint), check_new(out)
    _check(run, dtype)
    if adapters != "merge":
        raise UserError(f"adapters is {adapters!r}", "exports for MLX have them merged: leave it out")
    with failures_told(out), replacing(out) as partial:
        partial.mkdir()
        trained = run.load_model()
        changes = {"quantized": quantized_record(trained), "adapters": adapters_record(run, adapters)}
        make_plain_alike(trained)
        model = _built(run, trained, dtype, tie_embeddings)
        check_disk(out.parent, sum(p.numel() * p.element_size() for p in model.parameters()))
        _write_files(run, trained, model, partial, max_shard_size)
        report = _record(run, trained, model, base_model) | changes
        del model
        report["verification"] = compare(partial, run, trained, DTYPES[report["dtype"]])
        _describe(run, partial, out.name, report)
    return report


def verify_mlx(folder: str | Path, against: str | Path) -> dict:
    """Compare a directory for mlx-lm with its run. Nothing is written.

    Args:
        folder: what `export_mlx` wrote.
        against: run directory.

    Returns:
        The result, see `compare`.

    Raises:
        UserError: mlx-lm is not installed, not such an export, or a run that cannot be read.
        VerificationError: it is damaged, or does not reproduce the run.
    """
    quiet_libraries()
    mlx_lm()
    folder = Path(folder)
    conversion, run = read_with_run(folder, against)
    _check(run, conversion["dtype"])
    trained = run.load_model()
    make_plain_alike(trained)
    model = _built(run, trained, conversion["dtype"], conversion["tie_word_embeddings"])
    for name, wanted in (
        (MLX_FILE, _model_file().read_text(encoding="utf-8")),
        ("config.json", _config_text(run, trained, model)),  # which names the code that is loaded below
    ):
        if not (folder / name).is_file() or (folder / name).read_bytes() != wanted.encode():
            raise VerificationError(
                f"{folder}: {name} is not what this version writes", "use the version of rwkvinside that exported it"
            )
    del model
    return compare(folder, run, trained, DTYPES[conversion["dtype"]])


def compare(folder: Path, run: TrainedRun, trained: HybridModel, stored: torch.dtype) -> dict:
    """Compare what mlx-lm computes of a directory with the trained model.

    Args:
        folder: of the export, whose code is run.
        run: where it comes from.
        trained: its model, plain; its parameters are rounded to those of the directory.
        stored: dtype of the weights.

    Returns:
        The result: `max_difference` and `median_difference` of a token's fp32 logits, over fixed tokens, in one pass
        and through the caches, and over the beginnings of `validation_rows` documents of the run's validation data;
        their `tolerance` and `median_tolerance`.

    Raises:
        VerificationError: says what differs.
    """
    _round(trained, stored)
    fixed, engine = fixed_batch(trained.lm.config.vocab_size), Engine(folder)
    rows = [ids[None, :BEGINNING] for ids in beginnings(run)[:DOCUMENTS]]
    passes = [(fixed.input_ids, engine.logits), (fixed.input_ids[:1], engine.in_pieces)]
    apart, largest = [], 1.0
    with Progress("verifying", len(passes) + len(rows), unit="texts") as progress:
        for ids, logits in [*passes, *((ids, engine.logits) for ids in rows)]:
            wanted = student_logits(trained, batch_of(ids))
            apart.append((wanted - logits(ids)).abs().amax(-1).flatten())
            largest = max(largest, wanted.abs().max().item())
            progress.advance()
    differences = torch.cat(apart)
    result = {
        "passed": True,
        "tokens": differences.numel(),
        "validation_rows": len(rows),
        "max_difference": differences.max().item(),
        "tolerance": TOLERANCE * largest,
        "median_difference": differences.median().item(),
        "median_tolerance": TYPICAL * largest,
    }
    for found, allowed in (("max_difference", "tolerance"), ("median_difference", "median_tolerance")):
        if not result[found] <= result[allowed]:
            raise VerificationError(
                f"{folder} does not reproduce {run.path}: {found} of logits is {result[found]:.3g}, "
                f"allowed are {result[allowed]:.3g}"
            )
    return result


def _check(run: TrainedRun, dtype: str | None) -> None:
    """Refuse what cannot be served, before anything is loaded."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}", f"allowed: {', '.join(DTYPES)}; mlx_lm.convert quantizes the export")
    if lines := reasons_against(run.teacher_config(), run.spec)["mlx"]:
        raise UserError(f"mlx-lm does not compute what {run.path} has trained:", "--to hf exports every student", lines)
    check_tokenizer_code(TeacherConfig.model_validate(run.config["teacher"]))


def _model_file() -> Path:
    return Path(mlx_models.__file__).with_name(MLX_FILE)


@torch.no_grad()
def _round(trained: HybridModel, stored: torch.dtype) -> None:
    """Round the parameters of a model to those of an export."""
    for name, parameter in trained.canonical_parameters().items():
        parameter.copy_(parameter.to(stored_dtype(name, stored)))


def _built(run: TrainedRun, trained: HybridModel, dtype: str | None, tie_embeddings: bool | None) -> PreTrainedModel:
    """Return the export for transformers, whose tensors are written.

    Raises:
        UserError: embedding and head are one matrix, or two, and mlx-lm's model of the family has it otherwise.
    """
    teacher = run.teacher_config()
    module = MODULES[teacher.model_type]
    if tie_embeddings is None and module in UNTIED:
        tie_embeddings = False
    model = build_hybrid(trained, run, DTYPES[dtype] if dtype else teacher.dtype or torch.float32, tie_embeddings)
    tied = model.config.tie_word_embeddings
    if module in (UNTIED if tied else TIED):
        has, wants = ("one matrix", "two") if tied else ("two matrices", "one")
        raise UserError(f"embedding and head are {has}; mlx-lm's {module} has {wants}", "export --to hf")
    return model


def _record(run: TrainedRun, trained: HybridModel, model: PreTrainedModel, base_model: str | None) -> dict:
    """Return what conversion.json says of the model."""
    dtype = name_of(model.config.dtype)
    layers = {"rwkv_layers": trained.rwkv_layers, "attention_layers": list(trained.spec.attention_layers)}
    report = conversion_record(run, trained.spec, base_model or run.teacher_id, dtype, model.num_parameters())
    return report | layers | {"tie_word_embeddings": model.config.tie_word_embeddings}


def _describe(run: TrainedRun, folder: Path, name: str, report: dict) -> None:
    """Write the card, and conversion.json with the SHA-256 of every other file."""
    usage = USAGE.format(name=name)
    card = model_card(report, run.teacher_files() / "README.md", usage, "mlx", "Loaded by mlx-lm")
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    report["files"] = digests(folder)
    (folder / CONVERSION).write_text(sealed_text(report, indent=2), encoding="utf-8")


def _config_text(run: TrainedRun, trained: HybridModel, model: PreTrainedModel) -> str:
    return json.dumps(configuration(run.teacher_config(), model.config, trained), indent=2) + "\n"


def _write_files(
    run: TrainedRun, trained: HybridModel, model: PreTrainedModel, folder: Path, max_shard_size: str
) -> None:
    """Write everything but the card and conversion.json."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(_config_text(run, trained, model), encoding="utf-8")
    for file in folder.glob("*.safetensors"):  # which safetensors writes for their owner alone
        file.chmod((folder / "config.json").stat().st_mode)
    trained.lm.generation_config.to_json_file(folder / "generation_config.json")
    shutil.copyfile(_model_file(), folder / MLX_FILE)
    copy_teacher_files(run, folder)
