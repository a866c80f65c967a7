"""The student in training: the teacher's own model with wrapped attention layers.

It knows which parameters belong to which group, which of them train, and under which names the exported model holds
them. The exported model itself is `modeling/hybrid_<family>.py`; both run the same mixers. The `Family` knows what
differs between teachers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..data.batch import Batch
from ..errors import UserError
from ..families.base import Family
from ..families.registry import find
from ..modeling.first_layer import ForwardContext
from ..modeling.kept_attention import is_cut
from ..modeling.mixer_presets import TimeMixerConfig, check_first_layer
from ..modeling.rwkv_attention import RWKVAttention, identity_rotation
from .adapters import disabled, is_adapter, is_start, module_of
from .attention_wrapper import AttentionWrapper
from .carried_rows import CarriedRows
from .document_attention import Window, attend_within_documents, backbone_outputs, kept_windows
from .experts import StackedExperts, expert_weights
from .freezing import GROUPS, TEACHER, canonical_name, group_of, walk, weight_names
from .layouts import LayerChoice, resolve_layout
from .lm_head import Head, HeadTask, LMHeadLoss, shaped
from .quantized_linear import QuantizedLinear
from .settings import StudentConfig
from .weight_transfer import transfer


class Routing(NamedTuple):
    """What the routers of sparse layers say.

    Attributes:
        logits: of each sparse layer, (B * T, experts).
        chosen: experts that a token is sent through.
    """

    logits: tuple[Tensor, ...]
    chosen: int


class HybridModel(nn.Module):
    """A teacher whose converted layers can run attention, mixer, or both.

    Made by `from_teacher`.

    Attributes:
        lm: the teacher's causal language model with wrapped layers.
        lm_head_loss: runs tasks on the head.
        family: what the teacher's architecture is like.
        spec: settings of the student.
        rwkv_layers: indices of the converted layers, ascending.
        trained: canonical names of what was ever trained, and so differs from the teacher.
        master_weights: full-precision weights that were trained before and are quantized now, by canonical name.
    """

    def __init__(self, lm: PreTrainedModel, family: Family, spec: StudentConfig, rwkv_layers: list[int], tied: bool):
        super().__init__()
        self.lm = attend_within_documents(lm)
        self.lm_head_loss = LMHeadLoss(family.head(lm), family.logit_shape(lm.config))
        self.family = family
        self.spec = spec
        self.rwkv_layers = rwkv_layers
        self.teacher_tied = tied
        self.trained: set[str] = self.own_names()
        self.master_weights: dict[str, Tensor] = {}
        self._recompute: str | None = None
        self.requires_grad_(False)

    @classmethod
    def from_teacher(cls, teacher: PreTrainedModel, spec: StudentConfig) -> HybridModel:
        """Wrap a loaded teacher, which afterwards belongs to the hybrid.

        Its layers are changed in place. Embeddings that the teacher ties to its head stay one matrix until one of them
        trains, which gives the head a copy. On the meta device only shapes are made, nothing is initialized. Mixers are
        fp32 whatever the teacher is. With all layers kept it is the teacher in every mode, a control for tests.

        Raises:
            UserError: an unsupported architecture, layer indices out of range or still to be chosen, or a preset whose
                mixer has no tensor for one of the teacher's.
        """
        config = teacher.config
        family = find(config.model_type)
        family.check(config)
        count = config.num_hidden_layers
        try:
            kept = resolve_layout(spec.attention_layers, count, allow_all=True)
        except ValueError as error:
            raise UserError(f"student.attention_layers {error}") from error
        if isinstance(kept, LayerChoice):
            raise UserError(
                f"which layers keep attention is still to be chosen (student.attention_layers: choose {kept.choose})",
                "name the layers, or let a run choose them",
            )
        rwkv_layers = [i for i in range(count) if i not in kept]

        try:
            mixers = {i: family.mixer_config(config, i, spec.preset, **spec.mixer_overrides(i)) for i in rwkv_layers}
            check_first_layer(mixers)
            for i, layer in enumerate(family.layers(teacher)):
                attention, change = family.attention(layer), _change_where_kept(config, i, spec)
                if i in rwkv_layers:
                    device = next(attention.parameters()).device
                    with torch.device(device):
                        first = i == rwkv_layers[0]
                        student = RWKVAttention(
                            mixers[i], i, first, num_layers=count, init=spec.init, shift_ratio=spec.shift_ratio
                        )
                    if not spec.from_nothing:
                        transfer(attention, student, family.sources(config, i))
                    teacher_attention = None if spec.from_nothing else attention
                    family.set_attention(layer, AttentionWrapper(teacher_attention, student, change))
                elif change is not None:
                    attention.register_forward_pre_hook(change, with_kwargs=True)
        except ValueError as error:
            raise UserError(f"student.preset={spec.preset!r}: {error}") from error

        tied = config.tie_word_embeddings
        config.tie_word_embeddings = False
        return cls(teacher, family, spec, rwkv_layers, tied)

    def forward(
        self,
        batch: Batch,
        mode: str = "student",
        task: HeadTask | None = None,
        layers: Mapping[int, str] | None = None,
        routers: bool = False,
        carried: CarriedRows | None = None,
        norms: bool = True,
    ):
        """Run a packed batch.

        Args:
            batch: token ids, positions and documents of the rows.
            mode: "student", "teacher" (the original model as long as only mixers and adapters were trained), "control"
                (the teacher, cut to the student's windows: those of the mixers in converted layers, and
                `attention_window` in the others) or "align". Adapters outside of the mixers are on in mode "student"
                only.
            task: what the head computes (a loss, scores, logits); it runs inside the forward, so that an engine that
                shards parameters gathers the head for it. None: nothing. Ignored in mode "align".
            layers: modes of converted layers that differ from `mode`: "student", "teacher", or "kept", which in mode
                "student" is the student that keeps this layer's attention, see `keep_attention`.
            routers: return what the routers say, too, of a model with experts.
            carried: what the rows begin with, and where the layers leave what they end with; mode "student" only, and
                the student's attention must be cut to windows. None: rows begin anew.
            norms: align only: return the norms of the teacher, too.

        Returns:
            "align": {layer: (squared error, squared norm of the teacher or None)}, 0-d fp32 sums over real tokens;
            otherwise the task's result, or without a task the final hidden states (B, T, D); with `routers` a pair of
            this and a `Routing`.
        """
        call = replace(self.context(batch, mode, layers or {}), carried=carried, norms=norms)
        adapters = nullcontext() if mode == "student" else disabled(self.lm, but=".student_attn.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and mode not in ("teacher", "control")), adapters:
            asked = {"output_router_logits": True} if routers else {}
            outputs = backbone_outputs(self.lm, batch, forward_context=call, **asked)
            if mode == "align":
                return call.errors
            result = outputs.last_hidden_state
            if task is not None:  # DeepSpeed warns of positional objects
                result = self.lm_head_loss(result, targets=batch.targets, task=task)
            return (result, Routing(outputs.router_logits, self.experts_of_a_token)) if routers else result

    def train(self, mode: bool = True) -> HybridModel:
        """Put the decoder layers themselves into training mode, and nothing in them.

        transformers recomputes a layer's activations where the layer is in training mode. Its attention, whose dropout
        the teacher was trained with, never is: mode "teacher" is the teacher, and what is recomputed is the same.
        """
        super().train(False)
        for layer in self.family.layers(self.lm):
            layer.training = mode
        return self

    def recompute(self, what: str | None) -> None:
        """Compute activations again in the backward instead of keeping them.

        Args:
            what: "layers": decoder layers; "mixers": mixers in mode "align"; "recurrence": in either what lies between
                the projections of mixers; None: nothing.
        """
        self._recompute = what
        if what == "layers":
            self.lm.activation_checkpointing_enable()
        elif self.lm.is_activation_checkpointing:
            self.lm.activation_checkpointing_disable()
        for experts in (module for module in self.lm.modules() if isinstance(module, StackedExperts)):
            experts.recomputed = what == "layers"
        self.train(what == "layers")

    def context(self, batch: Batch, mode: str, layers: Mapping[int, str] = MappingProxyType({})) -> ForwardContext:
        """Return what the layers are to know of one forward over a batch; arguments as of `forward`."""
        documents = batch.documents
        mixing = [i for i in self.rwkv_layers if layers.get(i, mode) == "student"] if layers else []
        return ForwardContext(
            layer_modes=layers,
            provider=mixing[0] if mixing and mixing[0] != self.rwkv_layers[0] else None,
            mode=mode,
            mask=batch.mask if documents.padded else None,
            cu_seqlens=None if documents.alone else documents.cu_seqlens,
            recompute=self._recompute,
        )

    @property
    def experts_of_a_token(self) -> int:
        """How many experts a token is sent through in each sparse layer; 0: there are none."""
        family = self.family
        found = (family.experts(family.mlp(layer)) for layer in family.layers(self.lm))
        return next((experts.chosen for experts in found if experts is not None), 0)

    @property
    def teacher_head(self) -> Head:
        """The head without adapters, for the hidden states of mode "teacher".

        Under ZeRO 3 its weights are gathered only while a task runs.
        """
        return shaped(self._head, self.lm_head_loss.shape)

    def refresh_head(self) -> None:
        """Give `lm_head_loss` the model's head, after that has been replaced."""
        self.lm_head_loss.head = self.family.head(self.lm)

    def release_teacher(self) -> None:
        """Drop the teacher's attention of converted layers: another teacher is used."""
        for i in self.rwkv_layers:
            self.attention(i).teacher_attn = None

    def keep_attention(self, layers: Collection[int]) -> None:
        """Put the teacher's attention back into converted layers for good; their mixers are gone.

        It is the student that `from_teacher` makes with these layers kept and the tensors of the other mixers. A mixer
        that becomes the first one loses its residual mixes.

        Raises:
            RuntimeError: the student has quantized layers or adapters.
        """
        if self.quantized or any(map(is_adapter, self.canonical_parameters())):
            raise RuntimeError("a student with quantized layers or adapters keeps its layers as they are")
        trained = self.trained - self.mixer_names()
        for i in layers:
            wrapper = self.attention(i)
            self.family.set_attention(self.family.layers(self.lm)[i], wrapper.teacher_attn)
            if wrapper.kept is not None:
                wrapper.teacher_attn.register_forward_pre_hook(wrapper.kept, with_kwargs=True)
        self.rwkv_layers = [i for i in self.rwkv_layers if i not in layers]
        kept = tuple(i for i in range(self.lm.config.num_hidden_layers) if i not in self.rwkv_layers)
        self.spec = self.spec.model_copy(update={"attention_layers": kept})
        if self.rwkv_layers and not (old := self.mixers[self.rwkv_layers[0]]).is_first:
            with torch.device(old.w0.device):
                new = RWKVAttention(old.mixer_config, old.layer_idx, True, len(self.family.layers(self.lm)))
            own = set(new.state_dict())
            new.load_state_dict({name: tensor for name, tensor in old.state_dict().items() if name in own}, assign=True)
            self.attention(old.layer_idx).student_attn = new.requires_grad_(False)
        self.trained = trained | self.mixer_names()

    def attention(self, layer: int) -> nn.Module:
        """Return the `AttentionWrapper` of a layer, or its attention where that is kept."""
        return self.family.attention(self.family.layers(self.lm)[layer])

    @property
    def mixers(self) -> dict[int, RWKVAttention]:
        """The mixers by layer index."""
        return {i: self.attention(i).student_attn for i in self.rwkv_layers}

    @property
    def kept_windows(self) -> dict[int, Window]:
        """What layers that keep attention are cut to, by layer index."""
        window = Window(self.spec.attention_window, self.spec.attention_sinks)
        return kept_windows(self.lm.config, self.rwkv_layers, window)

    @property
    def mixer_configs(self) -> dict[int, TimeMixerConfig]:
        """The configurations of the mixers by layer index."""
        return {i: mixer.mixer_config for i, mixer in self.mixers.items()}

    def canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Return every parameter of the student under its name in the exported model.

        Adapters are included, the teacher's attention and the weights of quantized layers are not. A head that is still
        the embedding is listed under both names.
        """
        return {
            canonical_name(f"{path}.{name}"): parameter
            for path, module in walk(self.lm, without=f"{TEACHER}_attn")
            for name, parameter in module._parameters.items()
            if parameter is not None and name != "packed"
        }

    def linear_layers(self) -> dict[str, str]:
        """Return the layers that can be quantized or adapted.

        Returns:
            {canonical name: name below `lm`}; the canonical names of the teacher's attention have `.teacher_attn`. The
            weights of a layer's experts are named as layers.
        """
        names = (name for name, module in self.lm.named_modules() if isinstance(module, nn.Linear))
        linear = {canonical_name(name): name for name in names if not is_adapter(f"{name}.weight")}
        return linear | {name: name for name in expert_weights(self.lm)}

    @property
    def quantized(self) -> dict[str, QuantizedLinear]:
        """Quantized layers by canonical name."""
        return {canonical_name(name): layer for name, layer in walk(self.lm) if isinstance(layer, QuantizedLinear)}

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix in memory."""
        return self._head._parameters.get("weight") is self.family.embedding(self.lm).weight

    def untie(self) -> None:
        """Give the head its own matrix where it still shares the embedding's."""
        if self.tied:
            self._head.weight = nn.Parameter(self._head.weight.detach().clone(), requires_grad=False)

    @property
    def embedding_names(self) -> tuple[str, str]:
        """The canonical names of the matrices of embedding and head."""
        return f"{self.family.embedding_path}.weight", f"{self.family.head_path}.weight"

    @property
    def _head(self) -> nn.Module:
        """The head without adapters."""
        head = self.family.head(self.lm)
        return getattr(head, "base_layer", head)

    def group_of(self, name: str) -> tuple[str, ...]:
        """Return the groups of a canonical parameter name, from wide to narrow."""
        return group_of(name, self.family, self.rwkv_layers)

    def mixer_names(self) -> set[str]:
        """Return the canonical names of all parameters of the mixers.

        Quantized ones are included, adapters are not.
        """
        names = [*self.canonical_parameters(), *weight_names(self.quantized)]
        return {name for name in names if self.group_of(name)[0] == "mixer"}

    def own_names(self) -> set[str]:
        """Return the canonical names of what no teacher has: the mixers, and all of a model trained from nothing."""
        return set(self.canonical_parameters()) if self.spec.from_nothing else self.mixer_names()

    def adapters_beside_mixers(self) -> list[str]:
        """Return trainable tensors of adapters that are on in mode "student" only."""
        names = [n for n, p in self.canonical_parameters().items() if p.requires_grad and is_adapter(n)]
        return [n for n in names if self.group_of(f"{module_of(n)}.weight")[0] != "mixer"]

    def teacher_changes(self) -> list[str]:
        """Return what was trained that runs in mode "teacher" too.

        Empty as long as that mode is the teacher.
        """
        return sorted(name for name in self.trained if self.group_of(name)[0] not in ("mixer", "adapters"))

    def matching(self, pattern: str) -> set[str]:
        """Return the canonical names of trainable parameters that a pattern names.

        Args:
            pattern: a name of `GROUPS`, or a regular expression matched against whole canonical parameter names.

        Raises:
            UserError: it names neither these nor quantized weights, or is not a regular expression.
        """
        parameters = {name for name in self.canonical_parameters() if not is_start(name)}
        quantized = weight_names(self.quantized)
        names = self._named(pattern, parameters | quantized)
        if not names:
            raise UserError(
                f"train pattern {pattern!r} matches no parameter",
                f"groups: {', '.join(GROUPS)}; or a regular expression over names like {min(parameters)}",
            )
        return names - quantized

    def set_trainable(self, patterns: Iterable[str]) -> dict[str, int]:
        """Freeze everything but the parameters that the patterns name.

        Args:
            patterns: see `matching`.

        Returns:
            Number of trainable parameters by group.

        Raises:
            UserError: a pattern that matches nothing, is not a regular expression, or names what is quantized.
        """
        chosen: set[str] = set()
        quantized = weight_names(self.quantized)
        for pattern in patterns:
            chosen |= self.matching(pattern)
            if clash := sorted(self._named(pattern, quantized)):
                raise UserError(
                    f"train pattern {pattern!r} matches {clash[0]} (and {len(clash) - 1} more), which is quantized",
                    "quantized weights stay frozen: take them out of `train`, or out of `quantize` of this stage",
                )
        if chosen & set(self.embedding_names):
            self.untie()
        parameters = self.canonical_parameters()
        counts: dict[str, int] = {}
        self.requires_grad_(False)
        for name in chosen:
            parameters[name].requires_grad_(True)
            group = self.group_of(name)[-1]
            counts[group] = counts.get(group, 0) + parameters[name].numel()
        self.trained |= chosen
        return counts

    def _named(self, pattern: str, names: Iterable[str]) -> set[str]:
        if pattern in GROUPS:
            return {name for name in names if pattern in self.group_of(name)}
        try:
            return {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f"train pattern {pattern!r} is not a regular expression: {error}") from error

    def group_table(self) -> list[tuple[str, int, int]]:
        """Return (group, trainable parameters, all parameters) for every group.

        Groups that the student does not have and quantized weights are left out.
        """
        rows: dict[str, list[int]] = {}
        for name, parameter in self.canonical_parameters().items():
            row = rows.setdefault(self.group_of(name)[-1], [0, 0])
            row[0] += parameter.numel() * parameter.requires_grad
            row[1] += parameter.numel()
        return [(group, *rows[group]) for group in GROUPS if group in rows]

    def student_state_dict(self) -> dict[str, Tensor]:
        """Return what differs from the teacher, under exported names.

        That is mixers, all that was ever trained, and adapters.
        """
        named = {n: p.detach() for n, p in self.canonical_parameters().items() if n in self.trained or is_adapter(n)}
        return named | self.master_weights

    @torch.no_grad()
    def load_student_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load what `student_state_dict` gave.

        Nothing may be missing, unknown, or of another shape. Parameters take on the dtype of the tensors, so that what
        training gained over the teacher's precision is not lost. Adapters that are not among the tensors stay as they
        are.

        Raises:
            UserError: names or shapes that do not fit this student.
        """
        if tensors.keys() & set(self.embedding_names):
            self.untie()
        parameters = self.canonical_parameters()
        own = {name for name in self.own_names() if not is_adapter(name)}
        wrong = [f"{n} is missing" for n in sorted(own - set(tensors))]
        wrong += [f"{n} is unknown" for n in sorted(set(tensors) - set(parameters))]
        wrong += [
            f"{n} has shape {tuple(t.shape)}, not {tuple(parameters[n].shape)}"
            for n, t in tensors.items()
            if n in parameters and t.shape != parameters[n].shape
        ]
        if wrong:
            raise UserError(
                f"the checkpoint does not fit this student: {wrong[0]}"
                + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""),
                "use the student settings that the checkpoint was made with",
            )
        for name, tensor in tensors.items():
            parameters[name].data = tensor.to(parameters[name].device, copy=True)
        self.trained = set(tensors) | own


def _change_where_kept(config: PretrainedConfig, layer: int, spec: StudentConfig) -> Callable | None:
    """Return the forward pre-hook of a layer's attention in a student that keeps it; None where it stays as it is."""
    window = Window(spec.attention_window, spec.attention_sinks)
    own = window if is_cut(config, layer, window.tokens) else None
    if spec.attention_rope and not spec.attention_log_base and own is None:
        return None
    return partial(_changed_attention, spec=spec, window=own)


def _changed_attention(
    module: nn.Module, args: tuple, kwargs: dict, *, spec: StudentConfig, window: Window | None
) -> tuple[tuple, dict]:
    """Change what kept attention is called with as `modeling.kept_attention` changes it in an export.

    Mode "teacher" stays the teacher; the control is the teacher cut, and nothing else.
    """
    mode = kwargs["forward_context"].mode
    if mode == "student" and not spec.attention_rope:
        kwargs = kwargs | {"position_embeddings": identity_rotation(kwargs["position_embeddings"])}
    if mode == "student" and spec.attention_log_base:
        kwargs = kwargs | {"log_base": spec.attention_log_base}
    if mode in ("student", "control") and window is not None:
        kwargs = kwargs | {"window": window}
    return args, kwargs
