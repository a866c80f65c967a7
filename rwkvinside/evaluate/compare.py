"""Compare a saved student with its teacher on documents: load both, read the texts, measure."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.rows import PaddedDocuments, document_batches
from ..data.settings import DataConfig
from ..data.sources import check_sources, read_options
from ..data.tokenize import ReadOptions, load_tokens
from ..errors import UserError
from ..export.manifest import CONVERSION, read_export
from ..runs.directory import RunDirectory
from ..runs.trained import open_run
from ..support.progress import Progress
from ..support.system import check_device
from ..teacher.sampling import end_tokens
from .controls import CutTeacher
from .generation import GenerationComparison, compare_generation
from .harness import Harness, HarnessResult, run_on_both
from .load import load_pretrained, load_student
from .quality import Evaluation, evaluate_models
from .recall import RecallPlan, RecallReport, recall_models, recall_of_models, recall_texts
from .samples import Prompts, Samples, say

LOGITS = 2**28  # elements of a batch's logits (1 GiB in fp32), for each of the two models
OF_TEACHER = ("kl", "ce_teacher", "agreement", "perplexity_teacher")  # scores that a model alone does not have
LONGEST = 4096  # tokens of a document that are evaluated unless more are asked for


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-evaluation-harness; arguments of `harness.Harness`."""

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Writing:
    """Texts that both models write greedily.

    Attributes:
        prompts: the beginnings of so many documents.
        max_tokens: written after each, at most.
        prompt_tokens: of a beginning.
    """

    prompts: int
    max_tokens: int = 128
    prompt_tokens: int = 32


@dataclass(frozen=True)
class Measures:
    """What is measured.

    Attributes:
        data: files or directories, see `DocumentReader`: compared token by token, hide the needle of `recall`, begin
            the texts of `writing`.
        max_documents: the first so many of `data` are compared; None: all.
        max_length: tokens of a document that are compared, at most; None is 4096, or the teacher's longest context
            where that is shorter.
        reading: fields of `ReadOptions` for `data`; those of the run hold for others, for an export the usual ones.
        recall: lengths and depths of recall, None: not measured.
        writing: None: not measured.
        tasks: None: not measured.
        prompts: what both models are to say something about; None: nothing.
    """

    data: tuple[str, ...] = ()
    max_documents: int | None = None
    max_length: int | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    recall: RecallPlan | None = None
    writing: Writing | None = None
    tasks: Tasks | None = None
    prompts: Prompts | None = None


@dataclass(frozen=True)
class Comparison:
    """What was measured, with its models and data.

    Attributes:
        student: name of the directory.
        teacher: of its directory, or the hub id; None: the student was measured alone.
        data: names of the files.
        max_length: tokens of a document that are evaluated, at most.
        truncated_documents: how many documents are longer.
        evaluation, recall, writing, tasks, samples: the results; None: not measured.
    """

    student: str
    teacher: str | None
    data: list[str]
    max_length: int = 0
    truncated_documents: int = 0
    evaluation: Evaluation | None = None
    recall: RecallReport | None = None
    writing: GenerationComparison | None = None
    tasks: HarnessResult | None = None
    samples: Samples | None = None

    def to_dict(self) -> dict:
        """Return plain JSON: what was compared, `Evaluation.to_dict`, and the other results under their names.

        Without a teacher there are the student's own scores alone.
        """
        found: dict = {"student": self.student, "teacher": self.teacher, "data": self.data}
        if self.evaluation is not None:
            found |= {"max_length": self.max_length, "truncated_documents": self.truncated_documents}
            scores = self.evaluation.to_dict()
            if self.teacher is None:
                for row in (scores, *scores["by_position"]):
                    for name in OF_TEACHER:
                        del row[name]
            found |= scores
        for name in ("recall", "writing", "tasks", "samples"):
            if (result := getattr(self, name)) is not None:
                found[name] = result.to_dict()
        return found


