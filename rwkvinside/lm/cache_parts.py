"""The tensors of a transformers cache, whatever its slots are: recurrent states, windows, keys and values.

A slot is an object with tensors, or named tuples of tensors, among its attributes; their names are those of the parts:
"3.state.wkv" is the recurrent state of layer 3, "4.keys" the keys of layer 4. So the classes that exported models
carry, which are not this package's own, work as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

Change = Callable[[str, Tensor], Tensor]
"""(name of a part, its tensor) -> another tensor."""


def map_cache(cache: Cache, change: Change) -> Cache:
    """Return a cache whose tensors are changed ones of this; this one stays as it is."""
    result = copy.copy(cache)
    result.layers = []
    for i, slot in enumerate(cache.layers):
        slot = copy.copy(slot)
        vars(slot).update({name: _map(value, f"{i}.{name}", change) for name, value in vars(slot).items()})
        result.layers.append(slot)
    return result


def named_parts(cache: Cache) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of every part, layer by layer."""
    for i, slot in enumerate(cache.layers):
        for name, value in vars(slot).items():
            yield from _parts(value, f"{i}.{name}")


def fork(cache: Cache) -> Cache:
    """Return a cache that goes on from this one and leaves it as it is.

    What layers may write into is copied. Keys and values that grow are not: every token makes new ones anyway.
    """
    return map_cache(cache, lambda name, x: x if grows(cache, name) else x.clone())


def grows(cache: Cache, part: str) -> bool:
    """Return whether a part belongs to a slot of keys and values that are appended to, not written into."""
    return isinstance(cache.layers[int(part.partition(".")[0])], DynamicLayer)


def rows_of(cache: Cache) -> int | None:
    """Return the batch size of a cache; None before its first token."""
    return next((x.shape[0] for _, x in named_parts(cache) if x.ndim > 1), None)


def _map(value: Any, name: str, change: Change) -> Any:
    if isinstance(value, Tensor):
        return change(name, value)
    if _is_named_tuple(value):
        fields = zip(value._fields, value, strict=True)
        return type(value)(*(_map(part, f"{name}.{field}", change) for field, part in fields))
    return value


def _parts(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif _is_named_tuple(value):
        for field, part in zip(value._fields, value, strict=True):
            yield from _parts(part, f"{name}.{field}")


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def plain_values(cache: Cache) -> list[dict[str, Any]]:
    """Return what else a file has to keep of each slot, such as the number of tokens seen."""
    kept = (bool, int, float, str)
    return [{name: v for name, v in vars(slot).items() if isinstance(v, kept)} for slot in cache.layers]


def with_plain_values(cache: Cache, values: list[dict[str, Any]]) -> Cache:
    """Return a cache whose slots have these `plain_values`."""
    cache = map_cache(cache, lambda _, x: x)
    for slot, fields in zip(cache.layers, values, strict=True):
        vars(slot).update(fields)
    return cache
