"""Recipes: how others (and we) have converted models, under a name, for any teacher.

A recipe (`configs/recipes/`) has settings of a run and, as `attention_every: N`, that about one layer of N keeps
attention, spread evenly, where neither the teacher's preset nor the user says which. What a recipe needs for one model
is in that model's preset.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache

from ..errors import UserError
from ..support.text import did_you_mean
from .teacher_lookup import TeacherInfo, shipped

EVERY = "attention_every"


@cache
def recipes() -> dict[str, dict]:
    """Return the shipped recipes by name, such as radlads."""
    return shipped("recipes")


def recipe_layers(name: object, of_teacher: object, teacher: TeacherInfo) -> list[dict]:
    """Return the settings of a recipe: for any teacher, then what the teacher's preset says of it.

    Args:
        name: of the recipe; None: none. Anything but a text is left to the validation.
        of_teacher: the preset's key `recipes`, {name: settings}.
        teacher: gives the number of layers, and the longest rows: longer ones are cut to its context.

    Raises:
        UserError: there is no recipe of that name.
    """
    if not isinstance(name, str):
        return []
    known = recipes()
    if name not in known:
        cause = f"recipe {name!r} is not known{did_you_mean(name, known)}"
        raise UserError(cause, f"recipes: {', '.join(known)}; a model such as Qwen3-14B is --teacher")
    settings = deepcopy(known[name])
    every = settings.pop(EVERY, None)
    for stage in settings.get("stages", {}).values():
        if data := stage.get("data"):
            data["seq_len"] = min(data["seq_len"], teacher.max_positions)
    keep = max(1, round(teacher.num_layers / every)) if every else 0
    layers = [{"student": {"attention_layers": {"choose": "uniform", "keep": keep}}}] if keep else []
    own = of_teacher.get(name) if isinstance(of_teacher, dict) else None
    return [*layers, settings, *([own] if isinstance(own, dict) else [])]
