"""Trains the toy in its own process: `resume_worker.py DIR [--resume] [--die-at STEP] [--term-at STEP]`.

Exits as the commands do. The evaluation callback is where the process is hit: between the update and the checkpoint.
"""

import argparse
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from toy_training import local_engine, trainer

from rwkvinside.errors import UserError
from rwkvinside.training.checkpoint import Checkpointer
from rwkvinside.training.metrics import Console, MetricsWriter

parser = argparse.ArgumentParser()
parser.add_argument("run", type=Path)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--die-at", type=int)
parser.add_argument("--term-at", type=int)
args = parser.parse_args()


def evaluate(step):
    if step == args.die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == args.term_at:
        signal.raise_signal(signal.SIGTERM)
    return {"draw": float(torch.rand(()))}  # an evaluation that draws random numbers must not break the resume


checkpointer = Checkpointer(args.run / "stages" / "toy", {"preset": "toy"}, keep=2)
toy = trainer(
    local_engine(),
    checkpointer=checkpointer,
    metrics=MetricsWriter(args.run),
    console=Console("toy", 8, every=4),
    evaluate=evaluate,
    evaluate_every=1,
    save_every=2,
)
if not args.resume:  # a resumed run must get its random state from the checkpoint
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
try:
    if args.resume:
        toy.restore(checkpointer.load())
    toy.fit()
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
