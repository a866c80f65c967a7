"""Published tasks through lm-evaluation-harness, which is an extra: `pip install "lm-eval"`.

The harness makes prompts, scores and their standard errors; here are what it does not have: chance, how much of the
teacher's distance from chance a student keeps, the answers' places, and how long generated answers are.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..support.text import did_you_mean

CHOICES = "multiple_choice"
GENERATED = "generate_until"


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task.

    Attributes:
        task, metric: the harness's names.
        examples: how many.
        value: of the model.
        stderr: of `value`; None where the harness has none.
        chance: what a guess scores; None where the metric has no chance (perplexities).
        teacher: the teacher's value, None without one.
        relative: (value - chance) / (teacher - chance); None without teacher or chance, or where it is at chance.
    """

    task: str
    metric: str
    examples: int
    value: float
    stderr: float | None
    chance: float | None
    teacher: float | None = None
    relative: float | None = None

    def against(self, teacher: TaskScore | None) -> TaskScore:
        """Return the score next to its teacher's."""
        if teacher is None:
            return self
        relative = None
        if self.chance is not None and teacher.value != self.chance:
            relative = (self.value - self.chance) / (teacher.value - self.chance)
        return replace(self, teacher=teacher.value, relative=relative)


@dataclass(frozen=True)
class Answers:
    """What answers of a model look like, where a score does not say it.

    Attributes:
        task: the harness's name.
        letters: how often each choice was taken, A first; () for tasks without choices.
        right_letters: how often each choice is the right one.
        mean_length: characters of generated answers; None for tasks without.
        no_end: share of generated answers that reached the limit of tokens without ending; None for tasks without.
    """

    task: str
    letters: tuple[int, ...] = ()
    right_letters: tuple[int, ...] = ()
    mean_length: float | None = None
    no_end: float | None = None


@dataclass(frozen=True)
class HarnessResult:
    """Scores and answers of a model; `teacher_answers` are () without a teacher."""

    scores: tuple[TaskScore, ...]
    answers: tuple[Answers, ...]
    teacher_answers: tuple[Answers, ...] = ()

    def to_dict(self) -> dict:
        """Return plain JSON."""
        return asdict(self)


class Harness:
    """Tasks of the harness that are to be run on models.

    Args:
        tasks: names, of tasks or groups.
        folder: of YAML files that define more tasks.
        limit: examples of a task at most.
        cache: folder where the models' answers are kept, so that a teacher's are computed once; None: nowhere.

    Raises:
        UserError: the harness is not installed, or does not have a task.
    """

    def __init__(
        self, tasks: Sequence[str], *, folder: Path | None = None, limit: int | None = None, cache: Path | None = None
    ):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(f"tasks need lm-evaluation-harness: {error}", "pip install lm-eval") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is not a folder", "name the folder with the YAML files of tasks")
        self.tasks, self.limit, self.cache = list(tasks), limit, cache
        self.manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
        if not set(self.tasks) <= set(self.manager.all_tasks):  # reading the harness's own takes seconds
            self.manager = TaskManager(include_path=None if folder is None else str(folder))
        known = set(self.manager.all_tasks)
        for task in self.tasks:
            if task not in known:
                raise UserError(
                    f"lm-evaluation-harness has no task {task!r}{did_you_mean(task, sorted(known))}",
                    "its list: lm-eval ls tasks; add your own with --task-dir DIR",
                )

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
    ) -> tuple[list[TaskScore], list[Answers]]:
        """Return what a model scores, and its answers.

        Args:
            model: in evaluation mode.
            tokenizer: the model's.
            batch_size: rows of a forward.

        Raises:
            UserError: a task cannot be loaded, as without a network.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        cache = None
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)
            cache = str(self.cache / weights_digest(model)[:16])
        try:
            results: Any = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=self.tasks,
                task_manager=self.manager,
                limit=self.limit,
                use_cache=cache,
                log_samples=True,
            )
        except (OSError, ConnectionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"the tasks {', '.join(self.tasks)} cannot be run: {reason}", "check the network"
            ) from error
        scores, answers = [], []
        for task, samples in results["samples"].items():
            kind = results["configs"][task]["output_type"]
            scores += task_scores(results["results"][task], samples, task, kind)
            found = answers_of(samples, task, kind, lambda text: len(tokenizer(text)["input_ids"]))
            answers += [] if found is None else [found]
        return scores, answers


def run_on_both(
    harness: Harness, student: PreTrainedModel, teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> HarnessResult:
    """Return what a student scores, next to its teacher if there is one."""
    scores, answers = harness.run(student, tokenizer)
    if teacher is None:
        return HarnessResult(tuple(scores), tuple(answers))
    teacher_scores, teacher_answers = harness.run(teacher, tokenizer)
    return HarnessResult(relative_scores(scores, teacher_scores), tuple(answers), tuple(teacher_answers))


def weights_digest(model: PreTrainedModel) -> str:
    """Return a SHA-256 of a model's weights and their names, the same wherever the model lies."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def relative_scores(student: Sequence[TaskScore], teacher: Sequence[TaskScore]) -> tuple[TaskScore, ...]:
    """Return a student's scores next to its teacher's."""
    by_name = {(score.task, score.metric): score for score in teacher}
    return tuple(score.against(by_name.get((score.task, score.metric))) for score in student)


def task_scores(results: Mapping[str, Any], samples: Sequence[dict], task: str, kind: str) -> list[TaskScore]:
    """Return the scores of a task's result from the harness.

    Args:
        results: "metric,filter" -> value, with "metric_stderr,filter".
        samples: the examples with their requests and answers.
        task: its name.
        kind: the harness's output_type.
    """
    scores = []
    for name, value in results.items():
        metric, comma, filter_name = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results.get(f"{metric}_stderr,{filter_name}")
        scores.append(
            TaskScore(
                task=task,
                metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                examples=len({sample["doc_id"] for sample in samples}),
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                chance=_chance(metric, samples, kind),
            )
        )
    return scores


def _chance(metric: str, samples: Sequence[dict], kind: str) -> float | None:
    """Return what a guess scores: one of an example's choices; 0 for accuracies and matches of free answers."""
    if not metric.startswith(("acc", "exact_match", "f1")):
        return None
    if kind != CHOICES or not metric.startswith("acc"):
        return 0.0
    return sum(1 / len(sample["filtered_resps"]) for sample in samples) / len(samples)


def answers_of(samples: Sequence[dict], task: str, kind: str, tokens_of: Any) -> Answers | None:
    """Return what a task's answers look like.

    Args:
        samples, task, kind: as of `task_scores`.
        tokens_of: text -> number of tokens.

    Returns:
        None for tasks that are neither choices nor generated.
    """
    if kind == CHOICES:
        taken, right = Counter[int](), Counter[int]()
        for sample in samples:
            likelihoods = [answer[0] for answer in sample["filtered_resps"]]
            taken[max(range(len(likelihoods)), key=likelihoods.__getitem__)] += 1
            if isinstance(sample["target"], int):
                right[sample["target"]] += 1
        width = max(*taken, *right, 0) + 1
        return Answers(task, tuple(taken[i] for i in range(width)), tuple(right[i] for i in range(width)))
    if kind != GENERATED:
        return None
    lengths, unended = [], 0
    for sample in samples:
        text, options = sample["resps"][0][0], sample["arguments"][0][1]
        lengths.append(len(text))
        limit = options.get("max_gen_toks")
        unended += limit is not None and tokens_of(text) >= limit
    return Answers(task, mean_length=sum(lengths) / len(lengths), no_end=unended / len(lengths))
