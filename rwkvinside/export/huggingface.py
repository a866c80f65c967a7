"""A finished run as a Hugging Face model directory that needs torch and transformers only.

Every tensor of the exported model must have exactly one source. The directory is built next to its final place,
verified in a fresh process against the trained model, and only then renamed. `card.py` writes the model card.
"""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..hybrid.adapters import adapter_directory
from ..hybrid.assemble import take_adapters
from ..hybrid.model import HybridModel
from ..runs.trained import TrainedRun, open_run
from ..support.files import replacing
from ..support.quiet import quiet_libraries
from ..support.sealed import sealed_text
from ..teacher.settings import TeacherConfig
from ..teacher.tokenizer_files import check_tokenizer_code
from .build import build_hybrid, write_files
from .card import model_card
from .manifest import CONVERSION, digests
from .output import check_disk, check_new, failures_told
from .record import adapters_record, conversion_record, quantized_record
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
    run, out = open_run(run, checkpoint), check_new(out)
    _check_options(run, dtype, adapters)
    with failures_told(out), replacing(out) as partial:
        partial.mkdir()
        trained = run.load_model()
        # a teacher's configuration that names no dtype means fp32
        stored = DTYPES[dtype] if dtype else run.teacher_config().dtype or torch.float32
        changes = {"quantized": quantized_record(trained), "adapters": adapters_record(run, adapters)}
        separate = take_adapters(trained, run.layers) if adapters == "separate" else []
        head = f"{trained.family.head_path}."
        if tie_embeddings is None and any(name.startswith(head) for _, tensors in separate for name in tensors):
            tie_embeddings = False  # an adapter of the head must not reach the embedding when it is merged
        model = build_hybrid(trained, run, stored, tie_embeddings)
        check_disk(out.parent, sum(p.numel() * p.element_size() for p in model.parameters()))
        _save_weights(model, partial, max_shard_size)
        write_files(model, trained.lm.generation_config, separate, run, partial)
        report = _conversion(model, trained, run, base_model or run.teacher_id) | changes
        directories = [adapter_directory(i) for i in range(len(separate))]
        del trained, model, separate  # verification loads both models itself
        report["verification"] = compare(partial, run, directories)
        _describe(partial, run, report)
    return report


def _check_options(run: TrainedRun, dtype: str | None, adapters: str) -> None:
    """Refuse options that cannot be served, before anything is loaded."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}", f"allowed: {', '.join(DTYPES)}")
    if adapters not in ("merge", "separate"):
        raise UserError(f"adapters is {adapters!r}", "allowed: merge, separate")
    if adapters == "separate" and not run.layers.adapters:
        raise UserError(f"{run.path} was trained without adapters", "leave out --adapters separate")
    check_tokenizer_code(TeacherConfig.model_validate(run.config["teacher"]))


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
    layers = {
        "mixer": config.mixer,
        "mixer_layers": config.mixer_layers,
        "rwkv_layers": config.rwkv_layers,
        "attention_layers": [i for i in range(config.num_hidden_layers) if i not in config.rwkv_layers],
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    dtype = str(config.dtype).removeprefix("torch.")
    return conversion_record(run, trained.spec, base_model, dtype, model.num_parameters()) | layers
