"""The numbers that the memory formula needs, read from a meta-device student."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families.registry import find
from ..hybrid.experts import StackedExperts
from ..hybrid.freezing import TEACHER
from ..hybrid.model import HybridModel
from ..hybrid.quantized_linear import QuantizedLinear
from ..hybrid.row_states import row_bytes
from ..losses.chunked import BLOCK_ELEMENTS, chunk_tokens
from ..stages.base import Backward
from ..stages.cuda_graphs import uses_graphs
from ..stages.plan import StagePlan
from ..stages.rows import JUDGED_BATCH
from ..stages.teacher import teacher_formats
from ..teacher.kinds import TeacherKind
from ..teacher.load import meta_teacher
from ..training.deepspeed_config import settle
from .activations import FP32, edge_bytes, kept_bytes, recomputed_bytes, transient_bytes
from .memory import EngineSpec, Memory, StepMemory, StudentMemory, memory_of, moment_bytes

PREFETCH = 50_000_000  # elements that ZeRO 3 gathers ahead


def stage_memory(
    plan: StagePlan, model: HybridModel, kind: TeacherKind | None, teacher: PreTrainedModel | None
) -> Memory:
    """Return what a stage needs on one rank.

    Args:
        model: with the layers of the stage, and all that it will train marked as trainable.
        kind: where the teacher's side comes from, as `Stage.prepare` said.
        teacher: the shapes of an online teacher.
    """
    if plan.trials:  # one after the other; where they start from stays in the host's memory
        with plan.trials[-1].marked(model):
            memory = stage_memory(plan.trials[-1], model, TeacherKind.SELF, None)
            start = FP32 * trained_bytes(model)[1]
        if plan.run.device == "cpu":
            return replace(memory, device=memory.device | {"start": start}, evaluating=memory.evaluating + start)
        return replace(memory, offloaded=memory.offloaded + start, gathered=0)
    run = plan.run
    cpu, bf16, zero = run.device == "cpu", run.precision == "bf16", settle(run.zero)
    launched = run.deepspeed and plan.stage.trains  # otherwise one process works with the whole model
    engine = EngineSpec(
        launched=launched,
        zero=max(zero.zero_stage, 1) if bf16 and zero.bf16_weights else zero.zero_stage,
        ranks=run.ranks if launched else 1,
        bf16=bf16,
        bf16_weights=bf16 and zero.bf16_weights and launched,
        offload_optimizer=zero.offload_optimizer,
        offload_parameters=zero.offload_parameters,
        shard_teacher=plan.settings.teacher_model.shard and launched,
        moment_bytes=moment_bytes(plan.optim.kind) if plan.stage.trains else 0,
        graphs=uses_graphs(model, plan),
    )
    with_attention = kind is TeacherKind.SELF or plan.stage.needs_attention
    in_file = str(model.lm.config.dtype).removeprefix("torch.") == str(run.frozen_dtype).removeprefix("torch.")
    weights = _weights(model, run.frozen_dtype.itemsize, with_attention, mapped=cpu and in_file)
    work = _work(plan, model, kind, teacher)
    if teacher_formats(plan, model, kind):
        work = replace(work, original=original_bytes(plan, engine.ranks))
    return memory_of(weights, work, engine, cpu=cpu)


def original_bytes(plan: StagePlan, ranks: int) -> int:
    """Return the bytes on one rank of a stage's teacher as it was before it was quantized.

    Args:
        ranks: among which it is sharded, where the stage shards its teacher.
    """
    whole, largest = _teacher_bytes(meta_teacher(plan.signal_teacher), plan.run.frozen_dtype)
    return whole // ranks + largest if plan.settings.teacher_model.shard and ranks > 1 else whole


def trained_bytes(model: HybridModel) -> tuple[int, int]:
    """Return (parameters in a checkpoint's weights, those with an optimizer state)."""
    parameters = model.canonical_parameters()
    saved = sum(p.numel() for name, p in parameters.items() if name in model.trained)
    master_weights = sum(tensor.numel() for tensor in model.master_weights.values())
    return saved + master_weights, sum(p.numel() for p in parameters.values() if p.requires_grad)


def _weights(model: HybridModel, frozen: int, with_attention: bool, mapped: bool) -> StudentMemory:
    """Return the student's weights as they are in memory.

    Args:
        model: on any device.
        frozen: bytes of a weight that never trained.
        with_attention: the teacher's attention stays next to the mixers.
        mapped: weights that never trained are used from the teacher's file.
    """
    layers: dict[int | None, int] = {}  # bytes by layer; None: outside of them
    names = {id(p): name for name, p in model.canonical_parameters().items()}
    trainable = parameters = others = cast = 0
    for path, p in model.named_parameters():
        name = names.get(id(p))
        if name is None and not with_attention and f".{TEACHER}_attn." in path:
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
    head_bytes = sum(p.numel() * (FP32 if p.requires_grad else frozen) for p in head.parameters())
    return StudentMemory(
        trainable=trainable,
        others=others,
        parameters=parameters,
        cast=cast,
        whole=max(head_bytes, *(size for layer, size in layers.items() if layer is not None))
        + FP32 * min(PREFETCH, parameters),
        unpacked=max((*(m.weight_numel for m in quantized), *_made_of_experts(model)), default=0),
        head=sum(p.numel() for p in head.parameters() if p.requires_grad),
        mapped=frozen * sum(m.weight_numel for m in quantized) if mapped else 0,
    )


def _made_of_experts(model: HybridModel) -> list[int]:
    """Return how many weights the experts of each sparse layer make at a time."""
    stacks = [module for module in model.modules() if isinstance(module, StackedExperts)]
    return [sum(weight.made_numel for weight in stack.weights.values()) for stack in stacks]


def _work(plan: StagePlan, model: HybridModel, kind: TeacherKind | None, teacher: PreTrainedModel | None) -> StepMemory:
    c, stage, frozen = model.lm.config, plan.stage, plan.run.frozen_dtype
    shape = plan.shape
    tokens = shape.micro_rows * plan.length.seq_len
    bf16 = plan.run.precision == "bf16"
    low = 2 if bf16 else FP32
    trained_stream = f"{model.family.embedding_path}.weight" in model.trained
    stream = FP32 if trained_stream or not bf16 else frozen.itemsize
    vocab = c.vocab_size
    judged = min(plan.run.data.val_tokens, max(JUDGED_BATCH, plan.length.seq_len * stage.packs_validation))
    common = dict(
        # both models' logits and what they are compared by; a layer of a forward without a backward
        judged=FP32 * 8 * min(judged, chunk_tokens(vocab)) * vocab
        + judged * transient_bytes(model, align=False, low=low),
        held=stage.held_bytes(model, plan),
    )
    if not stage.trains:
        return StepMemory(tokens=0, **common)
    align = stage.backward is Backward.MIXERS
    recomputed, fused = plan.stage.recomputed(plan.settings), _fused(plan)
    checkpointing = recomputed in ("layers", "mixers")
    inputs, edges = edge_bytes(model, align=align, checkpointing=checkpointing, stream=stream)
    kept = kept_bytes(
        model,
        align=align,
        low=low,
        stream=stream,
        fused=fused,
        fused_windows=plan.run.device == "cuda",  # whatever computes the mixers
        fused_layers=plan.run.fused.layers,
        recurrence=recomputed != "recurrence",
    )
    transient = transient_bytes(model, align=align, low=low)
    if recomputed == "recurrence":
        transient += recomputed_bytes(model, low=low, stream=stream, fused=fused)
    models = stage.logit_models(kind)
    if plan.settings.loss is not None and plan.settings.loss.router:  # logits of all routers, and their softmax
        mlps = (model.family.experts(model.family.mlp(layer)) for layer in model.family.layers(model.lm))
        edges += sum((low + FP32) * experts.router.shape[0] for experts in mlps if experts is not None)
    rows_of_rank = -(-plan.length.rows_per_step // shape.ranks)
    whole, largest = (0, 0) if teacher is None else _teacher_bytes(teacher, frozen)
    return StepMemory(
        tokens=tokens,
        micro_batches=shape.micro_batches,
        kept=kept,
        inputs=inputs,
        edges=edges,
        transient=transient,
        chunk=_logits(plan, tokens, vocab, low, models, kind) if models else 0,
        head_copy=vocab * c.hidden_size if models else 0,
        teacher=whole,
        teacher_whole=largest,
        carried=2 * rows_of_rank * row_bytes(model) if plan.settings.stateful else 0,
        **common,
    )


def _fused(plan: StagePlan) -> bool:
    """Return whether the mixers run on the Triton kernels."""
    return plan.run.device == "cuda" and plan.run.student.backend in ("auto", "triton")


def _logits(plan: StagePlan, tokens: int, vocab: int, low: int, models: int, kind: TeacherKind | None) -> int:
    """Return the bytes of a chunk of logits.

    Counted are those of every model that makes them, and blocks of them in fp32 where PyTorch code compares them.
    """
    loss = plan.loss
    chunk = min(tokens, loss.chunk_tokens or chunk_tokens(vocab, plan.run.device)) * vocab
    in_place = plan.run.device == "cuda" and loss.top_k is None and kind is not TeacherKind.OFFLINE
    blocks = 0 if in_place else FP32 * min(chunk, BLOCK_ELEMENTS[plan.run.device]) * (4 + bool(loss.ce))
    return low * models * chunk + blocks


def _teacher_bytes(lm: PreTrainedModel, frozen: torch.dtype) -> tuple[int, int]:
    """Return the bytes of a teacher, and of the most that is whole at a time.

    The latter counts when it is sharded.
    """

    def size(module: nn.Module) -> int:
        tensors = [*module.parameters(), *(b for m in module.modules() for b in _scales(m))]
        return sum(t.numel() * (frozen.itemsize if t.dtype.is_floating_point else t.itemsize) for t in tensors)

    family = find(lm.config.model_type)
    whole = max(size(family.head(lm)), *(size(layer) for layer in family.layers(lm)))
    return size(lm), whole + frozen.itemsize * min(PREFETCH, sum(p.numel() for p in lm.parameters()))


def _scales(module: nn.Module) -> list[torch.Tensor]:
    return list(module.buffers(recurse=False)) if isinstance(module, QuantizedLinear) else []
