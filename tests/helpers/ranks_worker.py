"""Trains the toy and the tiny hybrid on the ranks of a launcher, once for each way to shard them.

Usage: `ranks_worker.py OUT SINGLE`. SINGLE holds a checkpoint of the toy on a single process at half-way. Rank 0 writes
OUT/<case>/... and OUT/results.json. On other than two ranks the toy runs in a few ways only.
"""

import argparse
import gc
import json
import signal
import sys
import weakref
from pathlib import Path

import tiny_hybrid as tiny
from toy_training import BOUNDARY, SETTINGS, SHAPE, Losses, PoisonStep, Source, model, phase, trainer

from rwkvinside.errors import Interrupted, UserError
from rwkvinside.evaluate.in_training import evaluate_student, share
from rwkvinside.training.batching import StepShape
from rwkvinside.training.checkpoint import Checkpointer
from rwkvinside.training.deepspeed_engine import DeepSpeedEngine, inference_engine, join_process_group
from rwkvinside.training.settings import DeepSpeedConfig, EarlyStopConfig

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("single", type=Path)
parser.add_argument("--local_rank")
args = parser.parse_args()
world = join_process_group()
losses, norms, messages, evaluations, models = {}, {}, {}, {}, {}
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # even the smallest parameters are cut
OFFLOAD = {"offload_optimizer": True}
BOTH = OFFLOAD | {"offload_parameters": True}


def settings(stage, **zero):
    return DeepSpeedConfig(zero_stage=stage, config=SMALL if stage == 3 else None, **zero)


def engine_of(stage, precision="fp32", toy=None, micro_rows=2, **zero):
    toy = toy or model(dropout=0.0)
    shape = SHAPE(micro_rows, world.size)
    return DeepSpeedEngine(toy, toy.groups(), SETTINGS, world, precision, settings(stage, **zero), shape)


def run(case, engine, source=None, resume=None, step=None, micro_rows=2, **options):
    seen = Losses()
    checkpointer = Checkpointer(args.out / case, {}, keep=9)
    toy = trainer(
        engine, micro_rows=micro_rows, source=source, step=step, metrics=seen, checkpointer=checkpointer, **options
    )
    if resume is not None:
        toy.restore(resume)
    try:
        toy.fit()
    except UserError as error:
        messages[case] = str(error)
    losses[case], norms[case], models[case] = seen["loss"], seen["grad_norm"], weakref.ref(engine.model)
    engine.close()


class TermOnLastRank(Source):
    """A signal that only the last rank gets, in step 3."""

    def batch(self, rows):
        if rows[0] == 16 + world.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return super().batch(rows)


def unfreezing(stage):
    """The group "rest" joins after some steps; saved at the end."""

    def make_engine(toy, groups):
        shape = SHAPE(2, world.size)
        return DeepSpeedEngine(toy, groups, SETTINGS, world, zero=settings(stage), shape=shape)

    checkpointer = Checkpointer(args.out / f"unfreezing-zero{stage}", {})
    for joined, until in ((False, BOUNDARY), (True, None)):
        part = phase(make_engine, checkpointer, joined, micro_rows=2)
        part.fit(until=until)
        part.engine.close()


