"""`rwkvinside demo`: text -> teacher -> calibrate, align, distill -> export, verify -> evaluate, generate, time.

Needs no network and no GPU. Everything is done by the functions that `train_distill.py`, `convert_checkpoint.py` and
`rwkvinside eval` use; only the teacher is trained by the demo's own loop.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

from ..config.load import load_config
from ..conversion import run as build
from ..data.rows import PaddedDocuments
from ..errors import UserError
from ..evaluate.compare import evaluate, read_documents
from ..evaluate.decode_speed import decode_speed
from ..evaluate.load import load_pretrained, load_run
from ..evaluate.quality import Evaluation
from ..export.huggingface import export_hf
from ..report.facts import EVALUATION
from ..report.write import write_report
from ..support.files import write_json
from ..support.progress import Progress
from ..support.text import rounded_count
from .corpus import collect
from .steps import Steps
from .tables import show_samples, show_scores, show_speed
from .teacher import TeacherSettings, obtain_teacher

STAGES = ("calibrate", "align", "distill")


TEMPERATURE = 0.7


ABOUT_STAGES = (
    "Attention becomes RWKV-7: calibrate computes a start, align lets each layer\n"
    "imitate its attention, distill lets the whole model predict as the teacher does."
)
PROMPT = '''def read_lines(path, encoding="utf-8"):
    """Return a list with the lines of the file"""
'''


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo: what is trained, on how much, and what is measured."""

    teacher: TeacherSettings = TeacherSettings()
    overrides: tuple[str, ...] = (
        "stages.calibrate.tokens=8k",
        "stages.align.tokens=250k",
        "stages.align.data.seq_len=256",
        "stages.align.evaluate_every_tokens=125k",
        "stages.distill.tokens=250k",
        "stages.distill.data.seq_len=512",
        "stages.distill.evaluate_every_tokens=125k",
        "data.val_tokens=10k",
        "checkpoint.keep=1",
    )
    evaluated_documents: int = 64
    max_length: int = 512
    contexts: tuple[int, ...] = (512, 4096)
    new_tokens: int = 64
    sample_tokens: int = 160


FULL = DemoSettings()


# Takes seconds instead of minutes; the teacher has learned next to nothing.
QUICK = DemoSettings(
    teacher=TeacherSettings(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, tokens=40_000),
    overrides=(
        "stages.calibrate.tokens=4k",
        "stages.align.tokens=24k",
        "stages.align.data.seq_len=128",
        "stages.align.batch.tokens=2048",
        "stages.align.optim.lr=2e-3",  # the default suits a stage of hundreds of steps
        "stages.distill.tokens=24k",
        "stages.distill.data.seq_len=128",
        "stages.distill.batch.tokens=2048",
        "data.val_tokens=2k",
    ),
    max_length=128,
    contexts=(64, 256),
    new_tokens=8,
    sample_tokens=24,
)


