"""A configuration for people: as commented YAML, and as a list of all fields."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from .schema import Config


def describe(model: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return every field as (path, default, description), depth first.

    In paths, <stage> stands for the stages' names. A default among values that a field lists has a star.
    """
    rows = []
    for name, field in model.model_fields.items():
        inner = inner_model(field.annotation)
        path = f"{prefix}{name}"
        if inner is None:
            default = "" if field.is_required() else str(field.get_default())
            allowed = _literals(field.annotation)
            default = " | ".join(f"{value}*" if value == default else value for value in allowed) or default
            rows.append((path, default, field.description or ""))
        else:
            rows += describe(inner, f"{path}.<stage>." if name == "stages" else f"{path}.")
    return rows


def _literals(annotation: Any) -> list[str]:
    """Return the values that an annotation lists, [] where it allows others."""
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    inner = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    literal = [_literals(each) if each is not NoneType else ["None"] for each in inner]
    return [value for values in literal for value in values] if literal and all(literal) else []


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of configuration files, for editors that complete and check YAML.

    A file has as many fields as it likes, since defaults, teacher and flags bring the others: none is required.
    """
    schema = Config.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        model.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "rwkvinside configuration"}


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in X, X | None, list[X] or dict[str, X].

    None where there is no model in the annotation.
    """
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML with defaults and a sentence on each field.

    Read back with -c, it gives the same configuration.
    """
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
    """Return a value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _names(model: type[BaseModel]) -> frozenset[str]:
    """Return all field names below a model.

    They are explained once, at the first stage.
    """
    inner = [inner_model(field.annotation) for field in model.model_fields.values()]
    return frozenset(model.model_fields).union(*(_names(m) for m in inner if m is not None))
