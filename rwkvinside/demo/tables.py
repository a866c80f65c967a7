"""Results of the demo as tables: samples side by side, scores after each stage, time of a generated token."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluate.decode_speed import DecodeSpeed
from ..evaluate.quality import Scores

MAX_CE_GAP = 0.25  # nats between student and teacher that the demo promises
MAX_SLOWDOWN = 1.2  # of the student's token, from the shortest context to the longest


def show_samples(console: Console, samples: dict[str, str], how: str) -> None:
    """Print samples side by side, one column per model."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in samples:
        table.add_column(f"{name} ({how})", ratio=1, overflow="fold")
    table.add_row(*map(escape, samples.values()))
    console.print(table)


def show_scores(console: Console, stages: dict[str, Scores], control: Scores | None) -> None:
    """Print the scores of the teacher, of a windowed student's control, and of the student after each stage."""
    table = _table("validation, each document alone", "model", "CE (nats)", "KL (nats)", "agreement")
    last = list(stages.values())[-1]
    table.add_row("teacher", f"{last.ce_teacher:.3f}", "0", "100.0%")
    if control is not None:
        table.add_row("control", f"{control.ce:.3f}", f"{control.kl:.3f}", f"{control.agreement:.1%}")
    for stage, scores in stages.items():
        table.add_row(f"after {stage}", f"{scores.ce:.3f}", f"{scores.kl:.3f}", f"{scores.agreement:.1%}")
    console.print(table)
    gap = last.ce - last.ce_teacher
    console.print(f"cross entropy above the teacher's: {gap:+.3f} nats (promised: at most {MAX_CE_GAP})")


def show_stages(console: Console, stages: dict[str, dict]) -> None:
    """Print scores of models, with the tokens that each was trained on.

    Args:
        stages: {model: {"tokens", "kl", "ce", "agreement"}}.
    """
    table = _table("validation, each document alone", "model", "tokens trained", "KL (nats)", "CE (nats)", "agreement")
    for name, row in stages.items():
        table.add_row(name, f"{row['tokens']:,}", f"{row['kl']:.3f}", f"{row['ce']:.3f}", f"{row['agreement']:.1%}")
    console.print(table)


def show_speed(console: Console, speed: list[DecodeSpeed]) -> None:
    """Print milliseconds per token, a row per model and a column per context."""
    contexts = list(dict.fromkeys(row.context for row in speed))
    table = _table("time of one generated token", "model", *(f"after {context:,} tokens" for context in contexts))
    for name in dict.fromkeys(row.model for row in speed):
        table.add_row(name, *(f"{row.milliseconds:.2f} ms" for row in speed if row.model == name))
    console.print(table)
    ratio = slowdown(speed)
    console.print(f"student, longest versus shortest context: x{ratio:.2f} (promised: at most {MAX_SLOWDOWN})")


def slowdown(speed: list[DecodeSpeed]) -> float:
    """Return the student's time per token, longest context relative to shortest."""
    times = {row.context: row.milliseconds for row in speed if row.model == "student"}
    return times[max(times)] / times[min(times)]


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
