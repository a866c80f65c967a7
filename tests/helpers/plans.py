"""Plans of single stages without a configuration file."""

import torch

from rwkvinside.data.settings import DataConfig
from rwkvinside.hybrid.settings import LayerSpec, QuantizeConfig, StudentConfig
from rwkvinside.stages.phases import phases_of
from rwkvinside.stages.plan import RunSettings, StagePlan
from rwkvinside.stages.registry import objective_class
from rwkvinside.stages.settings import StageConfig
from rwkvinside.teacher.settings import TeacherConfig
from rwkvinside.training.batching import StepShape
from rwkvinside.training.settings import DeepSpeedConfig


def layer_spec(groups=(), format="nf4", adapters=(), **quantize):
    """Quantized groups and adapters."""
    return LayerSpec(QuantizeConfig(groups=list(groups), format=format, **quantize), tuple(adapters))


def run_settings(**changes):
    values = {
        "teacher": TeacherConfig(path="teacher"),
        "student": StudentConfig(),
        "data": DataConfig(),
        "seed": 0,
        "device": "cpu",
        "precision": "fp32",
        "teacher_dtype": torch.float32,
        "frozen_dtype": torch.float32,
        "ranks": 1,
        "deepspeed": changes.get("ranks", 1) > 1,
        "zero": DeepSpeedConfig(),
        "endless_tokens": 1000,
    }
    return RunSettings(**values | changes)


def stage_plan(**settings):
    """A plan from the fields of a stage's section: objective, tokens, train, data, batch, optim, loss, ..."""
    section = StageConfig.model_validate(settings)
    run = run_settings()
    return StagePlan(
        name=section.objective,
        stage=objective_class(section.objective)(),
        settings=section,
        run=run,
        length=section.length,
        shape=StepShape.of(section.length, section.batch.micro_rows, 1),
        phases=phases_of(section),
        layers=LayerSpec(),
        signal_teacher=run.teacher,
    )
