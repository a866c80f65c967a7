"""Teacher attention and RWKV-7 mixer side by side in one decoder layer.

The mode of each call says which of them runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..modeling.first_layer import ForwardContext
from ..modeling.rwkv_attention import RWKVAttention
from .document_attention import Window


class AttentionWrapper(nn.Module):
    """The module in place of a decoder layer's attention while a student is trained.

    Args:
        teacher_attn: the layer's original attention, frozen; None once a separate teacher model has taken over.
        student_attn: the mixer that learns to replace it.
    """

    def __init__(self, teacher_attn: nn.Module | None, student_attn: RWKVAttention):
        super().__init__()
        self.teacher_attn = teacher_attn
        self.student_attn = student_attn

    def forward(
        self, hidden_states: Tensor, *, forward_context: ForwardContext, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Return output (B, T, D) and attention weights or None, as transformers does.

        Mode "align" returns the teacher's output, so that every layer sees the teacher's own activations, and leaves
        the squared error and the teacher's squared norm (sums over real tokens, fp32) in `forward_context.errors`.
        """
        if forward_context.mode == "student":
            return self.student_attn(hidden_states, forward_context=forward_context, **kwargs)
        if self.teacher_attn is None:
            raise RuntimeError(f"mode {forward_context.mode!r} needs the teacher's attention, which was released")
        if forward_context.mode == "teacher":
            return self.teacher_attn(hidden_states, **kwargs)
        if forward_context.mode == "control":
            c = self.student_attn.mixer_config
            return self.teacher_attn(hidden_states, window=Window(c.window, c.sinks), **kwargs)
        with torch.no_grad():
            target, weights = self.teacher_attn(hidden_states, **kwargs)
        if forward_context.checkpoint:
            error, norm = checkpoint(self._error, hidden_states, target, forward_context, kwargs, use_reentrant=False)
        else:
            error, norm = self._error(hidden_states, target, forward_context, kwargs)
        forward_context.errors[self.student_attn.layer_idx] = (error, norm)
        return target, weights

    def _error(
        self, hidden_states: Tensor, target: Tensor, forward_context: ForwardContext, kwargs: dict
    ) -> tuple[Tensor, Tensor]:
        output, _ = self.student_attn(hidden_states, forward_context=forward_context, **kwargs)
        target = target.float()
        error, norm = (output.float() - target).square().sum(-1), target.square().sum(-1)
        if forward_context.mask is not None:
            padding = ~forward_context.mask
            error, norm = error.masked_fill(padding, 0), norm.masked_fill(padding, 0)
        return error.sum(), norm.sum()
