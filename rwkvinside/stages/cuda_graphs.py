"""Where the micro-batches of a stage can run as CUDA graphs (`training/cuda_graphs.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import UserError
from ..kernels import why_unavailable, why_unsupported
from ..teacher.kinds import TeacherKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..hybrid.model import HybridModel
    from .plan import StagePlan

LARGEST_HEAD = 256  # of flash attention, which reads where documents end on the GPU


def uses_graphs(student: HybridModel, plan: StagePlan) -> bool:
    """Return whether the micro-batches of a stage run as graphs, of one process without DeepSpeed.

    They do by default wherever all that a micro-batch does is known to be recordable.

    Args:
        student: whose shapes suffice, with all that the stage trains marked as trainable.
        plan: of the stage.

    Raises:
        UserError: they were asked for, and something cannot be recorded; says what.
    """
    asked = plan.settings.cuda_graphs
    why = next(_obstacles(student, plan), None) if asked else None
    if why is not None and asked is True:
        raise UserError(f"stages.{plan.name}.cuda_graphs cannot be true: {why}", "leave it out")
    return bool(asked) and why is None


def _obstacles(student: HybridModel, plan: StagePlan) -> Iterator[str]:
    run, settings, loss = plan.run, plan.settings, plan.settings.loss
    if not plan.stage.has_graphs:
        yield f"it is for align and distill, the objective is {plan.stage.objective}"
    if run.device != "cuda":
        yield f"the device is {run.device}"
    if run.precision != "bf16":
        yield f"precision is {run.precision}, and only bf16 has kernels that read where documents end on the GPU"
    if run.deepspeed:
        yield f"DeepSpeed trains in {run.ranks} {'process' if run.ranks == 1 else 'processes'}"
    if run.device == "cuda":
        yield from _of_kernels(student)
    if run.student.backend not in ("auto", "triton"):
        yield f"student.backend {run.student.backend} asks the GPU where documents end"
    if plan.layers.adapters:
        yield "the student has adapters"
    if student.quantized or settings.teacher_model.quantize:
        yield "layers are quantized"
    if settings.activation_checkpointing is True:
        yield "activations are recomputed (activation_checkpointing: true), which saves the state of random numbers"
    if plan.asked_teacher is TeacherKind.OFFLINE:
        yield "the teacher's side is read from disk"
    if loss is not None and loss.top_k is not None:
        yield "loss.top_k is compared by PyTorch code, at positions that all count"
    yield from _in_model(student.lm.config)
    if settings.teacher_model.path is not None:
        from ..teacher.load import teacher_config

        yield from _in_model(teacher_config(plan.signal_teacher))
    bias = getattr(student.family.head(student.lm), "bias", None)
    if bias is not None and bias.requires_grad:
        yield "the head's bias trains"


def _of_kernels(student: HybridModel) -> Iterator[str]:
    """Yield why the kernels that read on the GPU what PyTorch code asks it for will not run."""
    import torch

    if torch.cuda.is_available() and (why := why_unavailable("triton")):  # else it is a plan for another machine
        yield why
    for size in {mixer.head_size for mixer in student.mixer_configs.values()}:
        if why := why_unsupported("triton", "cuda", torch.float32, size):
            yield why


def _in_model(config: PretrainedConfig) -> Iterator[str]:
    """Yield what of a teacher's architecture depends on the tokens of a batch."""
    if getattr(config, "num_experts", None):
        yield f"{config.model_type} has experts, and how many tokens each gets differs"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "attn_logit_softcapping", None) or size % 8 or size > LARGEST_HEAD:
        yield f"flash attention does not take the heads of {config.model_type}, so documents go one after the other"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        yield f"the rotation of {config.model_type} asks the GPU for the longest position"
