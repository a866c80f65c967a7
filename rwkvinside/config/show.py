"""A configuration for people: as commented YAML, and as a list of all fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from .schema import Config


def describe(model: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every field as (path, default, description), depth first; <stage> stands for the stages' names."""
    rows = []
    for name, field in model.model_fields.items():
        inner = inner_model(field.annotation)
        path = f"{prefix}{name}"
        if inner is None:
            rows.append((path, "" if field.is_required() else str(field.get_default()), field.description))
        else:
            rows += describe(inner, f"{path}.<stage>." if name == "stages" else f"{path}.")
    return rows


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model in X, X | None or dict[str, X]."""
    for part in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def to_yaml(config: Config) -> str:
    """The configuration with all defaults filled in, a sentence on each field; -c reads it back as the same one."""
    return "\n".join(_yaml_lines(config)) + "\n"


def _yaml_lines(model: BaseModel, indent: str = "", explained: frozenset[str] = frozenset()) -> Iterator[str]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        comment = "" if name in explained else f"  # {field.description}"
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:{comment}"
            yield from _yaml_lines(value, f"{indent}  ", explained)
        elif value and all(isinstance(v, BaseModel) for v in (value.values() if isinstance(value, dict) else [None])):
            yield f"{indent}{name}:{comment}"
            for i, (key, inner) in enumerate(value.items()):
                yield f"{indent}  {_flow(key)}:"
                yield from _yaml_lines(inner, f"{indent}    ", _names(type(inner)) if i else frozenset())
        else:
            yield f"{indent}{name}: {_flow(model.model_dump(mode='json', include={name})[name])}{comment}"


def _flow(value: object) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _names(model: type[BaseModel]) -> frozenset[str]:
    """All field names below a model: explained once, at the first stage."""
    inner = [inner_model(field.annotation) for field in model.model_fields.values()]
    return frozenset(model.model_fields).union(*(_names(m) for m in inner if m is not None))
