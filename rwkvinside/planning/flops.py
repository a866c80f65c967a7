"""Floating-point operations that a stage needs for one token.

They follow from the student's structure. Counted are products of matrices, a multiplication and an addition as two
operations; not norms, activations, the softmax, the optimizer, and nothing twice (recomputation is not counted). For a
matrix of n weights, a token costs

    2 n   in the forward
    2 n   for the gradient of its input, where something before it trains
    2 n   for the gradient of its weights, where it trains

where n counts those experts of a sparse MLP that a token is sent through,
and without matrices of weights, with C = heads x head size, N = head size, T = tokens of a row:

    scores      4 C (T + 1) / 2 in the forward: queries with keys, weights with values, half of the square; in a
                layer with a sliding window, or cut to one, as of a window
    recurrence  8 C N in the forward: S a, (S a) b^T, v k^T and S r for every head
    window      4 C times the keys that a token sees on average: t + 1 at first, window + sinks later
                all: twice that in the backward, where something before it trains

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

    Attributes:
        forward, backward: by "mixer.proj", "mixer.lora", "recurrence", "window", "attention", "scores", "mlp",
            "adapters", "head" and "teacher" (everything of its side).
    """

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Operations of forward and backward together."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def add(self, kind: str, forward: float, backward: float = 0.0) -> None:
        """Add operations to a purpose."""
        self.forward[kind] = self.forward.get(kind, 0.0) + forward
        self.backward[kind] = self.backward.get(kind, 0.0) + backward


def flops_per_token(
    student: HybridModel, plan: StagePlan, kind: TeacherKind | None, teacher: PreTrainedModel | None
) -> float:
    """Return the operations of a token of a stage that trains or chooses layers; arguments as of `training_flops`."""
    flops = training_flops(student, plan, kind, teacher)
    if plan.stage.chooses_layers:  # forwards of the student, then one with each layer's attention
        measuring = sum(flops.forward.values()) * (1 + len(student.rwkv_layers))
        return measuring + trial_flops(student, plan) / plan.length.total_tokens
    return flops.total


def trial_flops(student: HybridModel, plan: StagePlan) -> float:
    """Return the operations of all short distillations of a stage that chooses layers, at most.

    Every candidate counts as the student whose layers are all RWKV; arguments as of `training_flops`.
    """
    total = 0.0
    for trial in plan.trials:
        with trial.marked(student):
            of_token = training_flops(student, trial, TeacherKind.SELF).total
        total += of_token * trial.length.tokens_read * (1 + len(student.rwkv_layers))
    return total


def training_flops(
    student: HybridModel, plan: StagePlan, kind: TeacherKind | None, teacher: PreTrainedModel | None = None
) -> Flops:
    """Return the operations of one token of a training stage.

    `Stage.prepare` has made trainable what trains.

    Args:
        student: on any device, before an engine may shard it.
        plan: of the stage.
        kind: where the teacher's side comes from, as `Stage.prepare` said.
        teacher: the second model of an online teacher.
    """
    tokens = plan.length.seq_len
    flops = Flops()
    align, self_teacher = plan.stage.backward is Backward.MIXERS, kind is TeacherKind.SELF
    lm, family = student.lm, student.family
    upstream = not align and _trains(family.embedding(lm))
    for i, layer in enumerate(family.layers(lm)):
        converted, attention = i in student.rwkv_layers, family.attention(layer)
        scores = _scores(family, lm.config, i, tokens)
        upstream |= not align and _trains(family.attention_input(layer))
        # adapters outside of the mixers are off in align
        if converted:
            trained = _add_mixer(flops, family, attention.student_attn, tokens, upstream)
        else:
            seen = student.kept_windows.get(i)
            own = scores if seen is None else _scores(family, lm.config, i, tokens, sum(seen))
            trained = _add_attention(flops, family, attention, own, upstream, adapters=not align)
        upstream |= trained and not align
        upstream |= not align and (_trains(family.attention_post_norm(layer)) or _trains(family.mlp_input(layer)))
        mlp = family.mlp(layer)
        upstream |= _add_block(flops, family, mlp, upstream, "mlp", adapters=not align) and not align
        upstream |= not align and _trains(family.mlp_post_norm(layer))
        if converted and (align or self_teacher):
            _add_teacher(flops, family, attention.teacher_attn, scores)
        if not align and self_teacher:
            _add_teacher(flops, family, mlp)
            if not converted:
                _add_teacher(flops, family, attention, scores)
    if not align:
        head = family.head(lm)
        _add_block(flops, family, head, upstream or _trains(family.final_norm(lm)), "head")
        if self_teacher:
            _add_teacher(flops, family, head)
    if teacher is not None:
        _add_second(flops, teacher, tokens)
    return flops


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _add_mixer(flops: Flops, family: Family, mixer: TimeMixer, tokens: int, upstream: bool) -> bool:
    """Add what a mixer costs in rows of so many tokens; return whether something in it trains."""
    c, backward = mixer.mixer_config, 2 * _before_the_last(family, mixer, upstream, adapters=True)
    core = 8 * c.num_heads * c.head_size**2
    flops.add("recurrence", core, core * backward)
    if c.window:
        near = 4 * c.num_heads * c.head_size * _keys(c.window + c.sinks, tokens)
        flops.add("window", near, near * backward)
    return _add_block(flops, family, mixer, upstream, "mixer")