def evaluate_saved(
    student: str | Path,
    teacher: str | Path | None,
    measures: Measures,
    *,
    device: str = "auto",
    notes: Console | None = None,
) -> Comparison:
    """Compare an exported model, or a run as its export would be, with its teacher.

    Args:
        student: exported directory, whose model code is run, or run directory.
        teacher: directory or hub id; None is the one that the run names. A model that was trained from nothing has none
            and is measured alone; so are recall and tasks of an export.
        measures: what.
        device: "auto" (the first GPU if there is one), "cpu" or "cuda".
        notes: console for what is being loaded, and for progress; None is silent.

    Raises:
        UserError: nothing to measure, a directory that is neither a model nor a run, no teacher, data that cannot be
            read, tasks that cannot be run, a question to a model without a chat template.
    """
    student, notes = Path(student), notes or Console(quiet=True)
    _check_measures(measures)
    harness = None
    if (tasks := measures.tasks) is not None:
        harness = Harness(tasks.names, folder=tasks.folder, limit=tasks.limit, cache=tasks.cache)
    source: str | Path | None = teacher
    if teacher is None:
        teacher, source = _named_teacher(student, needed=bool(measures.data))
    if teacher is None and measures.writing is not None:
        raise UserError("what a model writes is compared with a teacher's, and none is given", "give one: --teacher")
    device = _resolved(device)
    student_model = load_student(student, device, notes)
    teacher_model = None if teacher is None else load_pretrained(teacher, device)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=source == student)
    if measures.prompts is not None and measures.prompts.question is not None and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template to ask in", "use --begin, or leave out --ask")
    names = [Path(source).name for source in measures.data]
    found = Comparison(student.name, None if teacher is None else Path(teacher).name, names)
    haystack: list[int] = []
    if measures.data:
        options = replace(_options_of(student), **measures.reading)
        models = (student_model, student_model if teacher_model is None else teacher_model)
        found, haystack = _on_documents(found, measures, models, tokenizer, options, notes)
    if measures.recall is not None:
        texts = recall_texts(tokenizer, measures.recall, haystack)
        total = sum(map(len, texts.values())) * len(recall_models(student_model, teacher_model))
        with _progress("recall", total, "texts", notes) as advance:
            found = replace(found, recall=recall_of_models(student_model, teacher_model, texts, advance))
    if harness is not None:
        found = replace(found, tasks=run_on_both(harness, student_model, teacher_model, tokenizer))
    if (prompts := measures.prompts) is not None:
        models = {"teacher": teacher_model, "student": student_model}
        said = {name: say(model, tokenizer, prompts) for name, model in models.items() if model is not None}
        found = replace(found, samples=Samples(prompts, said))
    return found


def _check_measures(measures: Measures) -> None:
    """Refuse what cannot be measured, before models are loaded."""
    if measures.writing is not None and not measures.data:
        raise UserError("texts are written from the beginnings of documents", "give them with --data FILE")
    if not (measures.data or measures.recall or measures.tasks or measures.prompts):
        raise UserError("there is nothing to measure", "give --data FILE, --recall, --tasks NAME or --begin TEXT")
    check_sources(measures.data)


def _on_documents(
    found: Comparison,
    measures: Measures,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    options: ReadOptions,
    notes: Console,
) -> tuple[Comparison, list[int]]:
    """Return the comparison with what documents are needed for, and tokens to hide a needle in.

    Args:
        found: so far.
        measures: with data.
        models: student and teacher.
        tokenizer: the teacher's.
        options: how the data is read.
        notes: for progress.
    """
    student, teacher = models
    max_length = measures.max_length or min(LONGEST, teacher.config.max_position_embeddings)
    haystack: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        documents = read_documents(
            list(measures.data), tokenizer, Path(folder), max_length, measures.max_documents, options
        )
        found = replace(
            found,
            max_length=documents.seq_len,
            truncated_documents=documents.num_truncated,
            evaluation=evaluate(student, teacher, documents, notes),
        )
        if measures.recall is not None:
            haystack = _first_tokens(documents, max(measures.recall.lengths))
        if (writing := measures.writing) is not None:
            prompts, end = _beginnings(documents, writing), end_tokens(tokenizer, teacher)
            with _progress("writing", len(prompts), "texts", notes) as advance:
                written = compare_generation(student, teacher, prompts, end, writing.max_tokens, advance)
            found = replace(found, writing=written)
    return found, haystack


