"""Generation speed of hybrids and of their teacher: prompt, tokens from Python, tokens as one CUDA graph, memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import Cache

from ..modeling.graphed_decoding import WARM_STEPS, GraphedDecoding, TokenChoice
from ..modeling.hybrid_base import FP32_PARAMETERS
from ..modeling.mixer_presets import TimeMixerConfig
from ..modeling.recurrent_cache import is_recurrent
from ..modeling.registry import hybrid_class
from .shapes import qwen3_shape

GREEDY = TokenChoice(LogitsProcessorList())


@dataclass(frozen=True)
class GenerationSpeed:
    """Of one model after prompts of one length.

    Attributes:
        model: its name.
        batch, context: rows, and tokens of each prompt.
        prefill_seconds: of the whole batch, after one that was not measured.
        eager_ms: per token of every row, launched from Python.
        graphed_ms: the same as a CUDA graph; on a CPU the same loop without one.
        cache_bytes: states, keys and values after the prompt.
        peak_bytes: most memory of the GPU that was in use, weights of all models on it included; None on a CPU.
    """

    model: str
    batch: int
    context: int
    prefill_seconds: float
    eager_ms: float
    graphed_ms: float
    cache_bytes: int
    peak_bytes: int | None


@torch.inference_mode()
def generation_speed(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    batches: Sequence[int] = (1,),
    *,
    new_tokens: int = 64,
    seed: int = 0,
) -> Iterator[GenerationSpeed]:
    """Measure greedy generation after random prompts, one measurement at a time: an error loses only what follows it.

    Args:
        models: name -> causal language model in eval mode, hybrid or not.
        contexts: tokens of a prompt.
        batches: rows that generate at the same time.
        new_tokens: tokens over which a mean is taken, after a few that are not measured.
        seed: of the prompts.
    """
    for batch in batches:
        for context in contexts:
            for name, model in models.items():
                yield _measure(name, model, batch, context, new_tokens, seed)


def _measure(
    name: str, model: PreTrainedModel, batch: int, context: int, new_tokens: int, seed: int
) -> GenerationSpeed:
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _read(model, ids)  # compiles kernels
    prefill_seconds, (cache, logits) = _timed(device, lambda: _read(model, ids))
    cache_bytes = sum(x.numel() * x.element_size() for x in _tensors(cache))
    warm = WARM_STEPS + 1  # the graph is recorded in the step after the warm ones
    eager = _Eager(model, cache, logits)
    eager.run(warm)
    eager_seconds, _ = _timed(device, lambda: eager.run(new_tokens))
    length = context + warm + new_tokens
    decoding = GraphedDecoding(
        model,
        cache,
        eager.logits,
        mask=torch.ones(batch, length, dtype=torch.bool, device=device),
        positions=torch.full((batch, 1), length - 1, device=device),
        choice=GREEDY,
        new_tokens=1 + warm + new_tokens,
    )

    def advance(tokens: int) -> None:
        for _ in range(tokens):
            decoding.advance()

    advance(warm)
    graphed_seconds, _ = _timed(device, lambda: advance(new_tokens))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    milliseconds = (1000 * seconds / new_tokens for seconds in (eager_seconds, graphed_seconds))
    return GenerationSpeed(name, batch, context, prefill_seconds, *milliseconds, cache_bytes, peak)


class _Eager:
    """The usual loop, without looking at any token on the host."""

    def __init__(self, model: PreTrainedModel, cache: Cache, logits: Tensor) -> None:
        self.model, self.cache, self.logits = model, cache, logits

    def run(self, tokens: int) -> None:
        for _ in range(tokens):
            ids = self.logits.argmax(-1, keepdim=True)
            self.logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def _read(model: PreTrainedModel, ids: Tensor) -> tuple[Cache, Tensor]:
    out = model(ids, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits[:, -1]


def _timed(device: torch.device, run: Callable) -> tuple[float, object]:
    """Return the seconds that `run` takes until the device is done, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def _tensors(cache: Cache) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from layer.state.tensors() if is_recurrent(layer) else (layer.keys, layer.values)


def random_models(
    config: Qwen3Config, kept: Mapping[str, Sequence[int]], *, preset: str, dtype: torch.dtype, device: str
) -> dict[str, PreTrainedModel]:
    """Return a Qwen3 teacher and hybrids of its shape, all with random weights.

    Args:
        config: of the teacher.
        kept: name of a hybrid -> layers that keep attention; the others get mixers.
        preset: of the mixers, see `PRESETS`.
        dtype: of the weights; decay, rate and shares keep fp32 as in exports.
        device: where they are made and stay.

    Returns:
        "teacher" and the names of `kept`, in this order.
    """
    mixer = TimeMixerConfig.from_preset(
        preset,
        qk_norm=True,
        norm_eps=config.rms_norm_eps,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
    )
    model_class = hybrid_class("hybrid_qwen3")
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    with torch.device(device):
        models: dict[str, PreTrainedModel] = {"teacher": Qwen3ForCausalLM(config)}
        for name, layers in kept.items():
            rwkv = [i for i in range(config.num_hidden_layers) if i not in layers]
            hybrid_config = model_class.config_class(**fields, rwkv_layers=rwkv, mixer=mixer.to_dict())
            models[name] = model_class(hybrid_config)
    for model in models.values():
        model.eval().to(dtype)
        for parameter_name, parameter in model.named_parameters():
            if any(re.search(pattern, parameter_name) for pattern in FP32_PARAMETERS):
                parameter.data = parameter.data.float()
    return models


def random_hybrids(
    layers: int, heads: int, head_size: int, *, dtype: torch.dtype, device: str
) -> dict[str, PreTrainedModel]:
    """Return `random_models` of a shape like that of the training benchmark: all layers RWKV, and every fourth kept."""
    config = qwen3_shape(layers, heads, head_size)
    kept = {"all RWKV": range(0), "every fourth kept": range(3, layers, 4)}
    return random_models(config, kept, preset="cxa079", dtype=dtype, device=device)
