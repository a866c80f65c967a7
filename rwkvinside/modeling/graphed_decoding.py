"""Generation in memory that never moves, so that a whole token is one CUDA graph.

    model.generate(**inputs, custom_generate=generate_graphed, max_new_tokens=200)

A small model spends most of a token on launching kernels from Python; a graph launches all of them at once. The prompt
is read as always. Then recurrent states stay where they are and keys and values move into buffers of a given capacity,
and nothing waits for the GPU but a look at the stop tokens every few tokens. On other devices the same loop runs step
by step. Works for hybrids and for plain decoders of transformers; travels with exported models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .first_layer import ForwardContext
from .recurrent_cache import is_recurrent

CHECK_EVERY = 16  # tokens between two looks at whether all rows have ended: each makes the host wait for the GPU
WARM_STEPS = 2  # before the capture, so that every kernel is compiled and loaded
ALIGNMENT = 64  # of capacities: attention kernels copy masks of odd lengths
# What depends on the logits alone: a graph does not see the tokens so far, whose number changes
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@dataclass(frozen=True)
class TokenChoice:
    """How the next token is chosen.

    Attributes:
        warpers: change the logits (B, V) before the choice.
        sample: draw from the softmax, else take the largest.
        end: ids that end a row (K,), and the 0-d id that fills it up from there; None: no token ends a row.
    """

    warpers: LogitsProcessorList
    sample: bool = False
    end: tuple[Tensor, Tensor] | None = None

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return the next tokens (B,) for logits (B, V), as `generate()` chooses them."""
        scores = self.warpers(ids, logits.float())  # type: ignore[arg-type]  # a LongTensor, which is no type
        return torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.sample else scores.argmax(-1)


class GraphedDecoding:
    """A batch that has read its prompts and generates one token per `advance`.

    Args:
        model: causal language model in eval mode.
        cache: what the prompts left; it is used up.
        logits: (B, V) of the last position of the prompts.
        mask: (B, L) bool over the prompts, True = real.
        positions: (B, 1), of the last token of each prompt.
        choice: how tokens are chosen.
        new_tokens: the largest number of tokens that will be generated.
        capture: on a GPU, replay a graph after the first steps.

    Attributes:
        tokens: (B, new_tokens), chosen so far; the rest is 0.
        finished: (B,) bool, rows that have ended.
        cache: recurrent states, and keys and values with room for all tokens.

    Raises:
        ValueError: a layer or an attention implementation that cannot work in fixed memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        logits: Tensor,
        *,
        mask: Tensor,
        positions: Tensor,
        choice: TokenChoice,
        new_tokens: int,
        capture: bool = True,
    ) -> None:
        (batch, length), device = mask.shape, logits.device
        self.model, self.choice = model, choice
        capacity = -(-(length + new_tokens) // ALIGNMENT) * ALIGNMENT
        self.cache = fixed_cache(cache, capacity)
        self._is_hybrid = hasattr(model.config, "rwkv_layers")
        self._additive = mask_is_added(model, self.cache)
        rings = [layer for layer in self.cache.layers if isinstance(layer, RingLayer)]
        self._by_type = getattr(model.config, "layer_types", None) is not None  # masks; else one for all layers
        self._slots = torch.arange(rings[0].max_cache_len, device=device) if rings else None
        self._real = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self._real[:, :length] = mask
        self._length = torch.full((1,), length, device=device)
        self._positions = positions.repeat(batch // positions.shape[0], 1)
        self._ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._count = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(batch, new_tokens, dtype=torch.long, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._capture = capture and can_capture(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        self._accept(logits)

    def advance(self) -> None:
        """Generate the next token of every row; at most `new_tokens` - 1 times, the first one exists already."""
        if self._capture and self._steps == WARM_STEPS:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and runs nothing
                self._step()
        self._steps += 1
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        """Feed the newest token and choose the next one. Reads and writes the same memory at every call."""
        self._positions.add_(1)
        self._real.index_fill_(1, self._length, True)
        mask: Any = self._mask(self._real)
        if self._slots is not None:
            held = self._length - (self._length - self._slots) % len(self._slots)  # position in each slot of a ring
            sliding = self._mask(self._real[:, held.clamp(min=0)] & (held >= 0))
            mask = {"full_attention": mask, "sliding_attention": sliding} if self._by_type else sliding
        self._length.add_(1)
        context = {"forward_context": ForwardContext()} if self._is_hybrid else {}  # no padding after the prompts
        out = self.model(
            input_ids=self._ids,
            attention_mask=mask,
            position_ids=self._positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **context,
        )
        self._accept(out.logits[:, -1])

    def _mask(self, real: Tensor) -> Tensor:
        """Return what attention takes, (B, 1, 1, keys), for keys that are real (B, keys)."""
        mask, dtype = real[:, None, None], self.model.dtype
        if not self._additive:
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    def _accept(self, logits: Tensor) -> None:
        """Choose tokens, and note them and which rows end with them."""
        tokens = self.choice(self._ids, logits)
        if self.choice.end is not None:
            stop, pad = self.choice.end
            tokens = torch.where(self.finished, pad, tokens)
            self.finished.logical_or_((tokens[:, None] == stop).any(1))
        self.tokens.index_copy_(1, self._count, tokens[:, None])
        self._count.add_(1)
        self._ids.copy_(tokens[:, None])


class RingLayer(StaticLayer):
    """Keys and values of the last `max_cache_len` tokens, position p in slot p modulo that number."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the newest tokens, at most `max_cache_len`, in place of the oldest; return all, in the order of slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        slots = (torch.arange(tokens, device=self.device) + self.cumulative_length) % self.max_cache_len
        self.cumulative_length.add_(tokens)
        assert self.keys is not None and self.values is not None
        return self.keys.index_copy_(2, slots, key_states), self.values.index_copy_(2, slots, value_states)


