"""Teacher attention and RWKV-7 mixer side by side in one decoder layer; which of them runs is said per call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..modeling.first_layer import MixerCall
from ..modeling.rwkv_attention import RWKVAttention


class AttentionWrapper(nn.Module):
    """Takes the place of `layer.self_attn` while a student is trained.

    Args:
        teacher_attn: the layer's original attention, frozen; None once a separate teacher model has taken over.
        student_attn: the mixer that learns to replace it.
    """

    def __init__(self, teacher_attn: nn.Module | None, student_attn: RWKVAttention):
        super().__init__()
        self.teacher_attn = teacher_attn
        self.student_attn = student_attn

    def forward(self, hidden_states: Tensor, *, mixer_call: MixerCall, **kwargs) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (output (B, T, D), attention weights or None), in the attention convention of transformers.

        Mode "align" returns the teacher's output, so that every layer sees the teacher's own activations, and leaves
        the squared error and the teacher's squared norm (sums over real tokens, fp32) in `mixer_call.errors`.
        """
        if mixer_call.mode == "student":
            return self.student_attn(hidden_states, mixer_call=mixer_call, **kwargs)
        if self.teacher_attn is None:
            raise RuntimeError(f"mode {mixer_call.mode!r} needs the teacher's attention, which was released")
        if mixer_call.mode == "teacher":
            return self.teacher_attn(hidden_states, **kwargs)
        with torch.no_grad():
            target, weights = self.teacher_attn(hidden_states, **kwargs)
        if mixer_call.checkpoint:
            error, norm = checkpoint(self._error, hidden_states, target, mixer_call, kwargs, use_reentrant=False)
        else:
            error, norm = self._error(hidden_states, target, mixer_call, kwargs)
        mixer_call.errors[self.student_attn.layer_idx] = (error, norm)
        return target, weights

    def _error(self, hidden_states: Tensor, target: Tensor, call: MixerCall, kwargs: dict) -> tuple[Tensor, Tensor]:
        output, _ = self.student_attn(hidden_states, mixer_call=call, **kwargs)
        target = target.float()
        error, norm = (output.float() - target).square().sum(-1), target.square().sum(-1)
        if call.mask is not None:
            error, norm = error.masked_fill(~call.mask, 0), norm.masked_fill(~call.mask, 0)
        return error.sum(), norm.sum()