def toy_on_two_ranks():
    halfway = Checkpointer(args.single, {}).load("step-00000004")
    ways = {
        "fp32-zero0": (0, "fp32", {}),
        "fp32-zero1": (1, "fp32", {}),
        "fp32-zero2": (2, "fp32", {}),
        "fp32-zero3": (3, "fp32", {}),
        "fp32-zero1-offload": (1, "fp32", OFFLOAD),
        "fp32-zero3-offload": (3, "fp32", BOTH),
        "bf16-zero2": (2, "bf16", {}),
        "bf16-zero3": (3, "bf16", {}),
        "rounded-zero1": (1, "bf16", {"bf16_weights": True}),
        "rounded-zero2": (2, "bf16", {"bf16_weights": True}),
        "rounded-zero3": (3, "bf16", {"bf16_weights": True}),
    }
    for case, (stage, precision, zero) in ways.items():
        run(case, engine_of(stage, precision, **zero), save_every=4)
        middle = Checkpointer(args.out / case, {}).load("step-00000004")
        run(f"{case}-resumed", engine_of(stage, precision, **zero), resume=middle)
        if precision == "fp32":
            run(f"{case}-from-single", engine_of(stage, **zero), resume=halfway)

    run("rounded-zero0", engine_of(0, "bf16", bf16_weights=True))  # becomes stage 1
    run("fp32-zero2-whole", engine_of(2, micro_rows=4), micro_rows=4)
    run("stop", engine_of(2), source=TermOnLastRank())
    for stage in (0, 2, 3):
        run(f"nan-zero{stage}", engine_of(stage), step=PoisonStep(19))  # row 3 of step 3: on the last rank
        run(f"inf-zero{stage}", engine_of(stage), step=PoisonStep(19, "gradient"), save_every=1)

    kl = [1.0, 0.9, 0.9, 0.8, 0.9, 0.9, 0.9, 0.9] if world.is_main else [1 / (1 + step) for step in range(8)]
    stop = {"evaluate": lambda done: {"kl": kl[done - 1]}, "early_stop": EarlyStopConfig(patience=2)}
    run("early-end", engine_of(2), evaluate_every=1, **stop)

    for stage in (0, 1, 2, 3):
        unfreezing(stage)

    # one model, wrapped twice
    toy = model(dropout=0.0)
    run("first", engine_of(1, "bf16", toy))
    run("second", engine_of(2, "fp32", toy))


def hybrid(case, objective, stage, precision="fp32", **zero):
    student, make_step = objective
    shape = StepShape(tiny.ROWS, tiny.MICRO_ROWS, world.size)
    engine = DeepSpeedEngine(
        student, tiny.groups(student), tiny.SETTINGS, world, precision, settings(stage, **zero), shape
    )
    step, seen, own = make_step(engine.module), Losses(), share(tiny.judged(), world.rank, world.size)

    def evaluate(done):
        with engine.autocast():
            teacher = getattr(step, "teacher", None)
            scores = evaluate_student(engine.module, teacher, own, world.device, world.all_reduce_sum)
        return {"kl": scores.kl, "ce": scores.ce}

    checkpointer = Checkpointer(args.out / case, {})
    tiny.trainer(
        engine, step, micro_rows=tiny.MICRO_ROWS, checkpointer=checkpointer, metrics=seen, evaluate=evaluate
    ).fit()
    losses[case], models[case] = seen["loss"], weakref.ref(student)
    evaluations[case] = [{name: row[name] for name in ("kl", "ce")} for row in seen.rows if row["kind"] == "eval"]
    engine.close()
    if teacher := getattr(step, "teacher", None):
        models[f"{case}, teacher"] = weakref.ref(getattr(teacher, "module", student))
        teacher.close()


def shard(its, parts):
    return inference_engine(its, parts, world, SMALL)


if world.size == 2:
    toy_on_two_ranks()
else:
    for stage in (2, 3):
        run(f"fp32-zero{stage}", engine_of(stage), save_every=4)
for stage, economy in ((0, {}), (1, OFFLOAD), (2, OFFLOAD), (3, BOTH)):
    hybrid(f"align-zero{stage}", tiny.align(), stage)
    hybrid(f"distill-zero{stage}", tiny.distill(), stage)
    hybrid(f"align-zero{stage}-economy", tiny.align(checkpointing=True), stage, **economy)
    hybrid(f"distill-zero{stage}-economy", tiny.distill(checkpointing=True), stage, **economy)
    if world.size == 2:
        hybrid(f"quantized-zero{stage}", tiny.quantized(), stage)
        hybrid(f"sparse-zero{stage}", tiny.sparse(), stage)
hybrid("distill-zero3-sharded-teacher", tiny.distill(shard=shard), 3)
if world.size == 2:
    hybrid("distill-zero1-sharded-teacher", tiny.distill(shard=shard), 1)
    hybrid("distill-zero1-bf16", tiny.distill(), 1, "bf16")
    hybrid("distill-zero3-bf16", tiny.distill(), 3, "bf16")

gc.collect()
alive = [case for case, model in models.items() if model() is not None]
if world.is_main:
    content = {"losses": losses, "norms": norms, "messages": messages, "evaluations": evaluations, "ranks": world.size}
    content["alive"] = alive
    (args.out / "results.json").write_text(json.dumps(content))
world.close()
threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
assert not any("gloo" in name for name in threads), threads  # one that works while Python ends may abort the process
sys.exit(Interrupted.exit_code if "stop" in messages else 0)