def can_capture(device: torch.device) -> bool:
    """Return whether a device has graphs."""
    return device.type == "cuda"


def fixed_cache(cache: Cache, capacity: int) -> Cache:
    """Move a cache into memory that does not move.

    Args:
        cache: of one or more tokens; its keys and values are released.
        capacity: tokens that each attention layer has room for.

    Raises:
        ValueError: a layer with other keys and values than attention has, with or without a sliding window.
    """
    layers: list[Any] = []
    for i, layer in enumerate(cache.layers):
        if is_recurrent(layer):
            layers.append(layer)
        elif type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            fixed = StaticLayer(max_cache_len=capacity)
            fixed.update(layer.keys, layer.values)
            layer.reset()
            layers.append(fixed)
        elif type(layer) is DynamicSlidingWindowLayer and layer.keys is not None and layer.values is not None:
            ring = RingLayer(max_cache_len=min(layer.sliding_window, capacity))
            ring.cumulative_length += layer.get_seq_length() - layer.keys.shape[2]  # tokens before those it still has
            ring.update(layer.keys, layer.values)
            layer.reset()
            layers.append(ring)
        else:
            kind = type(layer).__name__
            raise ValueError(f"layer {i} keeps its keys and values in {kind}, which cannot move into fixed memory")
    return Cache(layers=layers)


def mask_is_added(model: PreTrainedModel, cache: Cache) -> bool:
    """Return whether attention adds its mask instead of selecting by it.

    Raises:
        ValueError: an implementation that takes other masks.
    """
    implementation = model.config._attn_implementation
    if any(isinstance(layer, StaticLayer) for layer in cache.layers) and implementation not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation is {implementation!r}, generation in fixed memory takes sdpa or eager")
    return implementation == "eager"


@torch.no_grad()
def generate_graphed(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor:
    """Generate as `generate()` does, which calls this with what it has prepared (`custom_generate=generate_graphed`).

    Greedy, or sampling with temperature, top_k, top_p and min_p, with stop tokens.

    Returns:
        (B, prompt + new) ids, rows that end early filled with the pad token.

    Raises:
        ValueError: a setting that needs the tokens so far at every step, another mode than greedy and sampling, or a
            cache that is passed in or asked for.
    """
    choice = _choice(logits_processor, stopping_criteria, generation_config, model.device)
    if getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False):
        raise ValueError("past_key_values cannot be given: graphed generation uses its cache up")
    input_ids = input_ids.to(model.device)
    out = model._prefill(input_ids, generation_config, model_kwargs)  # type: ignore[operator]  # of GenerationMixin
    mask = model_kwargs.get("attention_mask")
    decoding = GraphedDecoding(
        model,
        out.past_key_values,
        out.logits[:, -1],
        mask=torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool(),
        positions=model_kwargs["position_ids"][:, -1:],
        choice=choice,
        new_tokens=generation_config.max_length - input_ids.shape[1],
    )
    del out, model_kwargs
    steps = decoding.tokens.shape[1]
    for step in range(1, steps):
        if choice.end is not None and step % CHECK_EVERY == 0 and decoding.finished.all():
            break
        decoding.advance()
    return torch.cat([input_ids, _up_to_the_last_end(decoding.tokens, choice)], 1)


def _choice(
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    device: torch.device,
) -> TokenChoice:
    refused = [type(p).__name__ for p in processors if not isinstance(p, WARPERS)]
    refused += [type(c).__name__ for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
    c = generation_config
    refused += [name for name in ("output_scores", "output_logits", "return_dict_in_generate") if getattr(c, name)]
    if not c.use_cache:
        refused.append("use_cache=False")
    if c.num_beams not in (None, 1):
        refused.append(f"num_beams={c.num_beams}")
    if refused:
        raise ValueError(f"graphed generation cannot have {', '.join(refused)}: use generate() without custom_generate")
    stop, pad = c._eos_token_tensor, c._pad_token_tensor  # with the former `generate()` always has the latter
    end = None if stop is None or pad is None else (stop.to(device), pad.to(device))
    return TokenChoice(processors, bool(c.do_sample), end)


def _up_to_the_last_end(tokens: Tensor, choice: TokenChoice) -> Tensor:
    """Cut off the columns after the one in which the last row ends."""
    if choice.end is None:
        return tokens
    ended = (tokens[..., None] == choice.end[0]).any(-1).cumsum(1).bool().all(0)
    return tokens[:, : int((~ended).sum()) + 1]
