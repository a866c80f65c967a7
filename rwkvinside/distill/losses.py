"""The objectives as pure functions of tensors: layer alignment, chunked distillation of logits, cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100


def alignment_loss(errors: dict[int, tuple[Tensor, Tensor]], power: dict[int, float]) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the squared error per layer, each divided by that layer's mean squared teacher norm.

    The per-layer weights 1 / power are those of RADLADS (arXiv 2505.03005, step 1) up to a common factor. They are
    constants measured before the stage, not statistics of the micro-batch: so the loss does not depend on how a batch
    is cut.

    Args:
        errors: {layer: (squared error, squared teacher norm)}, 0-d sums over real tokens.
        power: {layer: mean squared norm of the teacher's attention output per token}.

    Returns:
        The mean over layers (0-d, fp32, carries gradient) and the value per layer (detached), both sums over tokens.
    """
    relative = torch.stack([errors[i][0] / power[i] for i in sorted(errors)])
    return relative.mean(), relative.detach()


def head_losses(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: nn.Module | None,
    *,
    kl: float,
    ce: float,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Distillation and cross-entropy from final hidden states, `chunk_tokens` x vocabulary logits at a time.

    KL is KL(teacher || student) at `temperature`, times its square (Hinton et al. 2015, arXiv 1503.02531), over the
    ids that both vocabularies share (the larger one is cut: families pad it differently). Softmax and sums are fp32.

    Args:
        hidden, teacher_hidden: (B, T, D) each with its own D; no teacher: cross-entropy only.
        labels: (B, T), already shifted; positions with -100 count nowhere.
        kl, ce: weights of the two terms.

    Returns:
        The weighted sum over the positions with a label, and detached sums "kl", "ce", "agreement" (top-1 of student
        and teacher coincide) over the same positions.
    """
    chosen = labels != IGNORE
    hidden, labels = hidden[chosen], labels[chosen]
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden[chosen].detach()
    several = hidden.shape[0] > chunk_tokens
    loss: Tensor | float = 0.0
    sums: dict[str, Tensor] = {}
    # once even without a single position: the loss still needs a graph and all names, or ranks would fall out of step
    for start in range(0, max(hidden.shape[0], 1), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        args = (
            hidden[part],
            head,
            labels[part],
            None if teacher_hidden is None else teacher_hidden[part],
            teacher_head,
        )
        args += (kl, ce, temperature)
        # one chunk's logits are kept for the backward as they are; of several, each is recomputed there
        part_loss, parts = checkpoint(_chunk, *args, use_reentrant=False) if several else _chunk(*args)
        loss = loss + part_loss
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return loss, sums


def _chunk(hidden, head, labels, teacher_hidden, teacher_head, kl, ce, temperature):
    logits = head(hidden).float()
    if teacher_hidden is None:
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return ce * loss, {"ce": loss}
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_hidden).float()
        shared = min(logits.shape[-1], teacher_logits.shape[-1])
        teacher_logits = teacher_logits[:, :shared]
        target = F.log_softmax(teacher_logits / temperature, -1)
    logits = logits[:, :shared]
    log_probs = F.log_softmax(logits / temperature, -1)
    divergence = temperature**2 * F.kl_div(log_probs, target, reduction="sum", log_target=True)
    plain = log_probs if temperature == 1 else F.log_softmax(logits, -1)
    entropy = F.nll_loss(plain, labels, reduction="sum")
    agreement = (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
    return kl * divergence + ce * entropy, {"kl": divergence, "ce": entropy, "agreement": agreement}
