"""The commands that write something, what they write, and how to run each undisturbed or not."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from command_process import finish, start
from safetensors.torch import load_file
from tiny import byte_tokenizer, save_qwen3, save_texts

STAGES = ("calibrate", "align", "distill", "sft")
SMALL = [
    "run=[calibrate,align,distill,sft]",
    *(f"stages.{name}.tokens=384" for name in STAGES),
    *(f"stages.{name}.{field}" for name in STAGES for field in ("data.seq_len=32", "batch.tokens=128")),
    "checkpoint={every_steps: 1, keep: 9}",
    "device=cpu",
]
UNEQUAL = ("run", "seal", "after", "files", "time", "second", "date", "inode")  # in JSON: other runs, other clocks


@dataclass
class World:
    """A teacher, texts, and what each command makes of them undisturbed.

    Attributes:
        root: their folder.
        seconds: how long each command takes.
        results: what each command wrote, see `result`.
    """

    root: Path
    seconds: dict
    results: dict

    @property
    def finished(self):
        return self.root / "train"


def make_world(root):
    """Run every command once."""
    save_qwen3(root / "teacher", byte_tokenizer("<eos>", eos_token="<eos>"), eos_token_id=256)
    for name in ("train", "val"):
        save_texts(root / f"{name}.jsonl")
    world = World(root, {}, {})
    for name in COMMANDS:
        before = time.monotonic()
        log = root / f"{name}.log"
        code = finish(start(arguments(world, name, root / name), log))
        assert code == 0, log.read_text()
        world.seconds[name] = time.monotonic() - before
        world.results[name] = result(name, root / name)
    return world


def arguments(world, name, out, *more):
    """The command line of a command that writes to `out`."""
    root = world.root
    data = ["--data", root / "train.jsonl", "--val", root / "val.jsonl", f"data.cache_dir={out.parent / 'cache'}"]
    return {
        "train": ["train", "--teacher", root / "teacher", *data, "--out", out, *SMALL],
        "pack": ["data", "pack", root / "train.jsonl", "--teacher", root / "teacher", "--out", out],
        "logits": ["data", "logits", "--teacher", root / "teacher", *data, "--out", out, "--k", "4", *SMALL],
        "export": ["export", world.finished, "--out", out],
        "verify": ["verify", root / "export", "--against", world.finished],
        "eval": ["eval", world.finished, "--data", root / "val.jsonl", "--json", out, "--device", "cpu"],
    }[name] + list(more)


COMMANDS = ("train", "pack", "logits", "export", "verify", "eval")


def result(name, out):
    """What counts of a command's output: tensors as lists, JSON without clocks, all other files as bytes."""
    if name == "verify":
        return None
    if name == "eval":
        return json.loads(out.read_text())
    if name == "train":
        return {
            stage: {
                key: value.tolist()
                for file in sorted(last(out / "stages" / stage).glob("*.safetensors"))
                for key, value in load_file(file).items()
            }
            for stage in STAGES
        } | {"losses": [row["loss"] for row in rows(out) if row["kind"] == "train"]}
    names = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in names if path.suffix not in (".json", ".md")}


def last(stage):
    return sorted(stage.glob("step-*"))[-1]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def remove(out):
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)