@contextmanager
def _progress(title: str, total: int, unit: str, notes: Console) -> Iterator[Callable[..., None] | None]:
    """Show progress on a console that is not quiet; yield what advances it."""
    if notes.quiet:
        yield None
        return
    with Progress(title, total, unit=unit, stream=notes.file) as progress:
        yield progress.advance


def _first_tokens(documents: PaddedDocuments, count: int) -> list[int]:
    """Return the first tokens of all documents in a row."""
    ids: list[int] = []
    for i in range(len(documents)):
        if len(ids) >= count:
            break
        ids += documents.tokens.piece(i, 0, count)[0].tolist()
    return ids[:count]


def _beginnings(documents: PaddedDocuments, writing: Writing) -> list[list[int]]:
    """Return the beginnings of the first documents that are longer."""
    found: list[list[int]] = []
    for i in range(len(documents)):
        ids = documents.tokens.piece(i, 0, writing.prompt_tokens + 1)[0].tolist()
        if len(ids) > writing.prompt_tokens:
            found.append(ids[:-1])
        if len(found) == writing.prompts:
            return found
    raise UserError(
        f"{writing.prompts} texts are to be written, but only {len(found)} documents have more than "
        f"{writing.prompt_tokens} tokens",
        "write fewer texts, or give more data",
    )


def _resolved(device: str) -> str:
    """Return where models run: what "auto" means on this machine."""
    check_device(device)
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _named_teacher(path: Path, needed: bool) -> tuple[str | None, str | Path]:
    """Return the teacher of a run, and where the tokenizer is.

    The teacher is None for a model that was trained from nothing, and for an export where none is needed.
    """
    if RunDirectory(path).is_run:
        run = open_run(path)
        return (None, run.teacher_files()) if run.teacher is None else (run.teacher, run.teacher)
    if not needed or (path / CONVERSION).is_file() and read_export(path)["teacher"] is None:
        return None, path
    raise UserError(
        "no teacher is given", "name the original model's directory or hub id: --teacher DIR, or teacher=DIR in Python"
    )


def _options_of(student: Path) -> ReadOptions:
    """Return how the data of a run is read."""
    if not RunDirectory(student).is_run:
        return ReadOptions()
    return read_options(DataConfig.model_validate(open_run(student).config.get("data") or {}))


def read_documents(
    sources: list[str],
    tokenizer,
    cache_dir: Path,
    max_length: int,
    max_documents: int | None = None,
    options: ReadOptions | None = None,
) -> PaddedDocuments:
    """Return documents, one per row; `cache_dir` must exist as long as they are used."""
    store = load_tokens(sources, tokenizer, options, cache_dir=cache_dir)
    if max_documents is not None:
        store = store.select(np.arange(min(max_documents, store.num_documents)))
    return PaddedDocuments(store, max_length)


def evaluate(
    student: PreTrainedModel, teacher: PreTrainedModel, documents: PaddedDocuments, notes: Console
) -> Evaluation:
    """Run `evaluate_models`, with the control of a windowed student, and show its progress on `notes`."""
    batches = document_batches(documents, batch_tokens=min(8192, max(1, LOGITS // teacher.config.vocab_size)))
    cut = CutTeacher.of(student, teacher)
    control = None if cut is None else cut.logits
    with _progress("evaluating", len(documents), "documents", notes) as advance:
        return evaluate_models(student, teacher, batches, control=control, progress=advance)
