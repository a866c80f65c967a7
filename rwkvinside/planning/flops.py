"""Floating-point operations that a stage needs for one token, from the student's structure, and what a device can do.

Counted are products of matrices, a multiplication and an addition as two operations; not norms, activations, the
softmax, the optimizer, and nothing twice (recomputation is not counted). For a matrix of n weights, a token costs

    2 n   in the forward
    2 n   for the gradient of its input, where something in front of it trains
    2 n   for the gradient of its weights, where it trains

and without matrices of weights, with C = heads x head size, N = head size, T = tokens of a row:

    scores      4 C (T + 1) / 2 in the forward: queries with keys, weights with values, half of the square
    recurrence  8 C N in the forward: S a, (S a) b^T, v k^T and S r for every head
                both: twice that in the backward, where something in front of it trains

The teacher's side has a forward only. Embeddings are looked up. MFU is these operations, times the tokens per second,
over the peak of the devices: the share of the hardware that did necessary work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..hybrid.freezing import PROJECTIONS
from ..hybrid.model import HybridModel
from ..stages.base import Backward
from ..stages.plan import StagePlan
from ..teacher.kinds import TeacherKind

LAST = ("output", "o_proj", "down_proj")  # fed by the other matrices of their block, not by its input


@dataclass
class Flops:
    """Operations for one token by what they are for.

    Args:
        forward, backward: by "mixer.proj", "mixer.lora", "recurrence", "attention", "scores", "mlp", "adapters",
            "head" and "teacher" (everything of its side).
    """

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())

    def add(self, kind: str, forward: float, backward: float = 0.0) -> None:
        self.forward[kind] = self.forward.get(kind, 0.0) + forward
        self.backward[kind] = self.backward.get(kind, 0.0) + backward


def training_flops(
    student: HybridModel, plan: StagePlan, kind: TeacherKind | None, teacher: nn.Module | None = None
) -> Flops:
    """Operations of one token of a training stage with what `Stage.prepare` has made trainable.

    Args:
        student: on any device, before an engine may shard it.
        kind: where the teacher's side comes from, as `Stage.prepare` said.
        teacher: the second model of an online teacher, or what contains it.
    """
    context = (plan.length.seq_len + 1) / 2
    found = Flops()
    align = plan.stage.backward is Backward.MIXERS
    own = kind is TeacherKind.SELF
    layers, head = student.lm.model.layers, student.lm.lm_head
    upstream = not align and _trains(student.lm.model.embed_tokens)
    for i, layer in enumerate(layers):
        converted = i in student.rwkv_layers
        upstream |= not align and _trains(layer.input_layernorm)
        block = layer.self_attn.student_attn if converted else layer.self_attn
        # adapters outside of the mixers are off in align
        upstream |= _add_block(found, block, upstream, context, adapters=converted or not align) and not align
        upstream |= not align and _trains(layer.post_attention_layernorm)
        upstream |= _add_block(found, layer.mlp, upstream, adapters=not align) and not align
        if converted and (align or own):
            _add_teacher(found, layer.self_attn.teacher_attn, context)
        if not align and own:
            _add_teacher(found, layer.mlp)
            if not converted:
                _add_teacher(found, layer.self_attn, context)
    if not align:
        _add_block(found, head, upstream or _trains(student.lm.model.norm), kind="head")
        if own:
            _add_teacher(found, head)
    if teacher is not None:
        _add_teacher(found, teacher, context)
    return found


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _add_block(
    found: Flops, block: nn.Module, upstream: bool, context: float = 0.0, kind: str = "mlp", adapters: bool = True
) -> bool:
    """Add what a mixer, an attention, an MLP or a head costs; returns whether something in it trains."""
    trained = {name for name, p in block.named_parameters() if p.requires_grad and (adapters or not _in_adapter(name))}
    mixer = getattr(block, "mixer_config", None)
    if mixer is not None or hasattr(block, "q_proj"):
        kind = "attention"
    for name, size, trains in _matrices(block, adapters):
        first = name.split(".")[0]
        if _in_adapter(name):
            group = "adapters"
        elif mixer is not None:
            group = "mixer.proj" if first in PROJECTIONS else "mixer.lora"
        else:
            group = kind
        behind = upstream or any(_feeds(other, name) for other in trained)
        found.add(group, 2 * size, 2 * size * (behind + trains))
    # r, k, v or q, k, v: what stands in front of the block's last matrix
    behind = upstream or any(other.split(".")[0] not in LAST for other in trained)
    if mixer is not None:
        core = 8 * mixer.num_heads * mixer.head_size**2
        found.add("recurrence", core, 2 * core * behind)
    elif kind == "attention":
        core = _scores(block, context)
        found.add("scores", core, 2 * core * behind)
    return bool(trained)


def _add_teacher(found: Flops, block: nn.Module, context: float = 0.0) -> None:
    """Add the forward of a part of the teacher, without adapters."""
    sizes = [size for _, size, _ in _matrices(block, adapters=False)]
    scores = [_scores(module, context) for module in block.modules() if hasattr(module, "q_proj")]
    found.add("teacher", 2 * sum(sizes) + sum(scores))


def _scores(attention: nn.Module, context: float) -> float:
    config = attention.config
    return 4 * config.num_attention_heads * attention.head_dim * context


def _matrices(block: nn.Module, adapters: bool) -> Iterator[tuple[str, int, bool]]:
    """(name, weights, whether its gradient is needed) of every matrix that the block's tokens are multiplied with."""
    parameters = {n: p for n, p in block.named_parameters() if adapters or not _in_adapter(n)}
    # MiSS in its bat form trains a function of the whole weight, which so needs a gradient of its own
    bat = {n.partition("miss_block.")[0] for n, p in parameters.items() if "miss_block." in n and p.ndim == 3}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and (adapters or not _in_adapter(name)):
            weight = module._parameters.get("weight")  # a quantized layer has none
            trains = (weight is not None and weight.requires_grad) or name.removesuffix("base_layer") in bat
            yield name, module.in_features * module.out_features, trains
    for name, parameter in parameters.items():
        if re.fullmatch(r"[wavkg][12]", name) or ("miss_block." in name and parameter.ndim == 2):
            yield name, parameter.numel(), parameter.requires_grad


def _in_adapter(name: str) -> bool:
    return re.search(r"(^|\.)(lora_|miss_block)", name) is not None


def _feeds(parameter: str, matrix: str) -> bool:
    """Whether the input of a matrix depends on a parameter of the same block."""
    own, first = parameter.split(".")[0], matrix.split(".")[0]
    if own.startswith("x_") and own[2] == first[0]:  # token shift: x_r in front of receptance, x_w of w1, ...
        return True
    if first in LAST and own != first:
        return True
    if "lora_B." in matrix:
        return parameter == matrix.replace("lora_B.", "lora_A.") + ".weight"
    return re.fullmatch(r"[wavkg]2", matrix) is not None and parameter == f"{matrix[0]}1"
