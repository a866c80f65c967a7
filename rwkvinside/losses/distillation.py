"""The distillation loss, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..data.batch import IGNORE
from ..hybrid.lm_head import AnyHead, LinearHead, open_head, wide
from .divergence import Target, divergence

CHUNK_ELEMENTS = 3 * 2**24  # logits of a chunk, 192 MiB in fp32: 331 tokens of a vocabulary of 152k


BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}  # that are compared at a time, in buffers that the allocator keeps


METRIC = {"forward": "kl", "reverse": "reverse_kl", "js": "js"}


@dataclass(frozen=True)
class Objective:
    """What is asked of the logits.

    Args:
        divergence: "forward" is KL(teacher || student), "reverse" KL(student || teacher), "js" Jensen-Shannon. At
            `temperature`, times its square (Hinton et al. 2015, arXiv 1503.02531).
        top_k: compare the teacher's k likeliest tokens and, as one event, the mass of the rest; None: all tokens.
        kl, ce: weights of the divergence and of the cross-entropy on the labels.
        chunk_tokens: positions at a time; None: `chunk_tokens` of the vocabulary.
    """

    divergence: str = "forward"
    top_k: int | None = None
    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0
    chunk_tokens: int | None = None


class Chunk(Protocol):
    """A teacher's distributions at some positions of a chunk, over at most the first `vocab` ids."""

    def __call__(self, rows: slice, vocab: int, temperature: float) -> Target: ...


class Targets(Protocol):
    """A teacher's side of one batch: the positions with a label, in row-major order."""

    def open(self) -> AbstractContextManager[Callable[[slice], Chunk]]:
        """A context that gives what makes chunks from slices of the positions."""
        ...


def chunk_tokens(vocab: int) -> int:
    """Positions of a chunk, unless a number is given."""
    return max(1, CHUNK_ELEMENTS // vocab)


def head_losses(
    hidden: Tensor, head: nn.Module, labels: Tensor, targets: Targets | None, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence from a teacher and cross-entropy, from final hidden states.

    Each chunk of positions goes through head, loss and back at once: its logits are gone before the next one's are
    made, nothing is recomputed, and the backward only hands out what was found. Ids are those that both vocabularies
    share (the larger one is cut: families pad it differently). Softmax and sums are fp32, of fp64 logits fp64.

    Args:
        hidden: (B, T, D).
        head: (tokens, D) -> (tokens, V), with `out_features` = V.
        labels: (B, T), already shifted; positions with -100 count nowhere.
        targets: the teacher's distributions at the positions with a label; None: cross-entropy only.

    Returns:
        The weighted sum over the positions with a label, and detached sums over the same positions: "ce", with a
        teacher also "kl" ("reverse_kl", "js") and "agreement" (top-1 of student and teacher coincide).
    """
    chosen = labels != IGNORE
    loop = _Loop(open_head(head), head.out_features, labels[chosen], targets, objective)
    if torch.is_grad_enabled():
        loss, values = _Prepared.apply(hidden[chosen], loop, *loop.head.parameters)
    else:
        loss, values, _ = loop.run(hidden[chosen], inputs=False, parameters=False)
    names = ["ce"] if targets is None else ["ce", METRIC[objective.divergence], "agreement"]
    return loss, dict(zip(names, values.unbind(), strict=True))


class _Prepared(torch.autograd.Function):
    """The loss with its gradients, found in the forward; the backward scales them in place."""

    @staticmethod
    def forward(ctx, hidden: Tensor, loop: _Loop, *parameters: nn.Parameter) -> tuple[Tensor, Tensor]:
        inputs, _, *of_head = ctx.needs_input_grad
        loss, values, grad = loop.run(hidden, inputs, any(of_head))
        ctx.grads = [grad, None, *(g.to(p.dtype) for g, p in zip(loop.head.gradients, parameters, strict=True))]
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, _) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss have been handed out already")
        grads, ctx.grads = ctx.grads, None
        return tuple(grad if grad is None else grad.mul_(scale) for grad in grads)


class _Loop:
    """One pass over the chunks of a batch."""

    def __init__(
        self,
        head: LinearHead | AnyHead,
        vocab: int,
        labels: Tensor,
        targets: Targets | None,
        objective: Objective,
    ):
        self.head, self.vocab, self.labels = head, vocab, labels
        self.targets, self.objective = targets, objective

    def run(self, hidden: Tensor, inputs: bool, parameters: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss sum (0-d), metric sums (1-d), and the gradient by `hidden` where `inputs` asks for it."""
        wanted, grads, sums = inputs or parameters, [], 0.0
        size = self.objective.chunk_tokens or chunk_tokens(self.vocab)
        with nullcontext() if self.targets is None else self.targets.open() as chunk_of:
            # once even without a single position: names and gradients are the same for every batch
            for start in range(0, max(len(hidden), 1), size):
                part = slice(start, start + size)
                logits = self.head.forward(hidden[part])
                sums = sums + self._chunk(logits, self.labels[part], chunk_of and chunk_of(part), wanted)
                if wanted:
                    grads.append(self.head.backward(logits, inputs))
        sums = sums.to(wide(hidden.dtype))
        return sums[0], sums[1:], torch.cat(grads).to(hidden.dtype) if inputs else None

    def _chunk(self, logits: Tensor, labels: Tensor, chunk: Chunk | None, wanted: bool) -> Tensor:
        """Sums (loss, then metrics; 1-d, fp64); the logits become their own gradient where it is wanted."""
        size = max(1, BLOCK_ELEMENTS[logits.device.type] // self.vocab)
        sums = 0.0
        for start in range(0, max(len(logits), 1), size):
            rows = slice(start, start + size)
            found, grad = self._block(logits[rows].to(wide(logits.dtype)), labels[rows], rows, chunk, wanted)
            sums = sums + torch.stack(found).double()
            if wanted:
                logits[rows, : grad.shape[1]] = grad
                logits[rows, grad.shape[1] :] = 0
        return sums

    def _block(
        self, logits: Tensor, labels: Tensor, rows: slice, chunk: Chunk | None, wanted: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Sums of some rows of a chunk, and the gradient by their logits over the ids that count."""
        o = self.objective
        if chunk is None:
            log_q = F.log_softmax(logits, -1)
            entropy = F.nll_loss(log_q, labels, reduction="sum")
            return [o.ce * entropy, entropy], _entropy_grad(log_q.exp_(), labels, o.ce) if wanted else None
        target = chunk(rows, self.vocab, o.temperature)
        logits = logits[:, : target.vocab]
        agreement = (logits.argmax(-1) == target.best).sum()
        plain = F.log_softmax(logits, -1)
        log_q = plain if o.temperature == 1 else F.log_softmax(logits / o.temperature, -1)
        entropy = F.nll_loss(plain, labels, reduction="sum")
        towards_labels = _entropy_grad(plain.exp(), labels, o.ce) if wanted and o.ce else None
        value, grad = divergence(o.divergence, target.top(o.top_k), log_q, wanted)
        value = value * o.temperature**2
        if wanted:
            grad.mul_(o.kl * o.temperature)  # of the square, one went into the logits
            if towards_labels is not None:
                grad.add_(towards_labels)
        return [o.kl * value + o.ce * entropy, entropy, value, agreement], grad


def _entropy_grad(q: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Of `weight` times the summed cross-entropy, by the logits; overwrites their softmax `q`."""
    here = labels[:, None]
    return q.scatter_(-1, here, q.gather(-1, here) - 1).mul_(weight)
