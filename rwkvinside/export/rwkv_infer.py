"""A finished run as RWKV-Infer (OpenMOSE/RWKV-Infer) reads it: a directory of safetensors, or a `.pth`.

In a directory tensors have the names of Hugging Face exports. The first RWKV layer has the matrices of residual mixes,
too, which that program asks for and does not apply. What is written is read back as the importer reads checkpoints of
others; the student that it finds must have the run's tensors and compute the trained model's logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, VerificationError
from ..hybrid.model import HybridModel
from ..importers.names import Names
from ..importers.student import Student, read_student
from ..modeling.mixer_presets import TimeMixerConfig
from ..runs.trained import TrainedRun, open_run
from ..support.files import replacing
from ..support.quiet import quiet_libraries
from ..support.sealed import sealed_text
from ..teacher.load import load_base
from ..teacher.settings import TeacherConfig
from ..teacher.tokenizer_files import check_tokenizer_code
from .build import copy_teacher_files
from .card import model_card
from .manifest import CONVERSION, digests, read_with_run
from .output import check_disk, check_new, failures_told
from .probe import ROWS, TOKENS, fixed_batch, make_plain_alike, max_difference, student_logits
from .record import adapters_record, conversion_record, quantized_record
from .registry import RWKV_INFER
from .rwkv_infer_limits import ARCHITECTURE, misfits
from .weights import DTYPES, stored_dtype

TOLERANCE = 1e-5  # of logits of 1 and less, else relative to the largest: both models run the same operations
PTH, WEIGHTS = ".pth", "model.safetensors"
CONFIG = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "max_position_embeddings")

OLDER = (
    " It is for versions before September 2025: later ones read a `.pth` no more, and need an export to a directory."
)
USAGE = """For [RWKV-Infer](https://github.com/OpenMOSE/RWKV-Infer).{older} Copy this directory, without the weights, to
`rwkvengine/{name}` there; its name is the `template` from which tokenizer and chat template are read. Start the server
with `--max_ctxlen` for the longest context, since later positions all count as the last one, and load the model:

```sh
curl http://127.0.0.1:9000/loadmodel -X POST -H "Content-Type: application/json" -d '{request}'
```"""


def export_rwkv_infer(
    run: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    checkpoint: str = "best",
    adapters: str = "merge",
    base_model: str | None = None,
) -> dict:
    """Write the trained model of a run for RWKV-Infer, whose hybrids are `hxa079`.

    Embedding and head are two matrices.

    Args:
        run: run directory; its last finished stage is exported.
        out: directory to create; or a file to create whose name ends in .pth, with a directory of the same name
            without .pth beside it for everything else.
        dtype, checkpoint, base_model: as of `export_hf`.
        adapters: "merge", the only way.

    Returns:
        conversion.json of the export.

    Raises:
        UserError: the student or its teacher is something that RWKV-Infer does not compute (a line each), `out` exists,
            `run` is not finished, not enough disk, or a file cannot be written.
        VerificationError: what was written does not reproduce the trained model. Nothing is left.
    """
    quiet_libraries()
    run, out = open_run(run, checkpoint), Path(out)
    folder = out.with_suffix("") if out.suffix == PTH else out
    _check(run, dtype)
    if adapters != "merge":
        raise UserError(f"adapters is {adapters!r}", "exports for RWKV-Infer have them merged: leave it out")
    check_new(out)
    check_new(folder)
    with failures_told(out), ExitStack() as stack:
        partial = stack.enter_context(replacing(folder))
        weights = stack.enter_context(replacing(out)) if out.suffix == PTH else partial / WEIGHTS
        partial.mkdir()
        trained = run.load_model()
        changes = {"quantized": quantized_record(trained), "adapters": adapters_record(run, "merge")}
        stored = DTYPES[dtype] if dtype else run.teacher_config().dtype or torch.float32
        tensors, logits = _trained(trained, stored)
        layers = {"rwkv_layers": trained.rwkv_layers, "attention_layers": list(trained.spec.attention_layers)}
        spec, mixer, names = trained.spec, trained.mixer_configs[trained.rwkv_layers[0]], Names(trained.family)
        del trained
        unread = _unread_tensors(names, layers["rwkv_layers"][0], mixer, stored)
        check_disk(folder.parent, sum(t.numel() * t.element_size() for t in (tensors | unread).values()))
        _write_files(run, partial, mixer, stored)
        _write_weights(tensors | unread, weights, names if out.suffix == PTH else None)
        parameters = sum(t.numel() for t in tensors.values())
        source = base_model or run.teacher_id
        report = conversion_record(run, spec, source, str(stored).removeprefix("torch."), parameters)
        report |= layers | {"tie_word_embeddings": False} | changes
        report["verification"] = _compare(run, weights if out.suffix == PTH else partial, tensors, logits)
        _describe(run, partial, out, report)
    return report


def verify_rwkv_infer(path: str | Path, against: str | Path) -> dict:
    """Compare an export for RWKV-Infer with its run. Nothing is written.

    Args:
        path: what `export_rwkv_infer` wrote, the directory or the `.pth` beside it.
        against: run directory.

    Raises:
        UserError: not such an export, or a run that cannot be read.
        VerificationError: it is damaged, or does not reproduce the run.
    """
    quiet_libraries()
    path = Path(path)
    folder = path.with_suffix("") if path.suffix == PTH else path
    conversion, run = read_with_run(folder, against)
    if path == folder and not (folder / WEIGHTS).is_file():
        path = folder.with_name(f"{folder.name}{PTH}")
    _check(run, conversion["dtype"])
    return _compare(run, path, *_trained(run.load_model(), DTYPES[conversion["dtype"]]))


def _check(run: TrainedRun, dtype: str | None) -> None:
    """Refuse what cannot be served, before anything is loaded."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}", f"allowed: {', '.join(DTYPES)}")
    if lines := misfits(run.teacher_config(), run.spec):
        raise UserError(
            f"RWKV-Infer does not compute what {run.path} has trained:",
            "--to hf exports every student; docs/engines.md tells how one for RWKV-Infer is trained",
            lines,
        )
    check_tokenizer_code(TeacherConfig.model_validate(run.config["teacher"]))


