"""The memory that a plan predicts, next to what real runs take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import byte_tokenizer, save_qwen3

from rwkvinside import kernels
from rwkvinside.config.load import load_config
from rwkvinside.config.resolve import resolve
from rwkvinside.hybrid.assemble import apply
from rwkvinside.planning.devices import card_for
from rwkvinside.planning.memory import EngineSpec, StepMemory, StudentMemory, memory_of
from rwkvinside.planning.plan import meta_student, plan_text
from rwkvinside.planning.stage_memory import stage_memory
from rwkvinside.stages.teacher import meta_online_teacher, original_teacher
from rwkvinside.support.text import rounded_bytes
from rwkvinside.teacher.kinds import TeacherKind
from rwkvinside.training.process_group import Distributed

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A teacher whose student has 57 million parameters, 217 MiB, and a little text."""
    root = tmp_path_factory.mktemp("material")
    save_qwen3(
        root / "teacher",
        byte_tokenizer(),
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
    )
    (root / "train.jsonl").write_text((json.dumps({"text": "the quick brown fox jumps " * 20}) + "\n") * 5)
    (root / "val.jsonl").write_text(json.dumps({"text": "over the lazy dog"}) + "\n")
    return root


def predicted(config):
    """Bytes of the one stage of a run, in this process."""
    (name,) = config.run
    plan = resolve(config).stage(name)
    model = meta_student(plan.run)
    apply(model, plan.layers)
    kind = plan.stage.prepare(model, plan, plan.phases[0].train)
    teacher = meta_online_teacher(plan) if kind is TeacherKind.ONLINE else None
    return stage_memory(plan, model, kind, teacher)


BF16 = ["precision=bf16", "teacher.dtype=bfloat16"]
NF4 = ["quantize.groups=[mlp,teacher]", "adapters=[{kind: lora, groups: [mlp], rank: 16}]"]


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.skipif(kernels.why_unavailable("native") is not None, reason="the counts are those of the native kernel")
@pytest.mark.parametrize(
    "name, rows, more",
    [
        ("align", 2, []),
        ("align", 2, BF16),
        ("distill", 1, []),
        ("distill", 2, ["stages.distill.activation_checkpointing=true", "stages.distill.train=[mixer,mlp]"]),
        ("align", 2, ["stages.align.activation_checkpointing=recurrence"]),
        ("distill", 2, [*NF4, "stages.distill.train=[mixer,adapters]", "stages.distill.optim.kind=adamw8bit"]),
    ],
)
def test_predicted_memory_is_what_a_run_takes(material, tmp_path, name, rows, more):
    fields = {"tokens": 512 * rows, "data.seq_len": 256, "batch.tokens": 256 * rows, "batch.micro_rows": rows}
    overrides = [f"run=[{name}]", "data.val_tokens=100", "samples.tokens=1", *more]
    overrides += [f"stages.{name}.{k}={v}" for k, v in fields.items()]
    paths = {"teacher": material / "teacher", "data": material / "train.jsonl", "val": material / "val.jsonl"}
    argv = [*(f"--{key}={path}" for key, path in paths.items()), f"--out={tmp_path / 'run'}", *overrides]
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "helpers" / "memory_worker.py"),
            *argv,
            f"data.cache_dir={tmp_path / 'cache'}",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    measured = found["peak"] - found["before"]
    memory = predicted(load_config(teacher=str(paths["teacher"]), out=str(tmp_path / "run"), overrides=overrides))
    peak = max(memory.peak, memory.evaluating + memory.original)
    assert peak == pytest.approx(measured, rel=0.2), (
        f"predicted {peak / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB: "
        f"{ {part: round(size / MIB) for part, size in memory.device.items()} }"
    )
    print(f"\n{name} {more}: predicted {peak / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB")


@pytest.mark.parametrize(
    "more",
    [
        ["stages.distill.train=[mixer,mlp,head]", "stages.distill.teacher_model.quantize=nf4"],
        ["stages.distill.train=[mixer,mlp,head]", "stages.distill.teacher_model.quantize=int8", *BF16],
        ["quantize.groups=[mlp,teacher]", "stages.distill.train=[mixer]"],
        ["quantize.groups=[mlp,teacher]", "stages.distill.train=[mixer]", *BF16],
    ],
)
def test_the_original_of_a_quantized_teacher_is_in_the_plan(tmp_path, more):
    save_qwen3(tmp_path / "teacher", byte_tokenizer(), tie_word_embeddings=True)
    config = load_config(teacher=str(tmp_path / "teacher"), out="out", overrides=["run=[distill]", "device=cpu", *more])
    plan = resolve(config)
    loaded = original_teacher(plan.stage("distill"), Distributed("cpu")).module.lm
    size = sum(p.numel() * p.itemsize for p in loaded.parameters())
    memory = predicted(config)
    assert memory.original == size
    assert memory.peak == max(sum(memory.device.values()), memory.saving, memory.evaluating)  # it has to fit without
    text = plan_text(plan, config)
    assert f"with the original teacher ({rounded_bytes(size)}), which is left out where that does not fit" in text


