"""Teacher attention and RWKV-7 mixer side by side in one decoder layer.

The mode of each call says which of them runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..modeling.first_layer import FirstLayerKV, ForwardContext
from ..modeling.rwkv_attention import RWKVAttention
from .document_attention import Window
from .layer_error import squared_error, squares


class AttentionWrapper(nn.Module):
    """The module in place of a decoder layer's attention while a student is trained.

    Args:
        teacher_attn: the layer's original attention, frozen; None once a separate teacher model has taken over.
        student_attn: the mixer that learns to replace it.
        kept: forward pre-hook, with keyword arguments, that the attention would have if the layer kept it; None: none.
    """

    def __init__(self, teacher_attn: nn.Module | None, student_attn: RWKVAttention, kept: Callable | None = None):
        super().__init__()
        self.teacher_attn = teacher_attn
        self.student_attn = student_attn
        self.kept = kept

    def forward(
        self, hidden_states: Tensor, *, forward_context: ForwardContext, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Return output (B, T, D) and attention weights or None, as transformers does.

        Mode "align" returns the teacher's output, so that every layer sees the teacher's own activations, and leaves
        the squared error and the teacher's squared norm (sums over real tokens, fp32), where that is asked for, in
        `forward_context.errors`.
        """
        mode = forward_context.layer_modes.get(self.student_attn.layer_idx, forward_context.mode)
        if mode == "student":
            if forward_context.provider == self.student_attn.layer_idx:
                forward_context.first.write(self._own_values(hidden_states, forward_context, kwargs))
            return self.student_attn(hidden_states, forward_context=forward_context, **kwargs)
        if self.teacher_attn is None:
            raise RuntimeError(f"mode {mode!r} needs the teacher's attention, which was released")
        if mode == "kept" and self.kept is not None:
            _, kwargs = self.kept(self.teacher_attn, (), kwargs | {"forward_context": forward_context})
        if mode in ("teacher", "kept"):
            return self.teacher_attn(hidden_states, **kwargs)
        if mode == "control":
            c = self.student_attn.mixer_config
            return self.teacher_attn(hidden_states, window=Window(c.window, c.sinks), **kwargs)
        with torch.no_grad():
            target, weights = self.teacher_attn(hidden_states, **kwargs)
        if forward_context.recompute == "mixers":
            error = checkpoint(self._error, hidden_states, target, forward_context, kwargs, use_reentrant=False)
        else:
            error = self._error(hidden_states, target, forward_context, kwargs)
        norm = squares(target, forward_context.mask) if forward_context.norms else None
        forward_context.errors[self.student_attn.layer_idx] = (error, norm)
        return target, weights

    def _own_values(self, hidden_states: Tensor, forward_context: ForwardContext, kwargs: dict) -> FirstLayerKV:
        return self.student_attn.own_values(
            hidden_states,
            rope=kwargs["position_embeddings"],
            mask=forward_context.mask,
            cu_seqlens=forward_context.cu_seqlens,
        )

    def _error(self, hidden_states: Tensor, target: Tensor, forward_context: ForwardContext, kwargs: dict) -> Tensor:
        output, _ = self.student_attn(hidden_states, forward_context=forward_context, **kwargs)
        return squared_error(output, target, forward_context.mask, self.student_attn.mixer_config.backend)
