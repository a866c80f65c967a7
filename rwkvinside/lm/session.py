"""A language model that is processed by its state: chunk after chunk, in the memory of one chunk.

Works on transformers' own cache, so the model is any hybrid of this toolkit, trained from scratch or converted, built
here or loaded with the code of its export; a model of attention alone works too, and its state grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import UserError
from .cache_parts import fork, map_cache, rows_of

IGNORE = -100  # a label that is not predicted, as everywhere in transformers
CHUNK_SIZE = 1024


@dataclass(frozen=True)
class ChunkedOutput:
    """What a sequence that was processed in chunks leaves.

    Attributes:
        loss: mean cross-entropy of the predicted tokens in nats, 0-d, fp32 (fp64 of a model in fp64); None without
            labels.
        tokens: how many were predicted.
        logits: (B, V) after the last token.
        state: after the last token, without gradient.
    """

    loss: Tensor | None
    tokens: int
    logits: Tensor
    state: Cache


class StatefulModel(nn.Module):
    """A causal language model with the state of what it has read.

        model.reset_state(batch_size=1)
        for chunk in chunks:
            outputs, new_state = model.process_with_state(chunk, model.state)
            model.state = new_state

    Args:
        model: causal language model of transformers with a cache that grows on demand (no static one).
        chunk_size: see `set_chunk_size`; None: what the model was trained with, `rwkv_chunk_size` of its configuration.

    Attributes:
        model: the same.
        state: a `transformers.Cache`, which `generate(past_key_values=...)` takes as well; the model itself never
            changes it. `reset_state` empties it.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.state: Cache = self.new_state()
        self._rows: int | None = None  # that `reset_state` asked for
        self.set_chunk_size(chunk_size or getattr(model.config, "rwkv_chunk_size", None) or CHUNK_SIZE)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        return self.model.device

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """Call the model itself, without any state."""
        return self.model(*args, **kwargs)

    def new_state(self) -> Cache:
        """Return the state before the first token."""
        return DynamicCache(config=self.model.config)

    def reset_state(self, batch_size: int = 1) -> None:
        """Forget what was read; the next chunk has `batch_size` rows."""
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}", "give the number of rows, at least 1")
        self.state, self._rows = self.new_state(), batch_size

    def set_chunk_size(self, chunk_size: int, detach_every: int | None = 1) -> None:
        """Set how `forward_chunked` cuts.

        Args:
            chunk_size: tokens of a chunk.
            detach_every: chunks after which a gradient ends (truncated backpropagation through time); None: it reaches
                back to the first token.

        Raises:
            UserError: a number below 1.
        """
        for name, value in (("chunk_size", chunk_size), ("detach_every", detach_every)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}", "give a whole number of at least 1")
        self.chunk_size, self.detach_every = chunk_size, detach_every

    def process_with_state(
        self, chunk: Tensor, state: Cache | None = None, **kwargs: Any
    ) -> tuple[CausalLMOutputWithPast, Cache]:
        """Read a chunk after what a state has read.

        Args:
            chunk: (B, T) token ids.
            state: stays as it is; None is the empty one.
            kwargs: for the model, such as logits_to_keep; of padded rows attention_mask (B, tokens so far + T).

        Returns:
            The model's output and the state after the chunk. A gradient passes through both.

        Raises:
            UserError: a chunk without tokens or of other rows than the state, or a model that recomputes activations,
                which has no state in training.
        """
        cache = self.new_state() if state is None else fork(state)
        self._check(chunk, cache, asked=self._rows if state is self.state else None)
        return self._continue(chunk, cache, **kwargs), cache

    def forward_chunked(
        self, input_ids: Tensor, labels: Tensor | None = None, state: Cache | None = None
    ) -> ChunkedOutput:
        """Read rows of any length a chunk at a time; the loss is that of the whole rows.

        With gradient, each `detach_every` chunks go forward and back before the next begin, so that the memory is
        theirs alone; `loss.backward()` then hands the gradients out.

        Args:
            input_ids: (B, T).
            labels: (B, T), mostly the same; `IGNORE` is not predicted. Position t predicts label t + 1, across the
                borders of chunks too.
            state: of tokens before; it gets no gradient.

        Raises:
            UserError: as of `process_with_state`; labels of another shape, or none to predict.
        """
        cache = self.new_state() if state is None else fork(state)
        self._check(input_ids, cache, asked=None)
        if labels is None:
            with torch.no_grad():
                for chunk in input_ids.split(self.chunk_size, 1):
                    logits = logits_of(self._continue(chunk, cache, logits_to_keep=1))
            return ChunkedOutput(None, 0, logits[:, -1], cache)
        targets = _targets(input_ids, labels)
        passed = _Pass(self, input_ids, targets, cache)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and parameters:
            loss = _TruncatedBackpropagation.apply(passed, *parameters)
        else:
            loss = sum(passed.segments(), start=torch.zeros((), device=self.device))
        return ChunkedOutput(loss, passed.count, passed.logits, passed.state)

    def _continue(self, chunk: Tensor, cache: Cache, **kwargs: Any) -> CausalLMOutputWithPast:
        """Read a chunk after what `cache` has read, which is brought up to date."""
        return self.model(input_ids=chunk, past_key_values=cache, use_cache=True, **kwargs)

    def _check(self, tokens: Tensor, cache: Cache, asked: int | None) -> None:
        if tokens.ndim != 2 or not tokens.numel():
            raise UserError(f"the tokens have the shape {tuple(tokens.shape)}", "give ids (rows, tokens), at least one")
        if self.model.is_activation_checkpointing and self.model.training:
            raise UserError(
                "the model recomputes its activations (gradient checkpointing), and keeps no state in training then",
                "switch it off with gradient_checkpointing_disable(); a smaller chunk saves memory instead",
            )
        rows = rows_of(cache) or asked
        if rows not in (None, len(tokens)):
            raise UserError(
                f"there are {len(tokens)} rows of tokens and {rows} of state", f"reset_state(batch_size={len(tokens)})"
            )


