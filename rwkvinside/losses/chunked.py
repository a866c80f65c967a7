"""Losses from final hidden states, a chunk of positions at a time.

No batch ever has all its logits in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..data.batch import Targets
from ..hybrid.lm_head import Head, OpenHead, open_head, wide
from .divergence import TeacherDistribution
from .fused import Backend, Comparison, fused_form

# Logits of a chunk: 192 MiB in fp32, 331 tokens of a vocabulary of 152k. On a GPU four times as many, 384 MiB in bf16:
# every chunk adds to the gradient of the whole head, which took 32 of 421 ms of a step of 16384 tokens on an H200.
CHUNK_ELEMENTS = {"cpu": 3 * 2**24, "cuda": 3 * 2**26}
BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}  # that are compared at a time, in buffers that the allocator keeps


class TeacherChunk(Protocol):
    """What a teacher says at the positions of one chunk.

    Attributes:
        logits: (n, V) of all its positions, not to be overwritten; None: nobody has them all.
    """

    logits: Tensor | None

    def distribution(self, positions: slice, vocab: int, temperature: float) -> TeacherDistribution:
        """Return the distributions at some positions of the chunk.

        They are over at most the first `vocab` ids.
        """
        ...


class TeacherSignal(Protocol):
    """What a teacher says of one batch, at its labels in row-major order."""

    def chunks(self, size: int) -> Generator[TeacherChunk, None, None]:
        """Yield the chunks of `chunk_slices`, each made when it is asked for.

        It may keep sharded weights gathered meanwhile: run it to its end or close it.
        """
        ...


def chunk_tokens(vocab: int, device: str = "cpu") -> int:
    """Return how many positions of a vocabulary of this size make a chunk."""
    return max(1, CHUNK_ELEMENTS[device] // vocab)


def chunk_slices(count: int, size: int) -> Iterator[slice]:
    """Yield slices of `size` positions.

    No positions give one empty slice, so that metrics and gradients are the same for every batch.
    """
    for start in range(0, max(count, 1), size):
        yield slice(start, start + size)


def open_chunks(signal: TeacherSignal | None, size: int) -> AbstractContextManager[Iterator[TeacherChunk | None]]:
    """Return a context that gives a signal's chunks; without a signal, Nones.

    Take each by `next` as an argument of what uses it: then its logits are freed before the next chunk's are made.
    """
    return nullcontext(repeat(None)) if signal is None else closing(signal.chunks(size))


class ChunkedLoss(ABC):
    """A loss summed over the positions with a label: a task of `LMHeadLoss`.

    Each chunk of positions goes through head, loss and back at once: its logits are freed before the next one's are
    made, nothing is recomputed, and the backward only hands out the gradients. Softmax and sums are fp32, of fp64
    logits fp64.

    Attributes:
        signal: the teacher's distributions at the positions with a label; None: there is no teacher.
        backend: what compares logits: "torch", blocks of them by `block`, the reference; "triton", a whole chunk in one
            launch; "auto": the latter on a GPU where `comparison` has a form for it.
    """

    signal: TeacherSignal | None
    backend: Backend

    @property
    @abstractmethod
    def chunk_tokens(self) -> int | None:
        """Positions at a time; None: `chunk_tokens` of the vocabulary."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of the sums that `block` gives after the loss."""

    @abstractmethod
    def comparison(self, chunk: TeacherChunk | None) -> Comparison | None:
        """Return how the kernel computes this loss of a chunk; None: it does not."""

    @abstractmethod
    def block(
        self, logits: Tensor, labels: Tensor, chunk: TeacherChunk | None, positions: slice, need_grad: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the sums over some positions of a chunk and the logits' gradient.

        Args:
            logits: (n, V) fp32 or fp64; not to be overwritten.
            labels: (n,) int64.
            chunk: the teacher's side of the whole chunk, where there is a signal.
            positions: which positions of the chunk these are.
            need_grad: False: there is no gradient.

        Returns:
            The loss and then the metrics, 0-d; the gradient (n, at most V) of the first ids, that of the others is 0.
        """

    def run(self, head: Head, hidden: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum (0-d) and detached metric sums over the same positions.

        Arguments as of `HeadTask.run`.
        """
        hidden, opened = targets.take(hidden), open_head(head)
        if targets.real is not None:  # zeros have no part in the gradient of a weight, and get none
            hidden = hidden.masked_fill(~targets.real[:, None], 0)
        if torch.is_grad_enabled():
            loss, sums = _Prepared.apply(hidden, targets, self, opened, *opened.parameters)
        else:
            loss, sums, _ = self.over_chunks(hidden, targets, opened, inputs=False, parameters=False)
        return loss, dict(zip(self.metrics, sums.unbind(), strict=True))

    def over_chunks(
        self, hidden: Tensor, targets: Targets, head: OpenHead, inputs: bool, parameters: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return sums and gradient of one pass over the positions.

        Gradients of the head's parameters add up in `head`.

        Args:
            hidden: (N, D) at the positions with a label, zeros where these are not real.
            targets: of the batch.
            head: from `open_head`.
            inputs, parameters: whether gradients of `hidden` and of the head's parameters are needed.

        Returns:
            Loss sum (0-d), metric sums (1-d), and the gradient of `hidden` where `inputs` asks for it.
        """
        need_grad, sums = inputs or parameters, self._zeros(hidden.device)
        grads: list[Tensor] = []
        size = self.chunk_tokens or chunk_tokens(head.out_features, hidden.device.type)
        with open_chunks(self.signal, size) as chunks:
            for positions in chunk_slices(len(hidden), size):
                logits = head.forward(hidden[positions])
                sums += self._chunk(logits, targets.part(positions), next(chunks), need_grad)
                grad = head.backward(logits, inputs) if need_grad else None
                if grad is not None:
                    grads.append(grad)
                del logits
        sums = sums.to(wide(hidden.dtype))
        return sums[0], sums[1:], torch.cat(grads).to(hidden.dtype) if inputs else None

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(1 + len(self.metrics), dtype=torch.float64, device=device)

    def _chunk(self, logits: Tensor, targets: Targets, chunk: TeacherChunk | None, need_grad: bool) -> Tensor:
        """Return the sums of a chunk (1-d, fp64).

        Its logits become their own gradient where it is needed.
        """
        comparison, labels = fused_form(self.backend, self.comparison(chunk), logits), targets.labels
        if comparison is not None:
            rows = comparison.rows(logits, labels, need_grad)
            rows = rows if targets.real is None else rows.masked_fill(~targets.real[:, None], 0)
            return rows.sum(0, dtype=torch.float64)
        if targets.real is not None:
            raise RuntimeError("PyTorch code compares logits at positions that all count: give it no fixed number")
        size = max(1, BLOCK_ELEMENTS[logits.device.type] // logits.shape[1])
        sums = self._zeros(logits.device)
        for block in chunk_slices(len(logits), size):
            values, grad = self.block(logits[block].to(wide(logits.dtype)), labels[block], chunk, block, need_grad)
            sums += torch.stack(values).double()
            if grad is not None:
                logits[block, : grad.shape[1]] = grad
                logits[block, grad.shape[1] :] = 0
        return sums


class _Prepared(torch.autograd.Function):
    """A loss whose gradients the forward computes; the backward scales them in place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Targets,
        loss: ChunkedLoss,
        head: OpenHead,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        inputs, _, _, _, *of_head = ctx.needs_input_grad
        value, sums, grad = loss.over_chunks(hidden, targets, head, inputs, any(of_head))
        of_parameters = [g.to(p.dtype) for g, p in zip(head.gradients, parameters, strict=True)]
        ctx.grads = [grad, None, None, None, *of_parameters]
        ctx.mark_non_differentiable(sums)
        return value, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, of_sums: None) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss have been handed out already")
        grads, ctx.grads = ctx.grads, None
        return tuple(grad if grad is None else grad.mul_(scale) for grad in grads)