class Demo:
    """One run of the demo in one folder; `run` does everything."""

    def __init__(self, out: Path, settings: DemoSettings, console: Console):
        self.out, self.settings, self.console = out, settings, console
        self.teacher_folder, self.run_folder, self.student_folder = out / "teacher", out / "run", out / "student"
        self.steps = Steps(console)

    def run(self) -> dict:
        """Run all steps in order; return what was measured, also written to demo.json."""
        self._claim_folder()
        train, val = self._prepare()
        self._convert(train, val)
        with self.steps.step("export and verify", "The student for transformers, compared with what was trained."):
            self._export()
        tokenizer = AutoTokenizer.from_pretrained(self.teacher_folder)
        teacher = load_pretrained(self.teacher_folder, "cpu")
        student = load_pretrained(self.student_folder, "cpu", trust_remote_code=True)
        models = {"teacher": teacher, "student": student}
        with self.steps.step("evaluate", "After each stage: how close the student is on texts that it has not read."):
            limits = self.settings.max_length, self.settings.evaluated_documents
            documents = read_documents([str(val)], tokenizer, self.out / "cache", *limits)
            evaluations = self._evaluate(student, teacher, documents)
            stages = {stage: evaluation.scores for stage, evaluation in evaluations.items()}
            control = evaluations[STAGES[-1]].control
        with self.steps.step("generate", "Both continue the same beginning."):
            samples = {name: self._sample(model, tokenizer) for name, model in models.items()}
        count = self.settings.new_tokens
        bar = Progress("decode speed", count, unit="tokens", stream=self.console.file)
        with self.steps.step("decode speed", "Time of a token after short and long contexts."), bar as shown:
            speed = decode_speed(models, self.settings.contexts, new_tokens=count, progress=shown.advance)
        show_samples(self.console, samples, f"temperature {TEMPERATURE}, same seed")
        show_scores(self.console, stages, control)
        show_speed(self.console, speed)
        result = {
            "stages": {name: scores.to_dict() for name, scores in stages.items()},
            **({} if control is None else {"control": control.to_dict()}),
            "decode_speed": [asdict(row) for row in speed],
            "seconds": self.steps.seconds,
        }
        write_json(self.out / "demo.json", result)
        write_json(self.run_folder / EVALUATION, evaluations[STAGES[-1]].to_dict())
        page, *_ = write_report(self.run_folder)
        self._show_files(page)
        return result

    def _claim_folder(self) -> None:
        """Make the folder, or make room in the one of an earlier demo; its teacher stays."""
        mark = self.out / ".rwkvinside-demo"
        if self.out.exists() and not mark.is_file() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} is not empty and not the folder of a demo", "choose another folder with --out")
        self.out.mkdir(parents=True, exist_ok=True)
        mark.touch()
        for folder in (self.run_folder, self.student_folder):
            if folder.exists():
                shutil.rmtree(folder)

    def _prepare(self) -> tuple[Path, Path]:
        with self.steps.step("text", "What teacher and student read: Python's own sources and documentation."):
            corpus = collect()
            files = corpus.write(self.out / "text")
            counts = f"{len(corpus.train):,} documents to train, {len(corpus.val):,} to validate"
            size = rounded_count(sum(map(len, corpus.train + corpus.val)))
            self.console.print(f"the standard library of this machine: {size} characters, {counts}")
        with self.steps.step("teacher", "A small transformer, trained from nothing: the model that is converted."):
            settings = self.settings.teacher
            with Progress("teacher", settings.steps, unit="steps", stream=self.console.file) as progress:
                trained = obtain_teacher(
                    self.teacher_folder, settings, corpus, lambda step, loss: progress.update(step, f"loss {loss:.3f}")
                )
            if trained:
                self.console.print(f"trained a Qwen3 of {settings.num_layers} layers, saved in {self.teacher_folder}")
            else:
                self.console.print(f"using the teacher of the last demo: {self.teacher_folder}")
        return files

    def _convert(self, train: Path, val: Path) -> None:
        with self.steps.step("calibrate, align, distill", ABOUT_STAGES):
            config = load_config(
                teacher=str(self.teacher_folder),
                data=[str(train)],
                val=[str(val)],
                out=str(self.run_folder),
                overrides=["device=cpu", *self.settings.overrides, f"data.cache_dir={self.out / 'cache'}"],
            )
            build.train(config)

    def _export(self) -> None:
        write_report(self.run_folder)  # the export copies report.png
        report = export_hf(self.run_folder, self.student_folder)
        self.console.print(f"{self.student_folder}: {report['parameters']:,} parameters, reloaded and compared")

    def _evaluate(
        self, student: PreTrainedModel, teacher: PreTrainedModel, documents: PaddedDocuments
    ) -> dict[str, Evaluation]:
        evaluations = {}
        for stage in STAGES:
            model = student if stage == STAGES[-1] else load_run(self.run_folder, "cpu", stage)
            evaluations[stage] = evaluate(model, teacher, documents, self.console)
        return evaluations

    def _sample(self, model: PreTrainedModel, tokenizer) -> str:
        inputs = tokenizer(PROMPT, return_tensors="pt")
        torch.manual_seed(0)
        ids = model.generate(
            **inputs,
            max_new_tokens=self.settings.sample_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=0.9,
            pad_token_id=tokenizer.pad_token_id,
        )
        return tokenizer.decode(ids[0], skip_special_tokens=True)

    def _show_files(self, page: Path) -> None:
        self.console.print(f"\nstudent: {self.student_folder} (transformers, trust_remote_code=True)")
        talk = f"rwkvinside chat {self.run_folder} --teacher {self.teacher_folder}"
        self.console.print(f"talk to both: {talk}", soft_wrap=True)
        self.console.print(f"numbers: {self.out}/demo.json")
        self.console.print(f"{self.steps.minutes:.1f} minutes in all")
        self.console.print(f"report: {page.resolve()}", soft_wrap=True)
