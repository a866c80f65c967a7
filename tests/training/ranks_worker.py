"""Trains the toy on the ranks of a launcher, once for each ZeRO stage and precision: `ranks_worker.py OUT SINGLE`.

SINGLE holds a checkpoint of a single process at half-way. Rank 0 writes OUT/<case>/... and OUT/losses.json.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from toy_training import SETTINGS, Losses, PoisonStep, Source, model, trainer

from rwkvinside.errors import Interrupted, UserError
from rwkvinside.training.checkpoint import Checkpointer
from rwkvinside.training.engine import DeepSpeedEngine, launched_world

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("single", type=Path)
parser.add_argument("--local_rank")
args = parser.parse_args()
world = launched_world()
losses, norms, messages = {}, {}, {}


def engine_of(stage, precision, toy=None):
    toy = toy or model(dropout=0.0)
    return DeepSpeedEngine(toy, toy.groups(), SETTINGS, world, precision, stage)


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
    losses[case], norms[case] = seen["loss"], seen["grad_norm"]
    engine.close()


class TermOnRankOne(Source):
    """A signal that only the last rank gets, in step 3."""

    def batch(self, rows):
        if world.rank == world.size - 1 and rows[0] == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(rows)


halfway = Checkpointer(args.single, {}).load("step-00000004")
for stage in (0, 1, 2):
    for precision in ("fp32", "bf16") if stage else ("fp32",):
        case = f"{precision}-zero{stage}"
        run(case, engine_of(stage, precision), save_every=4)
        middle = Checkpointer(args.out / case, {}).load("step-00000004")
        run(f"{case}-resumed", engine_of(stage, precision), resume=middle)
    run(f"fp32-zero{stage}-from-single", engine_of(stage, "fp32"), resume=halfway)

run("bf16-zero0", engine_of(0, "bf16"))  # becomes stage 1
run("fp32-zero2-whole", engine_of(2, "fp32"), micro_rows=4)
run("stop", engine_of(2, "fp32"), source=TermOnRankOne())
for stage in (0, 2):
    run(f"nan-zero{stage}", engine_of(stage, "fp32"), step=PoisonStep(19))  # row 3 of step 3: on the last of two ranks
    run(f"inf-zero{stage}", engine_of(stage, "fp32"), step=PoisonStep(19, "gradient"))

# one model, wrapped twice
toy = model(dropout=0.0)
run("first", engine_of(1, "bf16", toy))
run("second", engine_of(2, "fp32", toy))

if world.is_main:
    content = {"losses": losses, "norms": norms, "messages": messages, "ranks": world.size}
    (args.out / "losses.json").write_text(json.dumps(content))
world.close()
sys.exit(Interrupted.exit_code if "stop" in messages else 0)