def _add_attention(
    flops: Flops, family: Family, attention: nn.Module, scores: float, upstream: bool, adapters: bool
) -> bool:
    """Add what an attention costs; return whether something in it trains."""
    flops.add("scores", scores, 2 * scores * _before_the_last(family, attention, upstream, adapters))
    return _add_block(flops, family, attention, upstream, "attention", adapters)


def _add_block(
    flops: Flops, family: Family, block: nn.Module, upstream: bool, kind: str, adapters: bool = True
) -> bool:
    """Add the matrices of a mixer, an attention, an MLP or a head.

    Returns:
        Whether something in it trains.
    """
    trained, last = _trained(block, adapters), _last(family)
    for name, size, trains in _matrices(family, block, adapters):
        group = kind
        if _in_adapter(name):
            group = "adapters"
        elif kind == "mixer":
            group = "mixer.proj" if name.split(".")[0] in PROJECTIONS else "mixer.lora"
        input_trains = upstream or any(_feeds(other, name, last) for other in trained)
        flops.add(group, 2 * size, 2 * size * (input_trains + trains))
    return bool(trained)


def _before_the_last(family: Family, block: nn.Module, upstream: bool, adapters: bool) -> bool:
    """Return whether something trains before the last matrix of a block.

    That is r, k and v, or q, k and v.
    """
    return upstream or any(name.split(".")[0] not in _last(family) for name in _trained(block, adapters))


def _trained(block: nn.Module, adapters: bool) -> set[str]:
    return {name for name, p in block.named_parameters() if p.requires_grad and (adapters or not _in_adapter(name))}


def _last(family: Family) -> tuple[str, ...]:
    """Return the matrices that are fed by the others of their block, not by its input."""
    return "output", family.attention_output, family.mlp_output


def _add_teacher(flops: Flops, family: Family, block: nn.Module, scores: float = 0.0) -> None:
    """Add the forward of a part of the teacher, without adapters."""
    flops.add("teacher", 2 * sum(size for _, size, _ in _matrices(family, block, adapters=False)) + scores)


def _add_second(flops: Flops, teacher: PreTrainedModel, tokens: int) -> None:
    """Add the forward of a second model."""
    family, config = find(teacher.config.model_type), teacher.config
    scores = sum(_scores(family, config, i, tokens) for i in range(config.num_hidden_layers))
    _add_teacher(flops, family, teacher, scores)


def _scores(family: Family, config: PretrainedConfig, layer: int, tokens: int, seen: int | None = None) -> float:
    """Return what an attention that sees so many tokens costs; None: as many as the teacher's."""
    fields = family.attention_fields(config, layer)
    keys = _keys(seen or family.window(config, layer) or tokens, tokens)
    return 4 * fields["num_heads"] * fields["head_size"] * keys


def _keys(window: int, tokens: int) -> float:
    """Return how many keys a token of a row of so many tokens sees on average."""
    most = min(window, tokens)
    return most - most * (most - 1) / (2 * tokens)


def _matrices(family: Family, block: nn.Module, adapters: bool) -> Iterator[tuple[str, int, bool]]:
    """Yield every matrix that the block's tokens are multiplied with.

    Yields:
        Name, weights, and whether its gradient is needed.
    """
    parameters = {n: p for n, p in block.named_parameters() if adapters or not _in_adapter(n)}
    # MiSS in its bat form trains a function of the whole weight, which therefore needs a gradient
    bat = {n.partition("miss_block.")[0] for n, p in parameters.items() if "miss_block." in n and p.ndim == 3}
    for name, module in block.named_modules():
        if name.startswith("experts."):  # their matrices are not all multiplied with
            continue
        if isinstance(module, nn.Linear) and (adapters or not _in_adapter(name)):
            weight = module._parameters.get("weight")  # a quantized layer has none
            trains = (weight is not None and weight.requires_grad) or name.removesuffix("base_layer") in bat
            yield name, module.in_features * module.out_features, trains
        elif (experts := family.experts(module)) is not None:
            count = len(experts.router)
            yield "gate", experts.router.numel(), experts.router.requires_grad
            for matrix, weight in ((family.mlp_inputs[0], experts.inputs), (family.mlp_output, experts.output)):
                yield matrix, weight.numel() * experts.chosen // count, weight.requires_grad
            if adapters:
                for name, p in parameters.items():
                    if name.startswith("experts.") and _in_adapter(name):
                        yield name.removesuffix(".weight"), p.numel() * experts.chosen // count, p.requires_grad
    for name, parameter in parameters.items():
        if re.fullmatch(r"[wavkg][12]", name) or ("miss_block." in name and parameter.ndim == 2):
            yield name, parameter.numel(), parameter.requires_grad


def _in_adapter(name: str) -> bool:
    return re.search(r"(^|\.)(lora_|miss_block)", name) is not None


def _feeds(parameter: str, matrix: str, last: tuple[str, ...]) -> bool:
    """Return whether the input of a matrix depends on a parameter of the same block.

    `last` is of the block's family.
    """
    source, target = (name.removeprefix("experts.").split(".")[0] for name in (parameter, matrix))
    if source.startswith("x_") and source[2] == target[0]:  # token shift: x_r before receptance, x_w before w1, ...
        return True
    if target in last and source != target:
        return True
    if "lora_B." in matrix:
        return parameter == matrix.replace("lora_B.", "lora_A.") + ".weight"
    return re.fullmatch(r"[wavkg]2", matrix) is not None and parameter == f"{matrix[0]}1"
