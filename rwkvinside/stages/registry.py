"""The objectives a stage can have, and the stages that every configuration knows.

A new objective is one file with a subclass of `Stage` and one line in `OBJECTIVES`.
"""

from __future__ import annotations

from importlib import import_module

from .base import Stage

# objective -> its class; imported when it is asked for
OBJECTIVES = {
    "calibrate": "rwkvinside.stages.calibrate:Calibrate",
    "align": "rwkvinside.stages.align:Align",
    "choose": "rwkvinside.stages.choose:ChooseLayers",
    "distill": "rwkvinside.stages.distill:Distill",
    "sft": "rwkvinside.stages.sft:SupervisedFineTuning",
    "pretrain": "rwkvinside.stages.pretrain:Pretrain",
}

# name of a stage that needs no configuration -> its class, which brings its defaults
STAGES = {
    "calibrate": OBJECTIVES["calibrate"],
    "align": OBJECTIVES["align"],
    "distill": OBJECTIVES["distill"],
    "long": "rwkvinside.stages.distill:LongContext",
    "sft": OBJECTIVES["sft"],
}
RUN = ("calibrate", "align", "distill")  # what a conversion runs unless told otherwise


def find_stage_class(name: str, objective: str | None) -> type[Stage] | None:
    """Return the class of a stage as it is configured.

    Args:
        name: of the stage.
        objective: as configured; None: that of a known name.

    Returns:
        The class; None for an unknown objective, or an unknown name without one.
    """
    if objective is None:
        return _load(STAGES[name]) if name in STAGES else None
    return stage_class(name, objective) if objective in OBJECTIVES else None


def stage_class(name: str, objective: str) -> type[Stage]:
    """Return the class of a stage with a known objective.

    A known name has a class of its own, unless the stage is configured with another objective.
    """
    if name in STAGES and (known := _load(STAGES[name])).objective == objective:
        return known
    return objective_class(objective)


def objective_class(objective: str) -> type[Stage]:
    """Return the class of an objective, a key of `OBJECTIVES`."""
    return _load(OBJECTIVES[objective])


def _load(path: str) -> type[Stage]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
