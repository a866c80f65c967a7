"""Tables of `rwkvinside eval` for recall, generation and tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..evaluate.generation import GenerationComparison
    from ..evaluate.harness import Answers, HarnessResult
    from ..evaluate.recall import RecallReport

TITLES = {
    "passkey": "pass key: a number in filler, share of answers that greedy decoding writes",
    "needle": "needle: a number in documents, share of answers that greedy decoding writes",
    "pairs": "pairs: values of keys, share where the right one is the likeliest of the text's values",
}


def new_table(title: str | None) -> Table:
    """Return a table without columns."""
    return Table(
        title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )


def show_recall(report: RecallReport, console: Console) -> None:
    """Print a table for each task: models and lengths down, depths across."""
    for task, guess in report.chance.items():
        table = new_table(f"{TITLES[task]}; a guess: {guess:.1%}")
        found = {model: [s for s in scores if s.task == task] for model, scores in report.scores.items()}
        depths = sorted({score.depth for scores in found.values() for score in scores})
        for name in ("model", "tokens", "all", *(f"{depth:.0%}" for depth in depths)):
            table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
        for model, scores in found.items():
            lengths = sorted({score.length for score in scores})
            for length in lengths:
                row = {s.depth: s for s in scores if s.length == length}
                shown = {depth: s.exact if s.chosen is None else s.chosen for depth, s in row.items()}
                answers = sum(s.answers for s in row.values())
                mean = sum(shown[depth] * s.answers for depth, s in row.items()) / answers
                cells = (f"{shown[depth]:.0%}" if depth in shown else "" for depth in depths)
                table.add_row(model, f"{length:,}", f"{mean:.1%}", *cells, end_section=length == lengths[-1])
        console.print(table)
    if "control" in report.scores:
        console.print("control: the teacher, its attention cut to the student's windows")
    if "no recurrence" in report.scores:
        console.print("no recurrence: the student, whose recurrences give zero")


def show_writing(found: GenerationComparison, console: Console) -> None:
    """Print what two models wrote, in numbers."""
    table = new_table(f"{found.prompts} greedy texts of at most {found.max_tokens} tokens")
    for name in ("model", "mean tokens", "without end", "repeated 4-grams"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, text in (("student", found.student), ("teacher", found.teacher)):
        table.add_row(name, f"{text.mean_length:.1f}", f"{text.no_end:.0%}", f"{text.repetition:.1%}")
    console.print(table)
    console.print(
        f"the same for {found.same_tokens:.1f} tokens on average; {found.same_texts:.0%} of texts to their end"
    )


def show_tasks(result: HarnessResult, console: Console) -> None:
    """Print scores of tasks, and what the answers look like."""
    table = new_table("tasks of lm-evaluation-harness; relative: (student - chance) / (teacher - chance)")
    for name in ("task", "metric", "examples", "student", "teacher", "chance", "relative"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", no_wrap=True)
    for score in result.scores:
        stderr = "" if score.stderr is None else f" ± {score.stderr:.3f}"
        rest = ("" if value is None else f"{value:.3f}" for value in (score.teacher, score.chance))
        relative = "" if score.relative is None else f"{score.relative:.1%}"
        table.add_row(score.task, score.metric, f"{score.examples:,}", f"{score.value:.3f}{stderr}", *rest, relative)
    console.print(table)
    for name, answers in (("student", result.answers), ("teacher", result.teacher_answers)):
        for answer in answers:
            console.print(f"{name}, {answer.task}: {_described(answer)}", highlight=False)


def _described(answer: Answers) -> str:
    if answer.letters:
        pairs = enumerate(zip(answer.letters, answer.right_letters, strict=True))
        letters = ", ".join(f"{chr(65 + i)} {taken} ({right})" for i, (taken, right) in pairs)
        return f"choices taken (and right): {letters}"
    return f"answers of {answer.mean_length:.0f} characters on average, {answer.no_end:.0%} without an end"
