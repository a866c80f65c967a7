"""The numbers that the memory formula needs, read from a student on the meta device."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..config.precision import frozen_dtype
from ..config.schema import Config, StageConfig
from ..families.registry import find
from ..hybrid.freezing import TEACHER
from ..hybrid.model import HybridModel
from ..hybrid.quantized_linear import QuantizedLinear, linear_names, quantize
from ..losses.distillation import BLOCK_ELEMENTS, chunk_tokens
from ..stages.prepare import zero_settings
from ..stages.rows import JUDGED_BATCH
from ..teacher.load import teacher_config, teacher_of
from ..training.batching import step_shape
from .activations import FP32, edge_bytes, kept_bytes, transient_bytes
from .memory import EngineSpec, Memory, StepMemory, StudentMemory, memory_of, moment_bytes

PREFETCH = 50_000_000  # elements that ZeRO 3 gathers ahead


def second_teacher(config: Config, stage: StageConfig) -> PreTrainedModel:
    """The model of teacher: separate, quantized where the stage says so, on the meta device."""
    given = stage.teacher_model
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            teacher_config(config.model_copy(update={"teacher": teacher_of(config, stage)}))
        )
    if given.quantize is not None:
        quantize(lm, linear_names(lm, skip=(find(lm.config.model_type).head_path,)), given.quantize)
    return lm


def stage_memory(
    config: Config,
    stage: StageConfig,
    model: HybridModel,
    source: str | None,
    teacher: PreTrainedModel | None,
    device: str,
    precision: str,
    ranks: int,
) -> Memory:
    """What a stage needs on one rank.

    Args:
        model: with the structure of the stage, and all that it will train marked as trainable.
        source: where the teacher's side comes from, as `prepare_stage` said.
        teacher: the model of source "separate".
    """
    zero, bf16 = zero_settings(config).settled(), precision == "bf16"
    launched = ranks > 1 and stage.objective != "calibrate"  # which one process does with the whole model
    engine = EngineSpec(
        launched=launched,
        zero=max(zero.stage, 1) if bf16 and zero.bf16_weights else zero.stage,
        ranks=ranks if launched else 1,
        bf16=bf16,
        bf16_weights=bf16 and zero.bf16_weights and launched,
        offload_optimizer=zero.offload_optimizer,
        offload_parameters=zero.offload_parameters,
        shard_teacher=stage.teacher_model.shard and launched,
        moment_bytes=moment_bytes(stage.optim.kind) if stage.optim is not None else 0,
    )
    frozen = frozen_dtype(config, device, precision)
    beside = source == "same" or stage.objective in ("calibrate", "align")
    in_file = str(model.lm.config.dtype).removeprefix("torch.") == str(frozen).removeprefix("torch.")
    weights = _weights(model, frozen.itemsize, beside, mapped=device == "cpu" and in_file)
    work = _work(config, stage, model, source, teacher, frozen, device, bf16, ranks)
    return memory_of(weights, work, engine, cpu=device == "cpu")


def trained_bytes(model: HybridModel) -> tuple[int, int]:
    """(parameters in a checkpoint's weights, those with an optimizer state)."""
    parameters = model.canonical_parameters()
    saved = sum(p.numel() for name, p in parameters.items() if name in model.trained)
    master_weights = sum(tensor.numel() for tensor in model.master_weights.values())
    return saved + master_weights, sum(p.numel() for p in parameters.values() if p.requires_grad)


def _weights(model: HybridModel, frozen: int, beside: bool, mapped: bool) -> StudentMemory:
    """The student as it is in memory.

    Args:
        frozen: bytes of a weight that never trained.
        beside: the teacher's attention stays beside the mixers.
        mapped: weights that never trained are used from the teacher's file.
    """
    layers: dict[int | None, int] = {}  # bytes by layer; None: outside of them
    names = {id(p): name for name, p in model.canonical_parameters().items()}
    trainable = parameters = others = cast = 0
    for path, p in model.named_parameters():
        name = names.get(id(p))
        if name is None and not beside and f".{TEACHER}_attn." in path:
            continue
        if not p.dtype.is_floating_point:
            size = p.numel() * p.itemsize
        else:
            size = p.numel() * (FP32 if p.requires_grad or name in model.trained else frozen)
            parameters += p.numel()
        if p.requires_grad:
            trainable += p.numel()
        else:
            others += size
        layer = model.family.layer_of(path.removeprefix("lm."))
        layers[layer] = layers.get(layer, 0) + size
        if name is not None and layer is not None and p.dim() >= 2 and size == FP32 * p.numel():
            cast += p.numel()
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    others += sum(b.numel() * b.itemsize for m in quantized for b in m.buffers(recurse=False))
    others += sum(t.numel() * FP32 for t in model.master_weights.values())
    head = model.family.head(model.lm)
    of_head = sum(p.numel() * (FP32 if p.requires_grad else frozen) for p in head.parameters())
    return StudentMemory(
        trainable=trainable,
        others=others,
        parameters=parameters,
        cast=cast,
        whole=max(of_head, *(size for layer, size in layers.items() if layer is not None))
        + FP32 * min(PREFETCH, parameters),
        unpacked=max((m.weight_numel for m in quantized), default=0),
        head=sum(p.numel() for p in head.parameters() if p.requires_grad),
        mapped=frozen * sum(m.weight_numel for m in quantized) if mapped else 0,
    )


def _work(
    config: Config,
    stage: StageConfig,
    model: HybridModel,
    source: str | None,
    teacher: PreTrainedModel | None,
    frozen: torch.dtype,
    device: str,
    bf16: bool,
    ranks: int,
) -> StepMemory:
    c = model.lm.config
    shape, T = step_shape(stage, ranks), stage.data.seq_len
    tokens = shape.micro_rows * T
    low = 2 if bf16 else FP32
    trained_stream = f"{model.family.embedding_path}.weight" in model.trained
    stream = FP32 if trained_stream or not bf16 else frozen.itemsize
    vocab = c.vocab_size
    whole, largest = (0, 0) if teacher is None else _teacher_bytes(teacher, frozen)
    attention = stage.objective != "distill" or source == "same" or len(model.rwkv_layers) < c.num_hidden_layers
    judged = min(config.data.val_tokens, JUDGED_BATCH)
    common = dict(
        masks=tokens * T * (1 + FP32 * attention),
        # both models' logits and what they are compared by; a layer of a forward without a backward
        judged=FP32 * 8 * min(judged, chunk_tokens(vocab)) * vocab
        + judged * transient_bytes(model, align=False, low=low),
    )
    if stage.objective == "calibrate":
        mixers = model.mixer_configs.values()
        C = max(mixer.num_heads * mixer.head_size for mixer in mixers)
        K = max(mixer.num_kv_heads * mixer.head_size for mixer in mixers)
        # of all tokens: hidden states, their normed form, the teacher's heads, what later mixers read, masks; of one
        # batch: the streams of a mixer, and features and targets in two precisions
        held = stage.tokens * (FP32 * (2 * c.hidden_size + C + 2 * K) + T) + tokens * FP32 * 25 * C
        return StepMemory(tokens=0, held=held, **common)
    align = stage.objective == "align"
    inputs, edges = edge_bytes(model, align=align, checkpointing=stage.activation_checkpointing, stream=stream)
    return StepMemory(
        tokens=tokens,
        micro_batches=shape.micro_batches,
        kept=kept_bytes(model, align=align, low=low, stream=stream),
        inputs=inputs,
        edges=edges,
        transient=transient_bytes(model, align=align, low=low),
        chunk=0 if stage.loss is None else _logits(stage, tokens, vocab, low, source, device),
        head_copy=0 if stage.loss is None else vocab * c.hidden_size,
        teacher=whole,
        teacher_whole=largest,
        **common,
    )


def _logits(stage: StageConfig, tokens: int, vocab: int, low: int, source: str | None, device: str) -> int:
    """Bytes of a chunk of logits: the student's, the teacher's where a model makes them, and blocks of them in fp32."""
    chunk = min(tokens, stage.loss.chunk_tokens or chunk_tokens(vocab)) * vocab
    models = 2 if source in ("same", "separate") and stage.objective == "distill" else 1
    return low * models * chunk + FP32 * min(chunk, BLOCK_ELEMENTS[device]) * (4 + bool(stage.loss.ce))


def _teacher_bytes(lm: PreTrainedModel, frozen: torch.dtype) -> tuple[int, int]:
    """Bytes of a teacher, and of the most that is whole at a time when it is sharded."""

    def size(module: nn.Module) -> int:
        tensors = [*module.parameters(), *(b for m in module.modules() for b in _scales(m))]
        return sum(t.numel() * (frozen.itemsize if t.dtype.is_floating_point else t.itemsize) for t in tensors)

    family = find(lm.config.model_type)
    whole = max(size(family.head(lm)), *(size(layer) for layer in family.layers(lm)))
    return size(lm), whole + frozen.itemsize * min(PREFETCH, sum(p.numel() for p in lm.parameters()))


def _scales(module: nn.Module) -> list[torch.Tensor]:
    return list(module.buffers(recurse=False)) if isinstance(module, QuantizedLinear) else []
