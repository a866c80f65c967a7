"""`make demo-llm`: a published language model becomes a student with a window, in minutes on a CPU.

Everything is done by the functions that `rwkvinside train`, `data generate` and `eval` use. So short a training shows
that all of it works on a real model, and which way the numbers go; it does not make a good student.
"""

from __future__ import annotations

import json
import random
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ..config.load import load_config
from ..config.schema import Config
from ..conversion import run as build
from ..conversion.generate import generate_text
from ..errors import UserError
from ..evaluate.load import load_pretrained, load_run
from ..evaluate.samples import Prompts, Samples, say, show_samples
from ..report.write import write_report
from ..runs.directory import RunDirectory
from ..runs.metrics_file import of_kind, read_metrics
from ..support.files import write_json, write_text
from ..teacher.load import open_tokenizer
from ..teacher.sampling import Sampling
from .run import STAGES
from .steps import Steps
from .tables import show_stages

QUESTION = "What is the capital of France, and what is it known for?"
BEGINNING = "The water cycle begins when the sun heats the ocean, and"


@dataclass(frozen=True)
class LlmSettings:
    """Size of the demo.

    Attributes:
        text_tokens: that the teacher writes where no data is given.
        text: how it writes.
        val_share: part of that text that is kept to validate on.
        overrides: of the configuration, before the user's.
        sample_tokens: of each answer and continuation.
    """

    text_tokens: int = 12_000
    text: Sampling = Sampling(temperature=0.7, max_tokens=256, rows=16)  # a top_p would sort the vocabulary per token
    val_share: float = 0.1
    overrides: tuple[str, ...] = (
        "student.attention_layers={every: 3}",  # more than halves the distance of so short a training
        "run=[calibrate,distill]",  # before it begins, align runs the teacher on 16K tokens: too long for minutes
        "stages.calibrate.tokens=4k",
        "stages.calibrate.data.seq_len=512",  # conversations are short
        "stages.calibrate.batch.tokens=4096",
        "stages.distill.tokens=8k",
        "stages.distill.train=[mixer]",  # in 4 GB instead of 7; so short a training changes little else
        "stages.distill.data.seq_len=512",
        "stages.distill.batch.tokens=1024",
        "data.val_tokens=4k",
        "checkpoint.keep=1",
        "checkpoint.every_steps=1000",
        "log_every=2",
    )
    sample_tokens: int = 48


FULL = LlmSettings()

# Little enough for a teacher of any width to finish in seconds or minutes.
QUICK = LlmSettings(
    text_tokens=500,
    text=Sampling(max_tokens=24, rows=16),
    overrides=(
        *(f"stages.{stage}.tokens=256" for stage in STAGES),
        *(f"stages.{stage}.data.seq_len=64" for stage in STAGES),
        *(f"stages.{stage}.batch.tokens=128" for stage in STAGES),
        "data.val_tokens=256",
    ),
    sample_tokens=8,
)


