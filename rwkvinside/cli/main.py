"""The `rwkvinside` command: a table of verbs, each imported when it is chosen."""

from __future__ import annotations

import sys

from .. import __version__
from ..errors import report_errors
from .arguments import ArgumentParser, run_command

VERBS = {
    "train": ("train:main", "convert a teacher: calibrate, align, distill"),
    "pretrain": ("pretrain:main", "train a language model of RWKV and attention layers"),
    "plan": ("plan:main", "what a run would do, without loading weights"),
    "config": ("config:main", "the configuration that results, and all its fields"),
    "doctor": ("doctor:main", "what this machine and this installation offer"),
    "data": ("data:main", "look at data, tokenize it for good, store a teacher's logits"),
    "eval": ("eval:main", "compare a student with its teacher on text"),
    "chat": ("chat:main", "talk to a model, or to a student and its teacher side by side"),
    "generate": ("generate:main", "what a model writes after prompts"),
    "lm": ("lm:main", "models read by their state: long texts, memory, compression"),
    "layers": ("layers:main", "which layers should keep attention, by measurement"),
    "report": ("report:main", "a page of what a run has measured, and its figures"),
    "compare": ("compare:main", "runs beside each other: settings, curves, one table"),
    "bench": ("bench:main", "speed of the kernels and of training, memory of the loss"),
    "export": ("export:main", "write what a run has trained in another format, and verify it"),
    "import": ("import_checkpoint:main", "make a run of a checkpoint of another program"),
    "verify": ("verify:main", "compare an exported directory with the run it was made from"),
    "vectors": ("vectors:main", "models of sentence vectors: embed, train, compare, decode"),
    "completion": ("completion:main", "a script that completes commands and flags in your shell"),
    "demo": ("demo:main", "the whole way on this machine: teacher, hybrid, report"),
}


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the `rwkvinside` command; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--local_rank="):  # DeepSpeed's launcher passes it before all other arguments
        argv = [*argv[1:], argv[0]]
    parser = ArgumentParser("rwkvinside", "Turn transformer language models into RWKV-7 hybrids by distillation.")
    parser.add_argument("--version", action="version", version=f"rwkvinside {__version__}")
    return run_command(parser, argv, VERBS)
