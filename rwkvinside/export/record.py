"""What an export says of its source: the run, the student, its measurements, without paths of this machine."""

from __future__ import annotations

import torch
from transformers import __version__ as transformers_version

from .. import __version__
from ..hybrid.adapters import adapter_directory
from ..hybrid.model import HybridModel
from ..hybrid.quantized_linear import relative_error
from ..hybrid.settings import StudentConfig
from ..runs.trained import TrainedRun, public_name
from .card import control, measurements


def conversion_record(
    run: TrainedRun, spec: StudentConfig, base_model: str | None, dtype: str, parameters: int
) -> dict:
    """Return what every format says of where an export comes from.

    Args:
        run: where the model was trained.
        spec: of the student at the end.
        base_model: id of the base model; None: the model was trained from nothing.
        dtype: of the stored weights.
        parameters: of the exported model.
    """
    return {
        "base_model": base_model,
        "run": run.id,
        "teacher": run.teacher_id,
        "teacher_revision": run.teacher_revision,
        "teacher_digests": run.teacher_digests,
        "student": spec.model_dump(mode="json"),
        "stage": run.stage,
        "checkpoint": run.checkpoint.name,
        "stages": {name: _without_paths(run.config.get("stages", {}).get(name)) for name in run.config.get("run", [])},
        "seed": run.config.get("seed"),
        "dtype": dtype,
        "parameters": parameters,
        "measurements": measurements(run.directory.metrics, run.stage, run.step),
        **({} if (scores := control(run.directory.metrics)) is None else {"control": scores}),
        "versions": {"rwkvinside": __version__, "torch": torch.__version__, "transformers": transformers_version},
    }


def quantized_record(trained: HybridModel) -> dict | None:
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


def adapters_record(run: TrainedRun, adapters: str) -> dict | None:
    """Return what became of the adapters of the run (`adapters` as of `export_hf`), None without any."""
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
