"""`rwkvinside eval DIR_OR_RUN --teacher DIR --data FILE`: measure, show a table, write JSON and a picture."""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import UserError
from ..evaluate.compare import evaluate, read_documents
from ..evaluate.load import load_pretrained, load_run
from ..evaluate.quality import Evaluation, Scores
from ..report.figures import position_figure, save_figure
from ..runs.directory import RunDirectory
from ..runs.trained import open_run
from ..support.files import write_json

LONGEST = 4096  # tokens of a document that are judged unless --max-length says more


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rwkvinside eval`."""
    parser.add_argument("student", type=Path, metavar="DIR_OR_RUN", help="exported model or run directory")
    parser.add_argument("--teacher", metavar="DIR", help="directory or hub id (default: the one a run names)")
    parser.add_argument(
        "--data", action="append", required=True, metavar="FILE", help="texts to evaluate on; may repeat"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers here")
    parser.add_argument("--png", type=Path, metavar="OUT", help="write perplexity and KL by position here")
    parser.add_argument("--max-documents", type=_positive, metavar="N", help="evaluate the first N documents only")
    parser.add_argument(
        "--max-length", type=_positive, metavar="N", help=f"tokens judged of a document (default: at most {LONGEST})"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the models run")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main(args: argparse.Namespace) -> int:
    """Run `rwkvinside eval`; returns the exit code.

    Raises:
        UserError: a directory that is no model and no run, data that cannot be read, an output that cannot be written.
    """
    notes = Console(stderr=True)
    for out in (args.json, args.png):  # before minutes of work, not after
        if out is not None and not out.parent.is_dir():
            raise UserError(f"folder {out.parent} of the output {out.name} does not exist", "make it first")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    teacher_path = args.teacher or _named_teacher(args.student)
    student = _load_student(args.student, device, notes)
    teacher = load_pretrained(teacher_path, device)
    max_length = args.max_length or min(LONGEST, teacher.config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(teacher_path)
        documents = read_documents(args.data, tokenizer, Path(folder), max_length, args.max_documents)
        found = evaluate(student, teacher, documents, notes)
    result = {
        "student": args.student.name,
        "teacher": Path(teacher_path).name,
        "data": [Path(source).name for source in args.data],
        "max_length": documents.seq_len,
        "truncated_documents": documents.num_truncated,
        **found.to_dict(),
    }
    show(found, Console())
    if args.json is not None:
        write_json(args.json, result)
    if args.png is not None:
        save_figure(position_figure(result), args.png)
    return 0


def _named_teacher(path: Path) -> str:
    """The teacher that a run or an export was made from."""
    if RunDirectory(path).is_run:
        return open_run(path).teacher
    raise UserError("no teacher is given", "name the directory or the hub id of the original model: --teacher DIR")


def _load_student(path: Path, device: str, notes: Console) -> PreTrainedModel:
    if RunDirectory(path).is_run:
        notes.print(f"building the student of run {path} in memory", highlight=False)
        return load_run(path, device)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is neither an exported model nor a run directory", "they have a config.json or a config.yaml"
        )
    notes.print(f"loading {path} with the model code that stands in it (trust_remote_code)", highlight=False)
    return load_pretrained(path, device, trust_remote_code=True)


def show(found: Evaluation, console: Console) -> None:
    """Print the table: all tokens, then by position."""
    title = f"{found.documents:,} documents, {found.scores.tokens:,} tokens, {found.shared_vocab:,} shared ids; nats"
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("tokens\nread", justify="right", no_wrap=True)
    for name in ("\ntokens", "\nKL", "\nCE", "CE\nteacher", "\nppl", "ppl\nteacher", "\nagreement"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("all", *_cells(found.scores), style="bold", end_section=True)
    for bucket in found.by_position:
        first, last, scores = bucket
        table.add_row(str(first) if first == last else f"{first}-{last}", *_cells(scores))
    console.print(table)


def _cells(scores: Scores) -> tuple[str, ...]:
    return (
        f"{scores.tokens:,}",
        f"{scores.kl:.4f}",
        f"{scores.ce:.4f}",
        f"{scores.ce_teacher:.4f}",
        f"{scores.perplexity:.4g}",
        f"{scores.perplexity_teacher:.4g}",
        f"{scores.agreement:.2%}",
    )
