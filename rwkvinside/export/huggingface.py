"""A finished run as a Hugging Face model directory that needs torch and transformers only.

Every tensor of the exported model must have exactly one source. The directory is built next to its final place,
verified in a fresh process against the trained model, and only then renamed. `card.py` writes the model card.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from .. import __version__
from ..errors import UserError
from ..hybrid.adapters import adapter_directory
from ..hybrid.assemble import take_adapters
from ..hybrid.model import HybridModel
from ..hybrid.quantized_linear import relative_error
from ..runs.trained import TrainedRun, open_run, public_name
from ..support.files import free_bytes, replacing
from ..support.quiet import quiet_libraries
from ..support.sealed import sealed_text
from ..support.text import rounded_bytes
from ..teacher.settings import TeacherConfig
from ..teacher.tokenizer_files import check_tokenizer_code
from .build import build_hybrid, write_files
from .card import control, measurements, model_card
from .manifest import CONVERSION, digests
from .verify import compare
from .weights import DTYPES


def export_hf(
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
    """Write the trained model of a run as a `Hybrid<Family>ForCausalLM` directory.

    It is loaded with `from_pretrained(out, trust_remote_code=True)`.

    Args:
        run: run directory; its last finished stage is exported.
        out: directory to create; it may exist only if it is empty.
        dtype: "float32", "bfloat16" or "float16" of the stored weights; None keeps the teacher's. The biases of decay,
            in-context rate and residual mixes stay fp32 in any case.
        tie_embeddings: whether input and output embeddings are one matrix in the result. Training always keeps them
            separate; None ties them if they are still equal bit for bit, True insists on it, False keeps two.
        checkpoint: of the stage: "best" on validation data, "last", or the name of one, "step-00000500".
        adapters: "merge" them into the weights, or keep them "separate": ordinary PEFT adapters in `adapter`,
            `adapter-2`, ... of the directory, to be loaded onto the model that is exported without them.
        base_model: id of the base model for the card; default is the teacher's hub id or its directory's name.
        max_shard_size: as in `save_pretrained`.

    Returns:
        conversion.json of the export: source, student, measurements, the result of the verification, and the SHA-256 of
        every other file.

    Raises:
        UserError: `out` is not empty, `run` is not finished, weights do not fit, embeddings to be tied differ, there
            are no adapters to keep separate, not enough disk, or a file cannot be written.
        VerificationError: the reloaded model does not reproduce the trained one. Nothing is left at `out`.
    """
    quiet_libraries()
    run, out = open_run(run, checkpoint), Path(out)
    _check_options(run, out, dtype, adapters)
    with _failures_told(out), replacing(out) as partial:
        partial.mkdir()
        trained = run.load_model()
        # a teacher's configuration that names no dtype means fp32
        stored = DTYPES[dtype] if dtype else run.teacher_config().dtype or torch.float32
        changes = {"quantized": _quantized(trained), "adapters": _adapters(run, adapters)}
        separate = take_adapters(trained, run.layers) if adapters == "separate" else []
        head = f"{trained.family.head_path}."
        if tie_embeddings is None and any(name.startswith(head) for _, tensors in separate for name in tensors):
            tie_embeddings = False  # an adapter of the head must not reach the embedding when it is merged
        model = build_hybrid(trained, run, stored, tie_embeddings)
        _check_disk(model, out.parent)
        _save_weights(model, partial, max_shard_size)
        write_files(model, trained.lm.generation_config, separate, run, partial)
        report = _conversion(model, trained, run, base_model or run.teacher_id) | changes
        directories = [adapter_directory(i) for i in range(len(separate))]
        del trained, model, separate  # verification loads both models itself
        report["verification"] = compare(partial, run, directories)
        _describe(partial, run, report)
    return report


@contextmanager
def _failures_told(out: Path) -> Iterator[None]:
    """Turn what the disk refuses into a `UserError`; safetensors reports a failed write as its own error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        hint = "free space, or name a directory that can be written"
        raise UserError(f"the export to {out} failed: {error}", hint) from error


