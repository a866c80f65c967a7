"""Training speed of the stages beside plain fine-tuning of the same teacher, on one machine and batch, in one run."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from ..data.batch import Batch
from ..distill.calibrate import teacher_power
from ..distill.hybrid import HybridModel, StudentSpec
from ..distill.steps import AlignStep, DistilStep
from ..distill.teacher import SeparateTeacher


def training_speed(teacher: str | Path, *, rows: int, seq_len: int, repeats: int = 5, seed: int = 0) -> dict:
    """Tokens per second of one optimiser step (forward, backward, clip, AdamW) in fp32 on the CPU or the first GPU.

    Args:
        teacher: local directory or hub id.
        rows, seq_len: the batch, rows x seq_len random tokens, one document a row.
        repeats: steps of each kind; they take turns, so that what else the machine does hits all alike.

    Returns:
        {"finetune" | "align" | "distil": median tokens/s, "align_ratio", "distil_ratio": relative to fine-tuning,
        "rows", "seq_len", "device", "threads"}.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).to(device)

    plain = load()
    ids = torch.randint(0, plain.config.vocab_size, (rows, seq_len))
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)
    positions = torch.arange(seq_len).expand(rows, -1)
    batch = Batch(ids, labels, positions, torch.ones_like(ids, dtype=torch.int32), tuple(range(rows))).to(device)

    aligned = HybridModel.from_teacher(load(), StudentSpec()).to(device)
    power, _ = teacher_power(aligned, [batch])
    aligned.set_trainable(["mixer"])
    distilled = HybridModel.from_teacher(load(), StudentSpec()).to(device)
    distilled.set_trainable(["mixer", "mlp", "norms", "embed", "head"])
    distilled.release_teacher()
    align, distil = AlignStep(power), DistilStep(SeparateTeacher(load()))

    kinds = {
        "finetune": _stepper(plain, lambda: plain(input_ids=batch.input_ids, labels=batch.input_ids).loss),
        "align": _stepper(aligned, lambda: align(aligned, batch)[0] / batch.num_tokens),
        "distil": _stepper(distilled, lambda: distil(distilled, batch)[0] / batch.num_targets),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(repeats + 1):
        for name, step in kinds.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    speed = {name: rows * seq_len / statistics.median(values) for name, values in times.items()}
    ratios = {f"{name}_ratio": speed[name] / speed["finetune"] for name in ("align", "distil")}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return speed | ratios | {"rows": rows, "seq_len": seq_len, "device": where, "threads": torch.get_num_threads()}


def _stepper(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)  # as the training engines do

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `rwkvinside bench training`."""
    parser.add_argument("--teacher", required=True, help="local directory or hub id")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch (default 8)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per row (default 512)")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each kind (default 5)")
    parser.add_argument("--json", type=Path, help="write the numbers here")


def main(args: argparse.Namespace) -> int:
    """Measure, print a table, write JSON."""
    result = training_speed(args.teacher, rows=args.rows, seq_len=args.seq_len, repeats=args.repeats)
    table = Table(title=f"one step of {args.rows} x {args.seq_len} tokens, fp32, {result['device']}")
    for column in ("", "tokens/s", "of fine-tuning"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("finetune", "align", "distil"):
        table.add_row(name, f"{result[name]:,.0f}", f"{result[name] / result['finetune']:.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0
