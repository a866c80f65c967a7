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
from transformers import PretrainedConfig, PreTrainedModel

from ..families.base import Family
from ..families.registry import find
from ..hybrid.freezing import PROJECTIONS
from ..hybrid.model import HybridModel
from ..modeling.time_mixer import TimeMixer
from ..stages.base import Backward
from ..stages.plan import StagePlan
from ..teacher.kinds import TeacherKind


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
    student: HybridModel, plan: StagePlan, kind: TeacherKind | None, teacher: PreTrainedModel | None = None
) -> Flops:
    """Operations of one token of a training stage with what `Stage.prepare` has made trainable.

    Args:
        student: on any device, before an engine may shard it.
        kind: where the teacher's side comes from, as `Stage.prepare` said.
        teacher: the second model of an online teacher.
    """
    context = (plan.length.seq_len + 1) / 2
    found = Flops()
    align, own = plan.stage.backward is Backward.MIXERS, kind is TeacherKind.SELF
    lm, family = student.lm, student.family
    upstream = not align and _trains(family.embedding(lm))
    for i, layer in enumerate(family.layers(lm)):
        converted, attention = i in student.rwkv_layers, family.attention(layer)
        scores = _scores(family, lm.config, i, context)
        upstream |= not align and _trains(family.attention_input(layer))
        # adapters outside of the mixers are off in align
        if converted:
            trained = _add_mixer(found, family, attention.student_attn, upstream)
        else:
            trained = _add_attention(found, family, attention, scores, upstream, adapters=not align)
        upstream |= trained and not align
        upstream |= not align and _trains(family.mlp_input(layer))
        mlp = family.mlp(layer)
        upstream |= _add_block(found, family, mlp, upstream, "mlp", adapters=not align) and not align
        if converted and (align or own):
            _add_teacher(found, attention.teacher_attn, scores)
        if not align and own:
            _add_teacher(found, mlp)
            if not converted:
                _add_teacher(found, attention, scores)
    if not align:
        head = family.head(lm)
        _add_block(found, family, head, upstream or _trains(family.final_norm(lm)), "head")
        if own:
            _add_teacher(found, head)
    if teacher is not None:
        _add_second(found, teacher, context)
    return found


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _add_mixer(found: Flops, family: Family, mixer: TimeMixer, upstream: bool) -> bool:
    """Add what a mixer costs; returns whether something in it trains."""
    core = 8 * mixer.mixer_config.num_heads * mixer.mixer_config.head_size**2
    found.add("recurrence", core, 2 * core * _before_the_last(family, mixer, upstream, adapters=True))
    return _add_block(found, family, mixer, upstream, "mixer")


def _add_attention(
    found: Flops, family: Family, attention: nn.Module, scores: float, upstream: bool, adapters: bool
) -> bool:
    """Add what an attention costs; returns whether something in it trains."""
    found.add("scores", scores, 2 * scores * _before_the_last(family, attention, upstream, adapters))
    return _add_block(found, family, attention, upstream, "attention", adapters)


def _add_block(
    found: Flops, family: Family, block: nn.Module, upstream: bool, kind: str, adapters: bool = True
) -> bool:
    """Add the matrices of a mixer, an attention, an MLP or a head; returns whether something in it trains."""
    trained, last = _trained(block, adapters), _last(family)
    for name, size, trains in _matrices(block, adapters):
        group = kind
        if _in_adapter(name):
            group = "adapters"
        elif kind == "mixer":
            group = "mixer.proj" if name.split(".")[0] in PROJECTIONS else "mixer.lora"
        behind = upstream or any(_feeds(other, name, last) for other in trained)
        found.add(group, 2 * size, 2 * size * (behind + trains))
    return bool(trained)


def _before_the_last(family: Family, block: nn.Module, upstream: bool, adapters: bool) -> bool:
    """Whether something trains in front of the last matrix of a block: r, k and v, or q, k and v."""
    return upstream or any(name.split(".")[0] not in _last(family) for name in _trained(block, adapters))


def _trained(block: nn.Module, adapters: bool) -> set[str]:
    return {name for name, p in block.named_parameters() if p.requires_grad and (adapters or not _in_adapter(name))}


def _last(family: Family) -> tuple[str, ...]:
    """Matrices that are fed by the others of their block, not by its input."""
    return "output", family.attention_output, family.mlp_output


def _add_teacher(found: Flops, block: nn.Module, scores: float = 0.0) -> None:
    """Add the forward of a part of the teacher, without adapters."""
    found.add("teacher", 2 * sum(size for _, size, _ in _matrices(block, adapters=False)) + scores)


def _add_second(found: Flops, teacher: PreTrainedModel, context: float) -> None:
    """Add the forward of a second model."""
    family, config = find(teacher.config.model_type), teacher.config
    _add_teacher(found, teacher, sum(_scores(family, config, i, context) for i in range(config.num_hidden_layers)))


def _scores(family: Family, config: PretrainedConfig, layer: int, context: float) -> float:
    fields = family.attention_fields(config, layer)
    return 4 * fields["num_heads"] * fields["head_size"] * context


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


def _feeds(parameter: str, matrix: str, last: tuple[str, ...]) -> bool:
    """Whether the input of a matrix depends on a parameter of the same block; `last` is of the block's family."""
    own, first = parameter.split(".")[0], matrix.split(".")[0]
    if own.startswith("x_") and own[2] == first[0]:  # token shift: x_r in front of receptance, x_w of w1, ...
        return True
    if first in last and own != first:
        return True
    if "lora_B." in matrix:
        return parameter == matrix.replace("lora_B.", "lora_A.") + ".weight"
    return re.fullmatch(r"[wavkg]2", matrix) is not None and parameter == f"{matrix[0]}1"
