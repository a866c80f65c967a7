"""Teacher and student one decoder layer at a time: what each of them has before a layer's attention.

The backbone's own forward runs once and shows what it calls every layer with; then the layers are called again one by
one with these arguments. So this file knows nothing of masks, rotations or other arguments of layers, and no more than
one layer's activations are in memory however deep the model is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import Batch
from ..modeling.first_layer import FirstLayerKV
from .adapters import disabled
from .model import HybridModel
from .quantized_linear import QuantizedLinear
from .weight_transfer import teacher_tensor


class AttentionActivations(NamedTuple):
    """What a converted layer's teacher attention did with one batch.

    Attributes:
        stream: (B, T, D), the residual stream that its output is added to.
        rope: cos and sin of the rotation that it applies.
        heads: (B, T, H * N), the outputs of its heads, which its output projection reads; computed with the original
            query, key and value projections where those of the teacher are quantized.
    """

    stream: Tensor
    rope: tuple[Tensor, Tensor]
    heads: Tensor


class MixerInputs(NamedTuple):
    """What a student has for the mixer of a layer.

    Attributes:
        stream: (B, T, D), the residual stream that its output is added to.
        x: (B, T, D), what it reads.
        first: what the first RWKV layer gave; None: it is this one.
    """

    stream: Tensor
    x: Tensor
    first: FirstLayerKV | None


class LayerCall(NamedTuple):
    """Arguments of a decoder layer after the hidden states."""

    args: tuple
    kwargs: dict


class LayerwiseTeacher:
    """A teacher that is about to run its first decoder layer over batches.

    Args:
        model: with the teacher's attention; adapters outside of the mixers are off, as in mode "teacher".
        batches: where the model is.

    Attributes:
        hidden: (B, T, D) of each batch, what the layer that runs next reads.
        calls: how each layer is called, by batch and layer; tensors are shared by all layers of a batch.
    """

    def __init__(self, model: HybridModel, batches: list[Batch]):
        self._model = model
        self.hidden: list[Tensor] = []
        self.calls: list[list[LayerCall]] = []
        for batch in batches:
            calls, hidden = layer_calls(model, batch)
            self.hidden.append(hidden)
            self.calls.append(calls)

    @torch.no_grad()
    def run(self, index: int) -> list[AttentionActivations]:
        """Run a layer on the output of the layer before it.

        Args:
            index: of the layer; from 0 on, each once.

        Returns:
            For each batch what the layer's attention did; empty where the student keeps the attention.
        """
        model = self._model
        layer = model.family.layers(model.lm)[index]
        watch = _Watch(model, index) if index in model.rwkv_layers else None
        activations = []
        with disabled(model.lm, but=".student_attn."):
            for i, calls in enumerate(self.calls):
                args, kwargs = calls[index]
                stream, self.hidden[i] = self.hidden[i], layer(self.hidden[i], *args, **kwargs)
                if watch is not None:
                    activations.append(AttentionActivations(stream, *watch.take()))
        if watch is not None:
            watch.close()
        return activations


class LayerwiseStudent:
    """The student of a teacher that has run nothing yet, about to run its own first decoder layer.

    Args:
        model: the teacher's; a layer's mixer may change until that layer runs.
        teacher: over the same batches.
        batches: where the model is.
    """

    def __init__(self, model: HybridModel, teacher: LayerwiseTeacher, batches: list[Batch]):
        self._model = model
        self._hidden, self._calls = list(teacher.hidden), teacher.calls
        self._contexts = [model.context(batch, "student") for batch in batches]

    @torch.no_grad()
    def inputs(self, index: int) -> list[MixerInputs]:
        """Return for each batch what the mixer of the layer that runs next will read."""
        model = self._model
        norm = model.family.attention_input(model.family.layers(model.lm)[index])
        is_first = model.mixers[index].is_first
        return [
            MixerInputs(hidden, norm(hidden), None if is_first else context.first.read())
            for hidden, context in zip(self._hidden, self._contexts, strict=True)
        ]

    @torch.no_grad()
    def run(self, index: int) -> None:
        """Run a layer on the output of the layer before it; from 0 on, each once."""
        layer = self._model.family.layers(self._model.lm)[index]
        for i, (calls, context) in enumerate(zip(self._calls, self._contexts, strict=True)):
            args, kwargs = calls[index]
            self._hidden[i] = layer(self._hidden[i], *args, **kwargs | {"forward_context": context})


class _Watch:
    """Hooks that note what a converted layer's teacher attention reads and computes."""

    def __init__(self, model: HybridModel, index: int):
        family, wrapper = model.family, model.attention(index)
        self._attention, self._mixer = wrapper.teacher_attn, wrapper.student_attn
        self._sources = family.sources(model.lm.config, index)
        inputs, output = family.attention_linears(self._attention)
        named = zip(family.attention_inputs, inputs, strict=True)
        self._quantized = {name: linear for name, linear in named if isinstance(linear, QuantizedLinear)}
        self._hooks = [
            self._attention.register_forward_pre_hook(self._note_call, with_kwargs=True),
            output.register_forward_pre_hook(self._note_heads),
        ]

    def take(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the rotation and the outputs of the heads that were noted since the last time."""
        args, kwargs = self._call
        if self._quantized:  # the mixer still has their originals, and is to be fitted to these
            hooks = [linear.register_forward_hook(self._original(name)) for name, linear in self._quantized.items()]
            self._attention(*args, **kwargs)
            for hook in hooks:
                hook.remove()
        noted = kwargs["position_embeddings"], self._heads
        del self._call, self._heads
        return noted

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _original(self, name: str) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        """Return the hook that replaces the output of a quantized projection by that of the original one."""
        weight = teacher_tensor(f"{name}.weight", self._mixer, self._sources, self._attention)
        assert weight is not None, "the mixer has a copy of every projection"
        bias = None if (own := self._quantized[name].bias) is None else own.to(weight.dtype)
        return lambda linear, args, output: F.linear(args[0], weight, bias)

    def _note_call(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        self._call = args, kwargs

    def _note_heads(self, output: nn.Module, args: tuple) -> None:
        self._heads = args[0]


@torch.no_grad()
def layer_calls(model: HybridModel, batch: Batch) -> tuple[list[LayerCall], Tensor]:
    """Return how the teacher's forward calls every layer, and the first one's input.

    The latter are hidden states (B, T, D).
    """
    entered: list[Tensor] = []
    calls: list[LayerCall] = []

    def called(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if not entered:
            entered.append(args[0])
        calls.append(LayerCall(args[1:], kwargs))

    layers = model.family.layers(model.lm)
    hooks = [layer.register_forward_pre_hook(called, with_kwargs=True) for layer in layers]
    model(batch, mode="teacher")
    for hook in hooks:
        hook.remove()
    return calls, entered[0]
