from dataclasses import replace

import pytest
import torch
from hybrid_cases import teacher
from plans import layer_spec, run_settings, stage_plan

from rwkvinside.errors import UserError
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import AdapterConfig, StudentConfig
from rwkvinside.stages import cuda_graphs
from rwkvinside.stages.cuda_graphs import uses_graphs

ON_A_GPU = {"device": "cuda", "precision": "bf16"}


def plan(objective="distill", run=None, **settings):
    common = {
        "cuda_graphs": True,
        "tokens": 640,
        "data": {"seq_len": 16},
        "batch": {"tokens": 64},
        "optim": {},
        "train": ["mixer"],
    }
    made = stage_plan(objective=objective, **common | ({"loss": {}} if objective != "align" else {}) | settings)
    return replace(made, run=run_settings(**ON_A_GPU | (run or {})))


@pytest.fixture(scope="module")
def student():
    return HybridModel.from_teacher(teacher(), StudentConfig())


@pytest.mark.parametrize("objective", ["align", "distill"])
def test_align_and_distill_on_a_gpu_have_graphs(student, objective):
    for settings in ({}, {"activation_checkpointing": "recurrence"}, {"cuda_graphs": "auto"}):
        assert uses_graphs(student, plan(objective, **settings))
    assert not uses_graphs(student, plan(objective, cuda_graphs=False))


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"objective": "sft", "loss": {"kl": 0.0, "ce": 1.0}}, "the objective is sft"),
        ({"run": {"device": "cpu"}}, "the device is cpu"),
        ({"run": {"precision": "fp32"}}, "precision is fp32"),
        ({"run": {"ranks": 2}}, "DeepSpeed trains in 2 processes"),
        ({"run": {"student": StudentConfig(backend="chunked")}}, "student.backend chunked"),
        ({"activation_checkpointing": True}, "activations are recomputed"),
        ({"teacher": "cache", "teacher_cache": "logits"}, "read from disk"),
        ({"loss": {"top_k": 4}}, "loss.top_k"),
        ({"teacher_model": {"path": "other", "quantize": "nf4"}}, "layers are quantized"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_one_line(student, changes, why):
    with pytest.raises(UserError, match=rf"^stages\.\w+\.cuda_graphs cannot be true: .*{why}"):
        uses_graphs(student, plan(**changes))
    assert not uses_graphs(student, plan(**changes | {"cuda_graphs": "auto"}))


def test_adapters_are_refused(student):
    adapted = replace(plan(), layers=layer_spec(adapters=[AdapterConfig()]))
    with pytest.raises(UserError, match="the student has adapters"):
        uses_graphs(student, adapted)


@pytest.mark.parametrize(
    "family, why", [("gemma2", "flash attention does not take"), ("qwen3_moe", "qwen3_moe has experts")]
)
def test_models_whose_work_depends_on_the_text_are_refused(family, why):
    with pytest.raises(UserError, match=why):
        uses_graphs(HybridModel.from_teacher(teacher(family), StudentConfig()), plan())


def test_a_rotation_that_depends_on_the_longest_position_is_refused(student, monkeypatch):
    monkeypatch.setattr(student.lm.config, "rope_parameters", {"rope_type": "longrope"})
    with pytest.raises(UserError, match="the rotation of qwen3 asks the GPU"):
        uses_graphs(student, plan())


@pytest.mark.parametrize("here", [True, False])
def test_a_gpu_without_the_kernels_has_no_graphs(student, monkeypatch, here):
    """Where it is this machine's; a plan for another one expects them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    monkeypatch.setattr(cuda_graphs, "why_unavailable", lambda backend: "the kernels are made for NVIDIA GPUs")
    assert uses_graphs(student, plan(cuda_graphs="auto")) is not here
    if here:
        with pytest.raises(UserError, match="cuda_graphs cannot be true: the kernels are made for NVIDIA"):
            uses_graphs(student, plan())


def test_heads_that_the_kernels_do_not_take_have_no_graphs(student, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "why_unsupported", lambda *given: "it takes head sizes that are multiples of 8")
    assert not uses_graphs(student, plan(cuda_graphs="auto"))


def test_every_stage_that_is_prepared_is_checked(student):
    align = plan("align", run={"device": "cpu"})
    with pytest.raises(UserError, match="align.cuda_graphs cannot be true: the device is cpu"):
        align.stage.prepare(student, align, ["mixer"])
