"""The exported model from the tensors of the trained one, and every file of an export beside its weights.

Used twice: to write an export, and to verify one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from ..errors import UserError
from ..hybrid.adapters import adapter_directory, write_peft
from ..hybrid.assemble import make_plain
from ..hybrid.model import HybridModel
from ..hybrid.settings import AdapterConfig
from ..modeling.hybrid_base import mixer_fields
from ..runs.trained import LEGAL_FILES, TrainedRun
from ..teacher.tokenizer_files import tokenizer_files
from .weights import stored_dtype

Adapters = list[tuple[AdapterConfig, dict[str, Tensor]]]
"""From `take_adapters`."""


def build_hybrid(
    trained: HybridModel, run: TrainedRun, dtype: torch.dtype, tie_embeddings: bool | None
) -> PreTrainedModel:
    """Build the exported model from the tensors of the trained one.

    The trained model is made plain: quantized weights are unpacked, adapters merged.

    Args:
        trained: the student; its tensors must be exactly those of the exported model.
        run: where it was trained.
        dtype: of the stored weights.
        tie_embeddings: see `export_hf`.

    Raises:
        UserError: a tensor without a source or a source without a target, embeddings to be tied that differ.
    """
    make_plain(trained)
    if tie_embeddings is False:
        trained.untie()  # one storage would be saved once
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in trained.canonical_parameters().items()}
    embeddings, head = (tensors[name] for name in trained.embedding_names)
    equal = embeddings.shape == head.shape and torch.equal(embeddings, head)
    if tie_embeddings and not equal:
        raise UserError(
            f"the embeddings cannot be tied: input and output differ by up to {(embeddings - head).abs().max():.3g}",
            "export without tying, or train with embed and head frozen",
        )
    config = _hybrid_config(trained, run, dtype, equal if tie_embeddings is None else tie_embeddings)
    with torch.device("meta"):
        model = trained.family.hybrid_class(config)
    targets = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    sources = {name: tuple(t.shape) for name, t in tensors.items()}
    if targets != sources:
        unmatched = sorted(name for name in targets | sources if targets.get(name) != sources.get(name))
        name = unmatched[0]
        raise UserError(
            f"{len(unmatched)} tensors do not fit the exported model, first {name}: "
            f"target {targets.get(name, 'missing')}, source {sources.get(name, 'missing')}"
        )
    stored = {name: t.to(stored_dtype(name, dtype)) for name, t in tensors.items()}
    model.load_state_dict(stored, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _hybrid_config(trained: HybridModel, run: TrainedRun, dtype: torch.dtype, tied: bool) -> PretrainedConfig:
    model_class = trained.family.hybrid_class
    mixers = {i: c.replace(backend="auto", precision="auto") for i, c in trained.mixer_configs.items()}
    fields = run.teacher_config().to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype", "auto_map", "_name_or_path"):
        fields.pop(name, None)
    return model_class.config_class(
        **fields
        | mixer_fields(mixers)
        | {
            "tie_word_embeddings": tied,
            "rwkv_layers": trained.rwkv_layers,
            "attention_rope": trained.spec.attention_rope,
            "attention_log_base": trained.spec.attention_log_base,
            "attention_window": trained.spec.attention_window,
            "attention_sinks": trained.spec.attention_sinks,
            "rwkv_architecture": trained.spec.preset if trained.rwkv_layers else None,
            "rwkv_chunk_size": trained.spec.chunk_size,
            "teacher_model": run.teacher_id,
            "dtype": dtype,
        }
    )


def write_files(
    model: PreTrainedModel, generation: GenerationConfig, separate: Adapters, run: TrainedRun, folder: Path
) -> None:
    """Write all files of an export but its weights, its card and conversion.json.

    They follow from the run and this version of the code alone: configurations, code, tokenizer, licenses, adapters.

    Args:
        model: from `build_hybrid`; weights on the meta device are enough.
        generation: the teacher's.
        separate: adapters that are not merged.
        run: where the model was trained.
        folder: that exists.
    """
    type(model.config).register_for_auto_class()
    type(model).register_for_auto_class("AutoModelForCausalLM")
    model.config.architectures = [type(model).__name__]
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    generation.cache_implementation = None  # a static cache cannot hold a recurrent state
    # not generation.save_pretrained: it refuses the sampling fields that some teachers ship with greedy defaults
    generation.to_json_file(folder / "generation_config.json")
    copy_teacher_files(run, folder)
    for i, (spec, tensors) in enumerate(separate):
        write_peft(folder / adapter_directory(i), spec, tensors)


def copy_teacher_files(run: TrainedRun, folder: Path) -> None:
    """Copy tokenizer and licenses of a run's teacher."""
    source = run.teacher_files()
    for file in [*tokenizer_files(source), *(file for pattern in LEGAL_FILES for file in source.glob(pattern))]:
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