class _Pass:
    """One pass over the chunks of rows.

    Attributes:
        count: labels of the whole, which each sum is divided by.
        logits, state: after what was read so far.
    """

    def __init__(self, owner: StatefulModel, input_ids: Tensor, targets: Tensor, state: Cache):
        self.state = state
        self.count = int((targets != IGNORE).sum())
        self.logits: Tensor
        self._owner = owner
        size = owner.chunk_size
        self._chunks = list(zip(input_ids.split(size, 1), targets.split(size, 1), strict=True))

    def segments(self) -> Iterator[Tensor]:
        """Yield the loss of each `detach_every` chunks (0-d), all of which add up to the mean."""
        step = self._owner.detach_every or len(self._chunks)
        for start in range(0, len(self._chunks), step):
            yield sum(
                (self._loss(*chunk) for chunk in self._chunks[start : start + step]),
                start=torch.zeros((), device=self._owner.device),
            )
            self.state = map_cache(self.state, lambda _, x: x.detach())

    def _loss(self, chunk: Tensor, targets: Tensor) -> Tensor:
        logits = logits_of(self._owner._continue(chunk, self.state))
        self.logits = logits[:, -1].detach().clone()  # not a view, which would keep those of all tokens
        logits = logits if logits.dtype == torch.float64 else logits.float()
        targets = targets.to(logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE)
        return loss / self.count


class _TruncatedBackpropagation(torch.autograd.Function):
    """A loss whose gradients the forward computes, segment by segment; the backward scales them."""

    @staticmethod
    def forward(ctx: Any, passed: _Pass, *parameters: nn.Parameter) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        gradients: list[Tensor | None] = [None] * len(parameters)
        with torch.enable_grad():
            for loss in passed.segments():
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                gradients = [_plus(old, new) for old, new in zip(gradients, found, strict=True)]
                total += loss.detach().cpu()
        ctx.gradients = gradients
        return total.to(loss.device, loss.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss have been handed out already")
        gradients, ctx.gradients = ctx.gradients, None
        return (None, *(x if x is None else x.mul_(scale.to(x)) for x in gradients))


def logits_of(outputs: CausalLMOutputWithPast) -> Tensor:
    """Return the logits of an output, which a causal language model always has."""
    assert outputs.logits is not None
    return outputs.logits


def _plus(sum_so_far: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if gradient is None or sum_so_far is None:
        return sum_so_far if gradient is None else gradient.clone()  # it may be shared, and is added to
    return sum_so_far.add_(gradient)


def _targets(input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return what each position predicts, (B, T)."""
    if labels.shape != input_ids.shape:
        raise UserError(
            f"labels have the shape {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}",
            "give a label for every token, -100 where there is none",
        )
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if not (targets != IGNORE).any():
        raise UserError("no label is to be predicted", "give labels beyond the first token that are not -100")
    return targets
