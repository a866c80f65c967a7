"""Micro-batches grow as far as memory allows, and nothing else changes."""

import dataclasses

import pytest
from tiny import save_configuration

from rwkvinside.config.load import load_config
from rwkvinside.config.resolve import resolve
from rwkvinside.planning import fitting
from rwkvinside.planning.fitting import fitted, resolve_fitted
from rwkvinside.planning.plan import meta_student
from rwkvinside.planning.stage_memory import stage_memory
from rwkvinside.stages.teacher import meta_online_teacher
from rwkvinside.teacher.kinds import TeacherKind

GPU = ["device=cuda", "precision=bf16"]


@pytest.fixture
def config(tmp_path):
    teacher = save_configuration(tmp_path / "tiny", intermediate_size=64, max_position_embeddings=4096)
    rows = ["stages.align.data.seq_len=512", "stages.align.batch.tokens=24_576"]
    return load_config(teacher=teacher, overrides=[*GPU, *rows, "stages.distill.batch.micro_rows=2"])


def peak(run, stage):
    model = meta_student(run.settings)
    kind = stage.stage.prepare(model, stage, stage.phases[-1].train)
    teacher = meta_online_teacher(stage) if kind is TeacherKind.ONLINE else None
    return stage_memory(stage, model, kind, teacher).peak


def micro_rows(plan):
    return {stage.name: stage.shape.micro_rows for stage in plan.stages}


def test_with_memory_for_all_a_step_is_one_micro_batch(config):
    plan = resolve(config)
    assert plan.stage("align").shape.micro_rows == 8  # 4096 tokens
    found = fitted(plan, 80 * 10**9)
    assert micro_rows(found) == micro_rows(plan) | {"align": 48}
    same = dataclasses.replace(found.stage("align"), shape=plan.stage("align").shape)
    assert same == plan.stage("align")


def test_memory_for_half_a_step_is_used_and_no_more(config):
    plan = resolve(config)
    for rows in (8, 16, 32):
        stage = plan.stage("align")
        stage = dataclasses.replace(stage, shape=dataclasses.replace(stage.shape, micro_rows=rows))
        needed = peak(plan, stage) / fitting.USABLE
        assert micro_rows(fitted(plan, int(needed) + 2))["align"] == rows
        assert micro_rows(fitted(plan, int(needed) - 2))["align"] == max(rows // 2, 8)  # 4096 tokens at least


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_graphs_are_left_out_where_only_what_runs_without_them_fits(config, stage):
    """Also with micro-batches of a given size; those that were asked for stay."""
    plan = resolve(config)
    one = plan.stage(stage)
    without = dataclasses.replace(one, settings=one.settings.model_copy(update={"cuda_graphs": False}))
    least, needed = (peak(plan, each) / fitting.USABLE for each in (without, one))
    assert least < needed, "graphs cost nothing"
    assert fitted(plan, int(needed) + 2).stage(stage).settings.cuda_graphs == "auto"
    tight = fitted(plan, int(least) + 2).stage(stage)
    assert tight.settings.cuda_graphs is False and tight.shape == one.shape
    asked = config.stages[stage].model_copy(update={"cuda_graphs": True})
    asked = config.model_copy(update={"stages": config.stages | {stage: asked}})
    assert fitted(resolve(asked), int(least) + 2).stage(stage).settings.cuda_graphs is True


def test_a_micro_batch_has_at_most_32768_tokens(tmp_path):
    teacher = save_configuration(tmp_path / "tiny", intermediate_size=64, max_position_embeddings=4096)
    rows = ["stages.align.data.seq_len=4096", "stages.align.batch.tokens=131_072"]
    plan = fitted(resolve(load_config(teacher=teacher, overrides=[*GPU, *rows])), 80 * 10**9)
    assert plan.stage("align").shape.micro_rows == 8


def test_ranks_share_the_rows_first(config):
    plan = fitted(resolve(config, ranks=4), 80 * 10**9)
    assert plan.stage("align").shape.micro_rows == 12


def test_a_cpu_and_a_machine_without_a_gpu_leave_the_plan(config, monkeypatch):
    monkeypatch.setattr(fitting, "device_memory", lambda device, gpu: None)
    assert micro_rows(resolve_fitted(config)) == micro_rows(resolve(config))
    monkeypatch.setattr(fitting, "device_memory", lambda device, gpu: 80 * 10**9)
    assert resolve_fitted(config).stage("align").shape.micro_rows == 48
    on_cpu = config.model_copy(update={"device": "cpu", "precision": "fp32"})
    assert micro_rows(resolve_fitted(on_cpu)) == micro_rows(resolve(on_cpu))
