"""The commands that write something, what they write, and how to run each undisturbed or not."""

import json
import time

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


class World:
    """A teacher, texts, and what each command makes of them undisturbed, which is run when it is first asked for.

    Args:
        root: their folder.

    Attributes:
        root: the same.
    """

    def __init__(self, root):
        self.root = root
        self._done = {}
        save_qwen3(root / "teacher", byte_tokenizer("<eos>", eos_token="<eos>"), eos_token_id=256)
        for name, count in (("train", 400), ("val", 20)):
            save_texts(root / f"{name}.jsonl", count)

    def undisturbed(self, name):
        """The seconds that a command takes, and its `result`."""
        if name not in self._done:
            for needed in NEEDS.get(name, ()):
                self.undisturbed(needed)
            before, out, log = time.monotonic(), self.root / name, self.root / f"{name}.log"
            code = finish(start(arguments(self, name, out), log))
            assert code == 0, log.read_text()
            self._done[name] = time.monotonic() - before, result(name, out)
        return self._done[name]


def arguments(world, name, out, *more):
    """The command line of a command that writes to `out`."""
    root = world.root
    data = ["--data", root / "train.jsonl", "--val", root / "val.jsonl", f"data.cache_dir={out.parent / 'cache'}"]
    return {
        "train": ["train", "--teacher", root / "teacher", *data, "--out", out, *SMALL],
        "pack": ["data", "pack", root / "train.jsonl", "--teacher", root / "teacher", "--out", out],
        "logits": ["data", "logits", "--teacher", root / "teacher", *data, "--out", out, "--k", "4", *SMALL],
        "export": ["export", root / "train", "--out", out],
        "verify": ["verify", root / "export", "--against", root / "train"],
        "eval": ["eval", root / "train", "--data", root / "val.jsonl", "--json", out, "--device", "cpu"],
    }[name] + list(more)


NEEDS = {"export": ["train"], "verify": ["train", "export"], "eval": ["train"]}


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