def test_a_teacher_that_is_not_quantized_needs_no_original(material):
    config = load_config(teacher=str(material / "teacher"), out="out", overrides=["run=[distill]", "device=cpu"])
    assert predicted(config).original == 0


def test_what_a_token_takes_does_not_grow_with_the_row(material):
    """Documents are kept apart by their bounds: nothing has T * T elements."""
    for name in ("calibrate", "align", "distill"):
        rows = {16: 64, 1: 1024}  # tokens of a row by rows of a micro-batch
        sizes = []
        for count, seq_len in rows.items():
            fields = {"tokens": 1024, "data.seq_len": seq_len, "batch.tokens": 1024, "batch.micro_rows": count}
            overrides = [f"run=[{name}]", *(f"stages.{name}.{k}={v}" for k, v in fields.items())]
            config = load_config(teacher=str(material / "teacher"), out="out", overrides=overrides)
            sizes.append(predicted(config).peak)
        assert sizes[0] == sizes[1], name


# A student of a hundred parameters, ten of which train; every term of the formula by hand.
WEIGHTS = StudentMemory(trainable=10, others=180, parameters=100, cast=10, whole=20, unpacked=0, head=0)


def device_of(cpu=False, work=None, **engine):
    return memory_of(WEIGHTS, work or StepMemory(tokens=0), EngineSpec(launched=True, **engine), cpu=cpu).device


def test_zero_shares_what_it_says():
    assert device_of(zero=0, ranks=2) == {"weights": 220, "optimizer": 80, "gradients": 40}
    assert device_of(zero=1, ranks=2) == {"weights": 220, "masters": 20, "optimizer": 40, "gradients": 40}
    assert device_of(zero=2, ranks=2) == {"weights": 220, "masters": 20, "optimizer": 40, "gradients": 20 + 40}
    assert device_of(zero=3, ranks=2)["weights"] == 110 + 20
    bf16 = device_of(zero=1, ranks=2, bf16=True, bf16_weights=True)
    assert bf16 == {"weights": 200, "masters": 20, "optimizer": 40, "gradients": 20 + 20}


def test_offloading_moves_to_the_host():
    kept = memory_of(WEIGHTS, StepMemory(tokens=0), EngineSpec(True, zero=3, ranks=2), cpu=False)
    engine = EngineSpec(True, zero=3, ranks=2, offload_optimizer=True, offload_parameters=True)
    moved = memory_of(WEIGHTS, StepMemory(tokens=0), engine, cpu=False)
    assert not {"optimizer", "masters"} & set(moved.device) and moved.device["weights"] == WEIGHTS.whole
    assert moved.host() - kept.host() == 40 + 20 + 110
    on_cpu = memory_of(WEIGHTS, StepMemory(tokens=0), engine, cpu=True)
    assert on_cpu.device == kept.device and on_cpu.host() == 0


def test_gradients_and_activations_are_there_together_only_with_several_micro_batches():
    many = StepMemory(tokens=1, kept=[100, 100], micro_batches=2)
    assert {**device_of(work=many), "weights": 0} == {
        "weights": 0,
        "optimizer": 80,
        "gradients": 40,
        "activations": 200,
    }
    one = StepMemory(tokens=1, kept=[100, 100])
    assert "gradients" not in device_of(work=one) and device_of(work=one)["activations"] == 200


def test_layers_that_are_recomputed_keep_no_bf16_copies_under_zero_3():
    many = dict(ranks=2, bf16=True, work=StepMemory(tokens=1, kept=[100], inputs=1))
    assert device_of(zero=2, **many)["bf16 copies"] == 20
    assert device_of(zero=3, **many)["bf16 copies"] == WEIGHTS.whole // 2


def test_cards():
    assert [card_for(size * 10**9) for size in (1, 6.9, 22.9, 23, 78, 500)] == [8, 8, 24, 32, 80, None]


def test_graphs_keep_gradients_and_a_micro_batch():
    """While activations are there, and while the student is evaluated."""
    weights = StudentMemory(trainable=100, others=50, parameters=150, cast=0, whole=0, unpacked=0, head=0)
    work = StepMemory(tokens=100, kept=[7, 7], judged=1000)
    plain, graphed = (memory_of(weights, work, EngineSpec(graphs=graphs), cpu=False) for graphs in (False, True))
    assert plain.device["activations"] == graphed.device["activations"] == 1400
    assert "gradients" not in plain.device and graphed.device["gradients"] == 400
    assert graphed.evaluating - plain.evaluating == 1400 + 400
