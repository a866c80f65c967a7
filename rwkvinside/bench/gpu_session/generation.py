"""The stage `generation`: prefill, time of a token, memory and cache of student and teacher, by length of context."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..generation import generation_speed
from .models import SMALL, TINY, random_hybrid, random_teacher, stage_plan
from .timing import synchronize

if TYPE_CHECKING:
    from .stage import Stage

GIB = 2**30
CHUNK = 4096  # tokens of the prompt that are read at a time
WARMUP, TOKENS = 4, 32


def run(stage: Stage) -> None:
    """Measure all models at a context before the next one, the most informative first."""
    shape = TINY if stage.dry else SMALL
    kept = tuple(range(shape.layers))[3::4] or (shape.layers - 1,)
    models: dict[str, PreTrainedModel] = {}

    def make(name: str, attention_layers: tuple[int, ...]) -> dict:
        began = time.perf_counter()
        settings = stage_plan(shape, "distill", 1, 32, device=stage.device, attention_layers=attention_layers).run
        models[name] = (
            random_teacher(settings).to(torch.bfloat16)
            if name == "teacher"
            else random_hybrid(settings, torch.bfloat16)
        )
        parameters = sum(p.numel() for p in models[name].parameters())
        return {"parameters": parameters, "build_s": time.perf_counter() - began}

    def model(name: str) -> PreTrainedModel:
        if name not in models:  # it was made in a process that has ended
            make(name, layers[name])
        return models[name]

    def measure(name: str, rows: int, context: int) -> dict:
        return speed(model(name), rows, context, stage.device)

    def graphed(name: str, rows: int, context: int) -> dict:
        (found,) = generation_speed({name: model(name)}, [context], [rows], new_tokens=TOKENS)
        return {"eager_ms": found.eager_ms, "graphed_ms": found.graphed_ms}

    # the teacher first: what PyTorch's attention has planned for a length would be there for whoever comes after it
    layers: dict[str, tuple[int, ...]] = {"teacher": (), "student": (), "student, 25 % kept": kept}
    for name, attention_layers in layers.items():
        stage.attempt(f"make {name}", partial(make, name, attention_layers))
    for rows, context, needs in ((1, 512, 3), (1, 4096, 4), (1, 32768, 5), (16, 16384, 6), (1, 131072, 12)):
        tokens = context // 256 if stage.dry else context
        for name in layers:  # attention needs the square of a long context
            twice = needs * (2 if name == "teacher" else 1)
            stage.attempt(f"{name}: {rows} x {context}", partial(measure, name, rows, tokens), needs=twice)
        for name in layers if rows == 1 and context <= 32768 else ():
            stage.attempt(f"{name}, graphed: {rows} x {context}", partial(graphed, name, rows, tokens), needs=2 * needs)


@torch.inference_mode()
def speed(model: PreTrainedModel, rows: int, context: int, device: str) -> dict:
    """Return what a context costs, and every token behind it, greedily.

    Args:
        model: on the device.
        rows: that are generated at a time.
        context: random tokens.
        device: "cuda" or "cpu".
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, context), generator=generator).to(device)
    cache = None
    # loads the kernels of a start, a continuation, and a step
    for chunk in (*ids[:, : 2 * CHUNK].split(CHUNK, 1), ids[:, :1]):
        _, cache = _forward(model, chunk, cache)
    cache = None
    before = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    cache = None
    for chunk in ids.split(CHUNK, 1):
        token, cache = _forward(model, chunk, cache)
    synchronize(device)
    prefill = time.perf_counter() - began
    numbers = {"prefill_s": prefill, "prefill_tokens_per_s": rows * context / prefill}
    if device == "cuda":
        numbers["prefill_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP):
        token, cache = _forward(model, token, cache)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(TOKENS):
        token, cache = _forward(model, token, cache)
    synchronize(device)
    seconds = time.perf_counter() - began
    numbers |= {"ms_per_token": 1000 * seconds / TOKENS, "tokens_per_s": rows * TOKENS / seconds}
    numbers["cache_bytes"] = sum(tensor.numel() * tensor.itemsize for tensor in _tensors(cache.layers))
    if device == "cuda":
        numbers["decode_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        numbers["before_gib"] = before / GIB
    return numbers


def _forward(model: PreTrainedModel, ids: Tensor, cache: object) -> tuple[Tensor, object]:
    """Return the most likely next tokens (rows, 1) and the cache behind `ids`."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), out.past_key_values


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in the layers of a cache."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "is_initialized"):  # a layer
        yield from _tensors(list(vars(value).values()))