def _check_options(run: TrainedRun, out: Path, dtype: str | None, adapters: str) -> None:
    """Refuse options that cannot be served, before anything is loaded."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}", f"allowed: {', '.join(DTYPES)}")
    if adapters not in ("merge", "separate"):
        raise UserError(f"adapters is {adapters!r}", "allowed: merge, separate")
    if adapters == "separate" and not run.layers.adapters:
        raise UserError(f"{run.path} was trained without adapters", "leave out --adapters separate")
    check_tokenizer_code(TeacherConfig.model_validate(run.config["teacher"]))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"output directory {out} exists and is not empty", "name a new directory, or remove it first")


def _check_disk(model: PreTrainedModel, folder: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if (free := free_bytes(folder)) < needed * 1.02:
        raise UserError(
            f"{folder} has {rounded_bytes(free)} free, but the export needs {rounded_bytes(needed)}", "free some space"
        )


def _save_weights(model: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    """Write the model; safetensors writes files that only their owner may read."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)


def _describe(folder: Path, run: TrainedRun, report: dict) -> None:
    """Write the card, the figures of the run, and conversion.json with the SHA-256 of every other file."""
    (folder / "README.md").write_text(str(model_card(report, run.teacher_files() / "README.md")), encoding="utf-8")
    if (picture := run.path / "report.png").exists():
        shutil.copyfile(picture, folder / picture.name)
    report["files"] = digests(folder)
    (folder / CONVERSION).write_text(sealed_text(report, indent=2), encoding="utf-8")


def _conversion(model: PreTrainedModel, trained: HybridModel, run: TrainedRun, base_model: str) -> dict:
    """Return conversion.json of the export, without paths of this machine."""
    config = model.config
    return {
        "base_model": base_model,
        "run": run.id,
        "teacher": run.teacher_id,
        "teacher_revision": run.teacher_revision,
        "teacher_digests": run.teacher_digests,
        "student": trained.spec.model_dump(mode="json"),
        "mixer": config.mixer,
        "mixer_layers": config.mixer_layers,
        "rwkv_layers": config.rwkv_layers,
        "attention_layers": [i for i in range(config.num_hidden_layers) if i not in config.rwkv_layers],
        "stage": run.stage,
        "checkpoint": run.checkpoint.name,
        "stages": {name: _without_paths(run.config.get("stages", {}).get(name)) for name in run.config.get("run", [])},
        "seed": run.config.get("seed"),
        "dtype": str(config.dtype).removeprefix("torch."),
        "tie_word_embeddings": config.tie_word_embeddings,
        "parameters": model.num_parameters(),
        "measurements": measurements(run.directory.metrics, run.stage, run.step),
        **({} if (scores := control(run.directory.metrics)) is None else {"control": scores}),
        "versions": {"rwkvinside": __version__, "torch": torch.__version__, "transformers": transformers_version},
    }


def _quantized(trained: HybridModel) -> dict | None:
    """Return what quantization cost the exported (unpacked) weights, None without it."""
    layers = {name: layer for name, layer in trained.quantized.items() if ".teacher_attn." not in name}
    if not layers:
        return None
    weights = sum(layer.weight_numel for layer in layers.values())
    return {
        "format": next(iter(layers.values())).format,
        "layers": list(layers),
        "weights": weights,
        "bytes_in_training": sum(layer.nbytes for layer in layers.values()),
        "relative_error": relative_error(layers.values()),
    }


def _adapters(run: TrainedRun, adapters: str) -> dict | None:
    specs = run.layers.adapters
    if not specs:
        return None
    separate = [adapter_directory(i) for i in range(len(specs))] if adapters == "separate" else []
    return {
        "merged": not separate,
        "directories": separate,
        "trained": [adapter.model_dump(mode="json") for adapter in specs],
    }


def _without_paths(stage: dict | None) -> dict | None:
    """Return a stage's configuration without paths of this machine.

    The path of a second teacher becomes its public name.
    """
    if not stage:
        return stage
    stage = {name: value for name, value in stage.items() if name != "teacher_cache"}
    if data := stage.get("data"):
        stage["data"] = {name: value for name, value in data.items() if name != "train"}
    if path := (stage.get("teacher_model") or {}).get("path"):
        stage["teacher_model"] = stage["teacher_model"] | {"path": public_name(path)}
    return stage
