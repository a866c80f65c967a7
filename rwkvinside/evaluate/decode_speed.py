"""Seconds per generated token after contexts of different length: flat for a recurrent model, growing for attention.

Measures any Hugging Face causal language model; says nothing about the quality of what it generates.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError


@dataclass(frozen=True)
class DecodeSpeed:
    """Median time of one generated token of one model after one context.

    Attributes:
        model: its name.
        context: tokens.
    """

    model: str
    context: int
    milliseconds: float
    prefill_seconds: float


def _check_positions(name: str, model: PreTrainedModel, needed: int) -> None:
    # Rotary positions are computed for any length; a learned table ends, and looking past its end is an index error.
    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    is_rotary = getattr(config, "rope_parameters", None) is not None or getattr(config, "rope_theta", None) is not None
    if limit is not None and limit < needed and not is_rotary:
        raise UserError(
            f"the {name} has a table of {limit} positions, but the speed measurement needs {needed}",
            "measure shorter contexts",
        )


class _Decoding:
    """One model that has read one context and generates greedily, one token per call."""

    def __init__(self, name: str, model: PreTrainedModel, context: Tensor):
        self.name = name
        self.model = model
        self.context = context.shape[1]
        self.milliseconds: list[float] = []
        self.cache = None
        self.token = context
        started = time.perf_counter()
        self._forward()
        self.prefill_seconds = time.perf_counter() - started

    def _forward(self) -> None:
        # logits_to_keep: a prefill needs the last position only; all of 4096 x 152k logits would be 2.5 GB.
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self.token = out.logits[:, -1:].argmax(-1)
        if self.token.is_cuda:
            torch.cuda.synchronize(self.token.device)

    def step(self) -> None:
        started = time.perf_counter()
        self._forward()
        self.milliseconds.append(1000 * (time.perf_counter() - started))


@torch.inference_mode()
def decode_speed(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int] = (512, 4096),
    *,
    new_tokens: int = 64,
    warmup_tokens: int = 4,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> list[DecodeSpeed]:
    """Measure the median wall time per greedily generated token, at batch size 1.

    All models and contexts take turns token by token, so a machine that slows down for a second slows all of them and
    the comparison stays fair. Contexts longer than `max_position_embeddings` are measured too: rotary models compute
    such positions like any other, and the time of a token does not depend on its quality.

    Args:
        models: name -> model.
        contexts: numbers of tokens read before the first measured one.
        new_tokens: generated tokens that are measured.
        warmup_tokens: generated before them and not measured.
        seed: of the random contexts.
        progress: called after each of the `new_tokens`.

    Returns:
        One measurement for every model and context.

    Raises:
        UserError: a model with a table of learned positions that is too short.
    """
    running = []
    for name, model in models.items():
        for context in contexts:
            _check_positions(name, model, context + warmup_tokens + new_tokens)
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(0, model.config.vocab_size, (1, context), generator=generator)
            running.append(_Decoding(name, model, ids.to(model.device)))
    for number in range(warmup_tokens + new_tokens):
        for decoding in running:
            decoding.step()
        if progress is not None and number >= warmup_tokens:
            progress()
    return [
        DecodeSpeed(run.name, run.context, median(run.milliseconds[warmup_tokens:]), run.prefill_seconds)
        for run in running
    ]
