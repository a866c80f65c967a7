"""Long contexts in one run: prompts, tokens and memory of attention alone, of hybrids and of RWKV alone.

All have the same number of parameters: what mixers have more than attention, their MLPs have less. The weights are
random, on which neither time nor memory depends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config

from ..lm.cost import measured, timed
from ..lm.session import StatefulModel
from ..lm.state_report import layer_bytes
from .generation import random_models
from .shapes import qwen3_shape

WARM_TOKENS = 2  # generated before those that are measured


@dataclass(frozen=True)
class ContextCost:
    """Of one model after one prompt.

    Attributes:
        model: its name.
        parameters: it has.
        context: tokens of the prompt, which is read in chunks.
        prefill_seconds, prefill_peak_bytes: of reading it; the memory is that beyond the weights, None where the
            system cannot measure it.
        token_ms: median of one further token.
        state_bytes: after the prompt.
    """

    model: str
    parameters: int
    context: int
    prefill_seconds: float
    prefill_peak_bytes: int | None
    token_ms: float
    state_bytes: int


@torch.no_grad()
def context_cost(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    *,
    chunk_size: int = 1024,
    new_tokens: int = 16,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> Iterator[ContextCost]:
    """Measure models after random prompts, shortest first; a measurement is given as soon as it is done.

    Args:
        models: name -> causal language model in eval mode.
        contexts: tokens of the prompts.
        chunk_size: tokens of them that are read at a time.
        new_tokens: tokens over which the median is taken.
        clock: that counts seconds; `time.process_time` leaves out what a machine does beside.
        seed: of the prompts.
    """
    stateful = {name: StatefulModel(model, chunk_size) for name, model in models.items()}
    for model in stateful.values():
        model.forward_chunked(_prompt(model, 2 * chunk_size, seed))  # loads and compiles what is used
    for context in sorted(contexts):
        for name, model in stateful.items():
            yield _measure(name, model, _prompt(model, context, seed), new_tokens, clock)


def _prompt(model: StatefulModel, context: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (1, context), generator=draw).to(model.device)


def _measure(name: str, model: StatefulModel, ids: Tensor, new_tokens: int, clock: Callable[[], float]) -> ContextCost:
    outputs, prefill = measured(lambda: model.forward_chunked(ids), model.device, clock)
    state, token, seconds = outputs.state, outputs.logits.argmax(-1, keepdim=True), []
    state_bytes = sum(layer.total for layer in layer_bytes(state))
    for _ in range(WARM_TOKENS + new_tokens):
        read = partial(model.model, token, past_key_values=state, use_cache=True)
        step, duration = timed(read, model.device, clock)
        token = step.logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(duration)
    return ContextCost(
        model=name,
        parameters=model.model.num_parameters(),
        context=ids.shape[1],
        prefill_seconds=prefill.seconds,
        prefill_peak_bytes=prefill.peak_bytes,
        token_ms=1000 * median(seconds[WARM_TOKENS:]),
        state_bytes=state_bytes,
    )


def equal_models(
    layers: int, heads: int, head_size: int, *, window: int, vocab: int = 4096, dtype: torch.dtype, device: str
) -> dict[str, PreTrainedModel]:
    """Return random models of one size: attention alone, hybrids whose even layers are RWKV, and RWKV alone.

    Args:
        layers, heads, head_size: of all; half as many heads for keys and values, the width is heads * head_size.
        window: tokens that the attention of the second hybrid is cut to.
        vocab: rows of the embedding, which is tied.
        dtype: of the weights; decay, rate and shares keep fp32 as in exports.
        device: where they are.

    Returns:
        name -> model in eval mode. Their numbers of parameters differ by less than one column of all MLPs.
    """
    config = qwen3_shape(layers, heads, head_size, feed_forward=4, vocab=vocab, tied=True)
    build = partial(random_models, preset="cxa079", dtype=dtype)
    column = 3 * config.hidden_size * layers  # of gate, up and down projections
    models = {"attention": build(config, {}, device=device)["teacher"]}
    for name, kept, more in (
        ("hybrid", range(1, layers, 2), {}),
        ("hybrid, window", range(1, layers, 2), {"attention_window": window}),
        ("RWKV", (), {}),
    ):
        fields = config.to_dict() | more
        shape = build(Qwen3Config(**fields), {name: kept}, device="meta")[name]
        narrower = round((shape.num_parameters() - models["attention"].num_parameters()) / column)
        fields |= {"intermediate_size": config.intermediate_size - narrower}
        models[name] = build(Qwen3Config(**fields), {name: kept}, device=device)[name]
    return models