class LlmDemo:
    """One run in one folder; `run` does everything.

    Args:
        out: folder for everything.
        teacher: preset, directory or hub id.
        data: texts to train and validate on; none: the teacher writes some.
        overrides: `key=value` of the configuration, over the demo's own.
        settings: size of the demo.
        console: where it is shown.
    """

    def __init__(
        self,
        out: Path,
        teacher: str,
        data: Sequence[str],
        overrides: Sequence[str],
        settings: LlmSettings,
        console: Console,
    ):
        self.out, self.teacher, self.data, self.settings, self.console = out, teacher, data, settings, console
        self.overrides = overrides
        self.run_folder = out / "run"
        self.prompts = Prompts(QUESTION, BEGINNING, settings.sample_tokens)
        self.steps = Steps(console)

    def run(self) -> dict:
        """Run all steps in order; return what was measured, also written to demo.json."""
        config = self._config(self.data or [str(self.out / "train.jsonl")])  # what is wrong with it shows at once
        self._claim_folder()
        train, val = ([*self.data], []) if self.data else self._write_text()
        config = self._config(train, val)
        mixers = f"a window of {config.student.window} tokens and the first {config.student.sinks}"
        mixers += ", where it is not kept" if config.student.attention_layers != () else ""
        with self.steps.step(
            " -> ".join(config.run), f"{config.teacher.path}: attention becomes RWKV-7 with {mixers}."
        ):
            build.train(config)
        with self.steps.step("an answer and a continuation", "The teacher, the start, and the student at the end."):
            turns = self._turns(config)
        stages = self._scores()
        show_samples(Samples(self.prompts, turns), self.console)
        show_stages(self.console, stages)
        result = {"teacher": config.teacher.path, "scores": stages, "samples": turns, "seconds": self.steps.seconds}
        write_json(self.out / "demo.json", result)
        self.console.print(f"\nexport it: rwkvinside export {self.run_folder} --to hf --out DIR", soft_wrap=True)
        self.console.print(f"numbers: {self.out}/demo.json; {self.steps.minutes:.1f} minutes in all")
        page, *_ = write_report(self.run_folder)
        self.console.print(f"report: {page.resolve()}", soft_wrap=True)
        return result

    def _config(self, train: Sequence[str], val: Sequence[str] = ()) -> Config:
        return load_config(
            teacher=self.teacher,
            recipe="windowed",
            data=train,
            val=val,
            out=str(self.run_folder),
            overrides=[
                *self.settings.overrides,
                "device=cpu",
                f"precision={_precision()}",
                f"data.cache_dir={self.out / 'cache'}",
                *self.overrides,
            ],
        )

    def _claim_folder(self) -> None:
        """Make the folder, or make room in the one of an earlier demo; the text that its teacher wrote stays."""
        mark = self.out / ".rwkvinside-demo"
        if self.out.exists() and not mark.is_file() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} is not empty and not the folder of a demo", "choose another folder with --out")
        self.out.mkdir(parents=True, exist_ok=True)
        mark.touch()
        if self.run_folder.exists():
            shutil.rmtree(self.run_folder)

    def _write_text(self) -> tuple[list[str], list[str]]:
        """Let the teacher write, unless it has; return the files to train and to validate on."""
        name = Path(self.teacher).resolve().name if Path(self.teacher).exists() else self.teacher.replace("/", "--")
        text = self.out / f"text-of-{name}.jsonl"
        with self.steps.step(
            "the teacher writes", "Text to train on, as there is no other: what the model writes itself."
        ):
            if text.exists():
                self.console.print(f"using what it wrote for the last demo: {text}")
            else:
                self.console.print(f"{self.settings.text_tokens:,} tokens, {self.settings.text.rows} texts at a time")
                generate_text(self.teacher, text, self.settings.text_tokens, self.settings.text, device="cpu")
            lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
            random.Random(0).shuffle(lines)
            count = max(1, round(self.settings.val_share * len(lines)))
            parts = {"val": lines[:count], "train": lines[count:]}
            for part, content in parts.items():
                write_text(self.out / f"{part}.jsonl", "".join(content))
            self.console.print(f"{len(parts['train'])} documents to train, {count} to validate; one of them:")
            self.console.print(_shown(json.loads(lines[0])), markup=False, highlight=False, style="dim")
        return [str(self.out / "train.jsonl")], [str(self.out / "val.jsonl")]

    def _turns(self, config: Config) -> dict[str, dict[str, str]]:
        """Return {model: {"answer": ..., "continuation": ...}} of the teacher, the first and the last stage."""
        tokenizer = open_tokenizer(config.teacher)
        turns = {"teacher": say(load_pretrained(config.teacher.path, "cpu"), tokenizer, self.prompts)}
        for stage in dict.fromkeys((config.run[0], config.run[-1])):
            turns[f"after {stage}"] = say(load_run(self.run_folder, "cpu", stage), tokenizer, self.prompts)
        return turns

    def _scores(self) -> dict[str, dict]:
        """Return {name: {"tokens", "kl", "ce", "agreement"}}: the teacher, its control, the student stage by stage."""
        directory = RunDirectory(self.run_folder)
        rows = read_metrics(directory.metrics)
        stages: dict[str, dict] = {}
        trained = 0
        evaluations = of_kind(rows, "eval")
        for stage in directory.finished():
            last = [row for row in evaluations if row["stage"] == stage][-1]
            stages.setdefault("teacher", {"tokens": 0, "kl": 0.0, "ce": last["ce_teacher"], "agreement": 1.0})
            if control := of_kind(rows, "control"):
                stages.setdefault("teacher cut to the window", {"tokens": 0} | _numbers(control[-1]))
            trained += last["tokens"] if of_kind(rows, "train", stage) else 0
            stages[f"after {stage}"] = {"tokens": trained} | _numbers(last)
        return stages


def _precision() -> str:
    """Return "bf16" where the CPU multiplies in it, several times as fast as in fp32."""
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def _shown(record: dict) -> str:
    """Return the beginning of a text, or of each turn of a conversation."""
    turns = [(turn["role"], turn["content"]) for turn in record.get("messages", ())] or [("text", record["text"])]
    return "\n".join(f"  {who}: {textwrap.shorten(what, 200, placeholder=' ...')}" for who, what in turns)


def _numbers(row: dict) -> dict:
    return {name: row[name] for name in ("kl", "ce", "agreement")}
