"""`rwkvinside bench`: speed and memory, measured side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..support.files import write_json
from ..support.progress import Progress
from ..support.text import rounded_bytes
from .arguments import ArgumentParser, add_output_arguments, at_least, model_name, run_command

SHAPE = "layers, heads and their size, as in 8,8,64"

COMMANDS = {
    "wkv7": ("bench:wkv7", "the recurrence: our kernels compared with others and with attention"),
    "training": ("bench:training", "align and distill compared with plain fine-tuning of the same teacher"),
    "gpu": ("bench:gpu", "everything that is measured on a GPU, in one command that ends in time"),
    "generation": (
        "bench:generation",
        "prompts and tokens of hybrids and their teacher, from Python and as CUDA graphs",
    ),
    "context": (
        "bench:context",
        "prompts of 1K to 64K tokens: time and memory of attention, of hybrids and of RWKV of one size",
    ),
    "head": ("bench:head", "memory and time of the distillation loss: all logits at once, or chunk by chunk"),
}


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run one of the commands."""
    return run_command(parser, argv, COMMANDS)


def wkv7(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Measure the kernels; the same as `python -m rwkvinside.kernels.bench`."""
    from ..kernels.bench.arguments import add_arguments

    add_arguments(parser)
    args = parser.parse(argv)
    from ..kernels.bench import command

    return command.main(args)


def gpu(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run a session on the GPU; the same as `python -m rwkvinside.bench.gpu_session`."""
    from ..bench.gpu_session.session import add_arguments
    from ..bench.gpu_session.session import main as session

    add_arguments(parser)
    return session(parser.parse(argv))


def training(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Measure training steps, print a table, write JSON."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--teacher", type=model_name, metavar="NAME", help="preset, hub id or directory")
    source.add_argument("--random", type=_shape, metavar="SHAPE", help=f"a teacher with random weights: {SHAPE}")
    parser.add_argument("--rows", type=at_least(1), default=8, metavar="N", help="rows of the batch (default: 8)")
    parser.add_argument("--seq-len", type=at_least(1), default=512, metavar="N", help="tokens per row (default: 512)")
    parser.add_argument(
        "--repeats", type=at_least(1), default=5, metavar="N", help="measured steps of each kind (default: 5)"
    )
    parser.add_argument(
        "--backend",
        nargs="+",
        default=["auto"],
        metavar="NAME",
        help="of the recurrence, as student.backend; several are compared (default: auto)",
    )
    parser.add_argument(
        "--recompute",
        nargs="+",
        choices=("nothing", "recurrence", "layers"),
        metavar="WHAT",
        default=["nothing"],
        help="in the backward: nothing, recurrence, layers; several are compared (default: nothing)",
    )
    add_output_arguments(parser)
    args = parser.parse(argv)
    from ..bench.training import pretrained_teacher, random_teacher, training_speed
    from ..support.quiet import quiet_libraries

    quiet_libraries()
    load = partial(random_teacher, *args.random) if args.random else partial(pretrained_teacher, args.teacher)
    result = training_speed(
        load,
        rows=args.rows,
        seq_len=args.seq_len,
        repeats=args.repeats,
        backends=args.backend,
        recomputed=args.recompute,
    )
    table = Table(
        title=f"one step of {args.rows} x {args.seq_len} tokens, fp32, {result['device']}, {result['threads']} threads"
    )
    for column in ("", "tokens/s", "of fine-tuning"):
        table.add_column(column, justify="left" if not column else "right")
    speed = result["tokens_per_second"]
    for name, value in speed.items():
        table.add_row(name, f"{value:,.0f}", f"{value / speed['finetune']:.2f}")
    Console().print(table)
    if args.json is not None:
        write_json(args.json, result)
    return 0


def head(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Measure the distillation loss, print a table, write JSON."""
    for flag, default, text in (
        ("--tokens", 2048, "tokens with a label"),
        ("--vocab", 151_936, "rows of the head"),
        ("--hidden", 1024, "width of the head"),
        ("--repeats", 3, "processes of each kind"),
    ):
        parser.add_argument(flag, type=at_least(1), default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--trained", action="store_true", help="the student's head is trained too")
    add_output_arguments(parser)
    args = parser.parse(argv)
    from ..bench.distillation_loss import Problem, head_cost

    result = head_cost(Problem(args.tokens, args.vocab, args.hidden, args.trained), args.repeats)
    table = Table(
        title=f"KL of {args.tokens} tokens, vocabulary {args.vocab}, width {args.hidden}, head "
        f"{'trained' if args.trained else 'frozen'}, fp32, {result['device']}, {result['threads']} threads"
    )
    for column in ("", "seconds", "extra memory", "loss"):
        table.add_column(column, justify="left" if not column else "right")
    chunks = f"{result['chunk_tokens']} tokens at a time"
    for kind, name in (("whole", "all logits at once"), ("chunks", chunks), ("fused", f"{chunks}, in Triton")):
        if kind in result:  # the last one on a GPU only
            medians = result[kind]
            seconds, memory = f"{medians['seconds']:.3g}", rounded_bytes(medians["bytes"])
            table.add_row(name, seconds, memory, f"{medians['loss']:.6g}")
    table.add_row(f"{chunks}, relative", f"{result['time']:.2f}", f"{result['memory']:.3f}", "")
    Console().print(table)
    if args.json is not None:
        write_json(args.json, result)
    return 0


def generation(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Measure generation, print a table, write JSON."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--models",
        nargs="+",
        type=model_name,
        metavar="NAME",
        help="presets, hub ids or directories, whose code is run",
    )
    source.add_argument(
        "--random", type=_shape, metavar="SHAPE", help=f"a teacher and hybrids with random weights: {SHAPE}"
    )
    for flag, default, text in (
        ("--contexts", [512, 4096], "tokens of the prompts (default: 512 4096)"),
        ("--batches", [1], "rows that generate together (default: 1)"),
    ):
        parser.add_argument(flag, type=at_least(1), nargs="+", default=default, metavar="N", help=text)
    parser.add_argument(
        "--new-tokens",
        type=at_least(1),
        default=64,
        metavar="N",
        help="tokens after each prompt that are measured (default: 64)",
    )
    add_output_arguments(parser)
    args = parser.parse(argv)
    import torch

    from ..bench.generation import generation_speed, random_hybrids
    from ..evaluate.load import load_pretrained

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.random:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        models = random_hybrids(*args.random, dtype=dtype, device=device)
    else:
        models = {path: load_pretrained(path, device, trust_remote_code=True) for path in args.models}
    table = Table(title=f"generation, {torch.cuda.get_device_name() if device == 'cuda' else 'cpu (no graphs)'}")
    for column in ("", "batch", "prompt", "prefill", "ms per token", "graphed", "cache"):
        table.add_column(column, justify="left" if not column else "right")
    found, total = [], len(models) * len(args.contexts) * len(args.batches)
    with Progress("measuring", total, unit="cases") as progress:
        for s in generation_speed(models, args.contexts, args.batches, new_tokens=args.new_tokens):
            found.append(asdict(s))
            progress.advance(detail=f"{s.model} at {s.context:,}")
            times = (f"{s.prefill_seconds:.3f} s", f"{s.eager_ms:.2f}", f"{s.graphed_ms:.2f}")
            table.add_row(s.model, str(s.batch), str(s.context), *times, rounded_bytes(s.cache_bytes))
            if args.json is not None:
                write_json(args.json, found)  # again after each, so that an error loses nothing
    Console().print(table)
    return 0


def context(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Measure long contexts, print a table, write JSON and a picture."""
    parser.add_argument(
        "--random",
        type=_shape,
        default=(4, 2, 64),
        metavar="SHAPE",
        help=f"of the models, which have random weights: {SHAPE} (default: 4,2,64)",
    )
    parser.add_argument(
        "--contexts",
        type=at_least(1),
        nargs="+",
        default=[1024, 4096, 16_384, 65_536],
        metavar="N",
        help="tokens of the prompts (default: 1024 4096 16384 65536)",
    )
    for flag, default, text in (
        ("--window", 512, "tokens that the attention of one of the hybrids is cut to"),
        ("--chunk-size", 1024, "tokens of a prompt that are read at a time"),
        ("--new-tokens", 16, "measured tokens after each prompt"),
    ):
        parser.add_argument(flag, type=at_least(1), default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure the processor's time, on a machine that does other work too (one thread)",
    )
    add_output_arguments(parser, png="time and memory by context")
    args = parser.parse(argv)
    import time

    import torch

    from ..bench.context import context_cost, equal_models

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if args.processor_time and (device == "cuda" or torch.get_num_threads() > 1):
        raise UserError("--processor-time is that of one thread of a CPU", "set OMP_NUM_THREADS=1, without a GPU")
    models = equal_models(*args.random, window=args.window, dtype=dtype, device=device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    clock = time.process_time if args.processor_time else time.perf_counter
    result = {"device": name, "dtype": str(dtype), "clock": clock.__name__, "shape": args.random}
    result |= {"window": args.window, "chunk_size": args.chunk_size, "found": []}
    measurements = context_cost(
        models, args.contexts, chunk_size=args.chunk_size, new_tokens=args.new_tokens, clock=clock
    )
    with Progress("measuring", len(models) * len(args.contexts), unit="prompts") as progress:
        for found in measurements:
            result["found"].append(asdict(found))
            progress.advance(detail=f"{found.model} at {found.context:,}")
            if args.json is not None:
                write_json(args.json, result)  # again after each, so that an error loses nothing
    Console().print(_context_table(result))
    if args.png is not None:
        from ..report.figures import context_figure, save_figure

        save_figure(context_figure(result), args.png)
    return 0


def _context_table(result: dict) -> Table:
    found = result["found"]
    sizes = ", ".join(
        f"{name} {count / 1e6:.3f} M" for name, count in {r["model"]: r["parameters"] for r in found}.items()
    )
    clock = ", time of the processor" if result["clock"] == "process_time" else ""
    table = Table(title=f"{result['device']}, {result['dtype'].removeprefix('torch.')}{clock}; parameters: {sizes}")
    for column in ("context", "model", "prefill", "tokens/s", "peak memory", "ms a token", "state"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column == "model")
    for i, row in enumerate(found):
        peak = row["prefill_peak_bytes"]
        table.add_row(
            f"{row['context']:,}",
            row["model"],
            f"{row['prefill_seconds']:.2f} s",
            f"{row['context'] / row['prefill_seconds']:,.0f}",
            "not measured" if peak is None else rounded_bytes(peak),
            f"{row['token_ms']:.2f}",
            rounded_bytes(row["state_bytes"]),
            end_section=i + 1 < len(found) and found[i + 1]["context"] != row["context"],
        )
    return table


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(",") if part.isdecimal())
    if len(sizes) != 3 or not all(sizes) or text.count(",") != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYERS,HEADS,HEAD_SIZE, as in 8,8,64")
    return sizes
