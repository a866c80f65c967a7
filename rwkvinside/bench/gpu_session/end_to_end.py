"""A whole conversion of a small random teacher, as `train_distill.py` runs it, on the GPU and on the CPU."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ...config.load import load_config
from ...conversion.run import train
from ...demo.tokenizer import train_tokenizer

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps", "until", "morning")
# Calibration is a run of its own: the few steps behind it raise this random teacher's loss, and all rounding with it.
RUNS = (("calibrate",), ("align", "distill"))
STEPS, ROWS, LENGTH = 4, 4, 64


def compare(device: str) -> dict:
    """Return how the losses of a conversion on a device differ from those on the CPU, and all of them.

    The differences are relative to the CPU's: the largest of all steps, of the divergences at the end of the stages
    that train, and that of the divergence after calibration, which is a run of its own.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _material(folder)
        runs = {"cpu": _losses(folder, "cpu", "fp32")}
        runs |= {f"{device} {precision}": _losses(folder, device, precision) for precision in ("fp32", "bf16")}
    expected = runs["cpu"]
    differences: dict[str, float] = {}
    for run, losses in runs.items():
        for what, values in losses.items() if run != "cpu" else ():
            kind = f"{run} {_kind(what)}"
            largest = max(abs(x - y) / abs(x) for x, y in zip(expected[what], values, strict=True))
            differences[kind] = max(largest, differences.get(kind, 0.0))
    return {**differences, "all": runs}


def _kind(what: str) -> str:
    if what.startswith("calibrate"):
        return "calibration"
    return "evaluations" if what.endswith("eval") else "losses"


def _material(folder: Path) -> None:
    """Write a teacher of four layers with heads of 64, and texts."""
    rng = random.Random(0)
    for name, count in (("train", 200), ("val", 6)):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(WORDS, 512)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")


def _losses(folder: Path, device: str, precision: str) -> dict[str, list[float]]:
    """Convert; return the losses of the stages that train by step, and the divergences of all by evaluation."""
    losses: dict[str, list[float]] = {}
    for stages in RUNS:
        out = folder / f"{device}-{precision}-{len(list(folder.iterdir()))}"
        sizes = {"tokens": STEPS * ROWS * LENGTH, "data.seq_len": LENGTH, "batch.tokens": ROWS * LENGTH}
        train(
            load_config(
                teacher=str(folder / "teacher"),
                data=[str(folder / "train.jsonl")],
                val=[str(folder / "val.jsonl")],
                out=str(out),
                overrides=[
                    f"run=[{','.join(stages)}]",
                    *(f"stages.{stage}.{name}={size}" for stage in stages for name, size in sizes.items()),
                    f"device={device}",
                    f"precision={precision}",
                    f"data.cache_dir={folder / 'cache'}",
                ],
            )
        )
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
            if row["kind"] == "train":
                losses.setdefault(row["stage"], []).append(row["loss"])
            elif row["kind"] == "eval":
                losses.setdefault(f"{row['stage']} eval", []).append(row["kl"])
    return losses
