"""The teacher's forward one decoder layer at a time, with attention activations.

The backbone's own forward runs once and shows what it calls every layer with; then the layers are called again one by
one with these arguments. So this file knows nothing of masks, rotations or other arguments of layers, and no more than
one layer's activations are in memory however deep the model is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from .adapters import disabled
from .model import HybridModel
from .quantized_linear import QuantizedLinear


class AttentionActivations(NamedTuple):
    """What a converted layer's teacher attention did with one batch.

    Attributes:
        x: (B, T, D), what it reads.
        rope: cos and sin of the rotation that it applies.
        heads: (B, T, H * N), the outputs of its heads, which its output projection reads; computed with the original
            query, key and value projections where those of the teacher are quantized.
    """

    x: Tensor
    rope: tuple[Tensor, Tensor]
    heads: Tensor


class LayerCall(NamedTuple):
    """Arguments of a decoder layer after the hidden states."""

    args: tuple
    kwargs: dict


class LayerwiseTeacher:
    """A teacher that is about to run its first decoder layer over batches.

    Args:
        model: with the teacher's attention; adapters outside of the mixers are off, as in mode "teacher".
        batches: where the model is.
    """

    def __init__(self, model: HybridModel, batches: list[Batch]):
        self._model = model
        self._hidden: list[Tensor] = []
        self._calls: list[list[LayerCall]] = []  # by batch and layer; tensors are shared by all layers of a batch
        for batch in batches:
            calls, hidden = layer_calls(model, batch)
            self._hidden.append(hidden)
            self._calls.append(calls)

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
            for i, calls in enumerate(self._calls):
                args, kwargs = calls[index]
                self._hidden[i] = layer(self._hidden[i], *args, **kwargs)
                if watch is not None:
                    activations.append(watch.take())
        if watch is not None:
            watch.close()
        return activations


class _Watch:
    """Hooks that note what a converted layer's teacher attention reads and computes."""

    def __init__(self, model: HybridModel, index: int):
        family, wrapper = model.family, model.attention(index)
        self._attention = wrapper.teacher_attn
        inputs, output = family.attention_linears(self._attention)
        names = [family.weight_map[f"{name}.weight"].removesuffix(".weight") for name in family.attention_inputs]
        copies = [wrapper.student_attn.get_submodule(name) for name in names]
        self._quantized = [pair for pair in zip(inputs, copies, strict=True) if isinstance(pair[0], QuantizedLinear)]
        self._hooks = [
            family.attention_input(family.layers(model.lm)[index]).register_forward_hook(self._note_input),
            self._attention.register_forward_pre_hook(self._note_call, with_kwargs=True),
            output.register_forward_pre_hook(self._note_heads),
        ]

    def take(self) -> AttentionActivations:
        """Return what was noted since the last time."""
        x, (args, kwargs) = self._x, self._call
        if self._quantized:  # the mixer still has their originals, and is to be fitted to these
            hooks = [
                linear.register_forward_hook(lambda m, args, y, copy=copy: copy(args[0]))
                for linear, copy in self._quantized
            ]
            self._attention(*args, **kwargs)
            for hook in hooks:
                hook.remove()
        activations = AttentionActivations(x, kwargs["position_embeddings"], self._heads)
        del self._x, self._call, self._heads
        return activations

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _note_input(self, module: nn.Module, args: tuple, x: Tensor) -> None:
        self._x = x

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