@torch.no_grad()
def _trained(model: HybridModel, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of an export by canonical name, and the logits of the model with just these.

    Raises:
        VerificationError: merging adapters and unpacking quantized weights changes what the model computes.
    """
    make_plain_alike(model)
    model.untie()
    parameters = model.canonical_parameters()
    tensors = {name: p.detach().to(stored_dtype(name, dtype), copy=True) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    return tensors, student_logits(model, fixed_batch(model.lm.config.vocab_size))


def _unread_tensors(names: Names, layer: int, mixer: TimeMixerConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the residual mixes of the first RWKV layer, which are asked for and not applied."""
    width, found = mixer.num_kv_heads * mixer.head_size, {}
    for part, rank in (("v", mixer.rank_value), ("k", mixer.rank_key)):
        for i, shape in enumerate(((1, 1, width), (mixer.hidden_size, rank), (rank, width))):
            name = names.in_attention(layer, f"{part}{i}")
            found[name] = torch.zeros(shape, dtype=stored_dtype(name, dtype))
    return found


def _write_files(run: TrainedRun, folder: Path, mixer: TimeMixerConfig, dtype: torch.dtype) -> None:
    """Write the configuration, and copy tokenizer and licenses."""
    teacher = run.teacher_config()
    config = {name: value for name in CONFIG if (value := getattr(teacher, name, None)) is not None}
    config |= {
        "model_type": RWKV_INFER,  # transformers knows no such model, and says so
        "rwkv_architecture": ARCHITECTURE,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_size,
        "rms_norm_eps": teacher.rms_norm_eps,
        "rope_theta": teacher.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "teacher_model": run.teacher_id,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_teacher_files(run, folder)


def _write_weights(tensors: Mapping[str, Tensor], file: Path, names: Names | None) -> None:
    """Write tensors under their own names as safetensors; with `names` under RWKV-Infer's as a pickle."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if names is not None:
        torch.save({names.rwkv_infer(name): tensor for name, tensor in contiguous.items()}, file)
    else:
        save_file(contiguous, file, metadata={"format": "pt"})
        file.chmod((file.parent / "config.json").stat().st_mode)  # safetensors writes files for their owner alone


def _compare(run: TrainedRun, written: Path, tensors: Mapping[str, Tensor], logits: Tensor) -> dict:
    """Read an export back, and compare its tensors and its logits with the trained model's.

    Raises:
        VerificationError: says what differs.
    """
    try:
        found: Student = read_student(written, run.teacher_config())
    except UserError as error:
        raise VerificationError(f"what was written cannot be read back: {error.cause}", error.hint) from error
    names = sorted(tensors.keys() | found.tensors.keys())
    if wrong := [name for name in names if not _equal(found.tensors.get(name), tensors.get(name))]:
        raise VerificationError(f"{len(wrong)} tensors are not those of the run, first {wrong[0]}")
    model = HybridModel.from_teacher(load_base(run.base, torch.float32), found.spec).eval()
    model.load_student_state_dict({name: tensor.float() for name, tensor in found.tensors.items()})
    difference = max_difference(student_logits(model, fixed_batch(model.lm.config.vocab_size)), logits)
    if not difference <= _tolerance(logits):
        raise VerificationError(
            f"what was written does not compute what {run.path} does: logits differ by {difference:.3g}"
        )
    return {
        "passed": True,
        "tensors": len(tensors),
        "tokens": ROWS * TOKENS,
        "max_difference": difference,
        "tolerance": _tolerance(logits),
    }


def _tolerance(logits: Tensor) -> float:
    return TOLERANCE * max(1.0, logits.abs().max().item())


def _equal(found: Tensor | None, wanted: Tensor | None) -> bool:
    return found is not None and wanted is not None and found.dtype == wanted.dtype and torch.equal(found, wanted)


def _describe(run: TrainedRun, folder: Path, out: Path, report: dict) -> None:
    """Write the card, and conversion.json with the SHA-256 of every other file of the directory."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = out.stem if out.suffix == PTH else out.name
    request = {"model_filename": f"models/{out.name}", "model_viewname": name, "model_strategy": "", "template": name}
    request |= {key: f"{config[key]:g}" for key in ("rope_theta", "rms_norm_eps")}
    usage = USAGE.format(name=name, request=json.dumps(request), older=OLDER if out.suffix == PTH else "")
    card = model_card(report, run.teacher_files() / "README.md", usage, None, "Read back")
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    report["files"] = digests(folder)
    (folder / CONVERSION).write_text(sealed_text(report, indent=2), encoding="utf-8")
