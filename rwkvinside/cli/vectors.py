"""`rwkvinside vectors`: latent vector models, from text to a leaderboard."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..support.files import write_json
from ..support.progress import Progress
from ..support.text import rounded_bytes, rounded_count
from .arguments import ArgumentParser, add_device_argument, add_output_arguments, at_least, run_command

COMMANDS = {
    "embed": ("vectors:embed", "text to vectors, stored with what they are"),
    "train": ("vectors:train", "train a model that predicts the next vector"),
    "eval": ("vectors:evaluate", "score a trained model or an ensemble on validation data"),
    "baselines": ("vectors:baselines", "what predictors without a sequence model reach on data"),
    "decode": ("vectors:decode", "predicted vectors as text"),
    "inverter": ("vectors:inverter", "train a small model that writes the text of a vector"),
    "ensemble": ("vectors:ensemble", "several runs that vote"),
    "bench": ("vectors:bench", "parameters and speed of the architectures"),
    "grid": ("vectors:grid", "all runs of a plan, resumed where they were stopped"),
    "leaderboard": ("vectors:leaderboard", "compare the runs of a directory, with the study's criteria"),
    "fields": ("vectors:fields", "all fields of a configuration"),
    "demo": ("vectors:demo", "from text to a leaderboard page in minutes"),
}
SHOWN = ("cosine", "gain", "mse", "r1", "r10", "mrr", "ca", "decode", "margin")


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run one of the commands."""
    return run_command(parser, argv, COMMANDS)


def embed(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Embed text."""
    _add_text_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to store the vectors")
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="sentences at most, in whole documents (default: all)"
    )
    args = parser.parse(argv)
    from ..vectors.store import embed as run

    data = run(args.source, args.embedder, args.out, args.limit)
    count = len(data.documents.unique())
    print(
        f"{args.out}: {len(data.vectors):,} sentences in {count:,} documents, {data.card['dim']}-D {data.card['space']}"
    )
    return 0


def train(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Train a run, or finish it."""
    _add_settings(
        parser,
        data="directory of vectors embed, or synthetic:NAME (default: synthetic:rotor-lin)",
        out="run directory (default: runs/vectors)",
        field="model.arch=gru",
    )
    args = parser.parse(argv)
    from ..vectors.settings import RunConfig, load_config
    from ..vectors.train import train as run

    more = {"out": args.out, "data": args.data and {"source": args.data}}
    result = run(load_config(RunConfig, args.config, args.overrides, **more))
    _show(f"{result['arch']} on {result['data']['source']}", {"validation": result["metrics"]})
    for weights in result["mixtures"]:
        print(f"  a layer of several mixers: {', '.join(f'{100 * weight:.0f} %' for weight in weights)}")
    return _write(args, result)


def evaluate(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Score a run."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run or an ensemble")
    parser.add_argument("--data", metavar="DIR", help="other data of the same space (default: the run's)")
    parser.add_argument(
        "--tmd",
        choices=("true", "shuffled"),
        default="true",
        help="whose codes it reads: its own, or other windows' (default: true)",
    )
    parser.add_argument(
        "--steps", type=at_least(1), metavar="N", help="denoising steps of a prediction (default: the run's)"
    )
    parser.add_argument(
        "--guidance", type=float, metavar="X", help="classifier-free guidance, 1: none (default: the run's)"
    )
    add_output_arguments(parser)
    args = parser.parse(argv)
    from ..vectors.data import load_data, shuffled_codes, split
    from ..vectors.run import data_of, latency, load_predictor, set_diffusion
    from ..vectors.run import evaluate as run

    settings = data_of(args.run).data
    predictor = load_predictor(args.run)
    set_diffusion(predictor, args.steps, args.guidance)
    data = load_data(settings)
    if args.data:
        data = _same_space(args.data, data.card["space"], settings)
    both = split(shuffled_codes(data) if args.tmd == "shuffled" else data, settings)
    numbers = run(predictor, both) | latency(predictor, both)
    _show(str(args.run), {"validation": numbers})
    return _write(args, numbers)


def baselines(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Score the baselines."""
    parser.add_argument("--data", required=True, metavar="DIR", help="directory of vectors embed, or synthetic:NAME")
    parser.add_argument("--context", type=at_least(1), default=5, metavar="N", help="vectors of a window (default: 5)")
    add_output_arguments(parser)
    args = parser.parse(argv)
    from ..vectors.baselines import evaluate_baselines
    from ..vectors.data import load_data, split
    from ..vectors.settings import DataConfig

    settings = DataConfig(source=args.data, context=args.context)
    rows = dict(evaluate_baselines(split(load_data(settings), settings)))
    _show(f"baselines on {args.data}", rows)
    return _write(args, rows)


def decode(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Show contexts, predictions as text, and true next sentences."""
    from ..vectors.names import DECODERS

    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run or an ensemble")
    parser.add_argument(
        "--decoder", default="retrieval", metavar="NAME", help=f"{', '.join(DECODERS)} (default: retrieval)"
    )
    parser.add_argument("--through", metavar="DIR", help="vectors of the same texts in the decoder's own space")
    parser.add_argument("--count", type=at_least(1), default=4, metavar="N", help="examples to show (default: 4)")
    parser.add_argument(
        "--score", type=at_least(0), default=256, metavar="N", help="predictions that are scored (default: 256)"
    )
    parser.add_argument(
        "--smooth", type=Path, metavar="DIR", help="language model that smooths the texts (default: none)"
    )
    add_output_arguments(parser)
    args = parser.parse(argv)
    from ..vectors.data import load_data, split
    from ..vectors.decoders.registry import Through, build_decoder
    from ..vectors.decoders.scoring import decoded_examples, decoding_score
    from ..vectors.decoders.smoothing import Smoother
    from ..vectors.run import data_of, load_predictor
    from ..vectors.store import read_store

    settings = data_of(args.run).data
    both = split(load_data(settings), settings)
    predictor, numbers = load_predictor(args.run), {}
    if args.through is None:
        decoder = build_decoder(args.decoder, both.val.data)
    else:
        decoder = through = Through(args.decoder, both.val.data, read_store(args.through))
        numbers["r2"] = through.r2
        print(f"a linear map explains {100 * through.r2:.1f} % of the variance of held-out vectors in {args.through}\n")
    smoother = None if args.smooth is None else Smoother(args.smooth)
    examples = decoded_examples({"decoded": predictor}, both, decoder, args.count)
    for example in examples:
        for text in example["context"]:
            print(f"          {text}")
        print(f"true      {example['target']}\ndecoded   {example['decoded']['decoded']}")
        if smoother is not None:
            example["smoothed"] = smoother([*example["context"], example["decoded"]["decoded"]])
            print(f"smoothed  {example['smoothed']}")
        print()
    if args.score:
        some = both.val.evenly(args.score)
        numbers |= {"scored": len(some)} | decoding_score(predictor, some, decoder, getattr(decoder, "encoder", None))
        same = f"{100 * numbers['decode']:.1f} % of {len(some):,} validation predictions"
        print(f"{same} decode to the true next sentence; F1 of the words {numbers['words']:.3f}")
        if "nearer" in numbers:
            nearer = f"{100 * numbers['nearer']:.1f} % lie nearer to the prediction than the true sentence"
            print(f"of the others {nearer}")
    return _write(args, numbers | {"examples": examples})


def inverter(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Train an inverter, or finish it."""
    _add_settings(
        parser,
        data="directory of vectors embed, with the texts (default: vectors/stories)",
        out="directory of the inverter (default: runs/inverter)",
        field="steps=3000",
    )
    parser.add_argument(
        "--correct",
        type=at_least(1),
        metavar="N",
        help="measure how well N texts of each kind are corrected (default: not)",
    )
    args = parser.parse(argv)
    from ..vectors.decoders.corrector import correction_score
    from ..vectors.decoders.inverter import train_inverter
    from ..vectors.settings import InverterConfig, load_config

    config = load_config(InverterConfig, args.config, args.overrides, out=args.out, source=args.data)
    result = train_inverter(config)
    for name, numbers in (("texts it has read", result["train"]), ("held-out texts", result["held_out"])):
        if numbers is not None:
            print(f"{name + ':':<19} {_agreement(numbers)}")
    if args.correct:
        result |= {"correction": (scores := correction_score(Path(config.out), args.correct))}
        for kind, numbers in scores.items():
            print(f"{kind.replace('_', ' ') + ':':<19} {_agreement(numbers)}")
    print(f"use it: rwkvinside vectors decode RUN --decoder inverter:{config.out}, or corrector:{config.out}")
    return _write(args, result)


def _agreement(numbers: Mapping[str, float]) -> str:
    line = f"{100 * numbers['decode']:.1f} % exactly, F1 of the words {numbers['words']:.3f}"
    if "seconds" in numbers:
        line += f", cosine {numbers['cosine']:.3f}, {numbers['seconds']:.2f} s each"
    return line


def ensemble(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Make runs vote."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs on the same data")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the ensemble")
    parser.add_argument("--weighted", action="store_true", help="votes count by validation cosine")
    args = parser.parse(argv)
    from ..vectors.run import write_ensemble
    from ..vectors.store import check_new

    check_new(args.out)
    result = write_ensemble(args.out, args.runs, args.weighted)
    _show(
        f"ensemble of {len(args.runs)}; mean of the members {result['members_mean_cosine']:.4f}",
        {"": result["metrics"]},
    )
    return 0


def bench(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Measure architectures."""
    parser.add_argument("--archs", nargs="+", default=["all"], metavar="NAME", help="architectures (default: all)")
    for flag, default, text in (
        ("--d-in", 768, "width of the vectors"),
        ("--d-model", 512, "width of the layers"),
        ("--layers", 6, "layers"),
        ("--context", 5, "vectors of a window"),
        ("--repeats", 20, "predictions that are timed"),
    ):
        parser.add_argument(flag, type=at_least(1), default=default, metavar="N", help=f"{text} (default: {default})")
    add_device_argument(parser, "where it is measured", default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="measure processor time, of one thread")
    add_output_arguments(parser)
    args = parser.parse(argv)
    import torch

    if args.processor_time:
        torch.set_num_threads(1)
    from ..vectors.bench import choose, measure
    from ..vectors.settings import ModelConfig

    config = ModelConfig(d_in=args.d_in, d_model=args.d_model, layers=args.layers)
    names = choose(args.archs)
    title = f"d_model {args.d_model}, {args.layers} layers, context {args.context}, {args.device}, fp32"
    table = Table(
        title=f"{title}, {torch.get_num_threads()} threads{', processor time' if args.processor_time else ''}"
    )
    for column in ("architecture", "layers", "parameters", "causal", "train ms", "p50 ms", "p95 ms", "state"):
        table.add_column(column, justify="left" if column in ("architecture", "layers") else "right")
    rows = []
    clock = time.process_time if args.processor_time else time.perf_counter
    device, repeats = torch.device(args.device), max(2, args.repeats)
    with Progress("measuring", len(names), unit="architectures") as progress:
        for speed in measure(names, config, args.context, device, repeats, clock):
            rows.append(speed.to_dict())
            progress.advance(detail=speed.arch)
            once = f" ({speed.steps} steps)" if speed.steps else ""
            state = "" if speed.state_bytes is None else rounded_bytes(speed.state_bytes)
            times = (f"{speed.train_ms:.0f}", f"{speed.p50_ms:.1f}{once}", f"{speed.p95_ms:.1f}")
            causal = "yes" if speed.causal else "no"
            table.add_row(speed.arch, speed.pattern, rounded_count(speed.params), causal, *times, state)
    _console().print(table)
    return _write(args, {"rows": rows})


def grid(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run a plan, or show it."""
    parser.add_argument("plan", type=Path, metavar="FILE", help="plan, in YAML (docs/vectors.md)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/grid"), metavar="DIR", help="directory of all runs (default: runs/grid)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs and train nothing")
    parser.add_argument("--max-runs", type=at_least(1), metavar="N", help="stop after so many runs (default: all)")
    parser.add_argument("--jobs", type=at_least(1), default=1, metavar="N", help="runs at once (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any field, for all runs")
    args = parser.parse(argv)
    from ..config.load import read_settings
    from ..vectors.grid import read_plan, run_plan, write_baselines
    from ..vectors.leaderboard import write_leaderboard

    runs = read_plan(args.plan, read_settings((), args.overrides))
    if args.dry_run:
        for number, run in enumerate(runs, 1):
            print(f"{number:4}  {run.group:<14} {run.name}")
        groups = list(dict.fromkeys(run.group for run in runs))
        counts = [f"{group} {sum(run.group == group for run in runs)}" for group in groups]
        print(f"{len(runs)} runs: {', '.join(counts)}")
        return 0
    write_baselines(runs, args.out, print)
    outcome = run_plan(runs, args.out, print, args.max_runs, args.jobs)
    print(f"{len(outcome.finished)} of {len(runs)} runs are finished, {len(outcome.failed)} have failed")
    for path in write_leaderboard(args.out):
        print(f"wrote {path}")
    return 1 if outcome.failed else 0


def leaderboard(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Write and show the leaderboard of a directory."""
    parser.add_argument("runs", type=Path, metavar="DIR", help="directory of runs")
    parser.add_argument(
        "--criteria", choices=("seed",), default="seed", help="those of the study, the only ones (default: seed)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of it here, too")
    args = parser.parse(argv)
    from ..support.files import write_text
    from ..vectors.leaderboard import criteria, read_baselines, read_rows, write_leaderboard
    from ..vectors.page import html_page

    rows, around = read_rows(args.runs), read_baselines(args.runs)
    for source in dict.fromkeys(row["source"] for row in rows):
        named = {f"{row['run']}": row for row in rows if row["source"] == source}
        named |= {f"({row['run']})": row for row in around if row["source"] == source}
        _show(source, dict(sorted(named.items(), key=lambda each: -each[1]["cosine"])))
        for name, verdict, best in criteria(rows)[source]:
            print(f"{verdict:<9} {name:<24} {best}")
    for path in write_leaderboard(args.runs):
        print(f"wrote {path}")
    if args.html is not None:
        write_text(args.html, html_page("Latent vector models", rows, around, []))
        print(f"wrote {args.html}")
    return 0


def fields(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """List all fields."""
    parser.add_argument(
        "of", nargs="?", choices=("train", "inverter"), default="train", help="command (default: train)"
    )
    args = parser.parse(argv)
    from ..config.show import describe
    from ..vectors.settings import InverterConfig, RunConfig

    for path, default, text in describe(RunConfig if args.of == "train" else InverterConfig):
        print(f"{path:<30} {default:<20} {text}")
    return 0


def demo(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Run the demo."""
    _add_text_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-vectors"),
        metavar="DIR",
        help="folder for everything (default: demo-vectors)",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that all parts work")
    args = parser.parse(argv)
    import torch

    from ..vectors.demo import demo as run

    torch.set_num_threads(1)  # as the other demo: small matrices, and threads that wait cost more than they bring
    start = time.monotonic()
    page = run(args.out, args.source, args.embedder, args.quick, print)
    print(f"open {page}; {(time.monotonic() - start) / 60:.1f} minutes in all")
    return 0


def _add_text_arguments(parser: ArgumentParser) -> None:
    from ..vectors.names import EMBEDDERS

    parser.add_argument(
        "--source",
        default="stories",
        metavar="TEXT",
        help="stories (made up), stdlib (Python's documentation) or a file of texts (default: stories)",
    )
    parser.add_argument(
        "--embedder", default="hash768", metavar="NAME", help=f"{', '.join(EMBEDDERS)} (default: hash768)"
    )


def _same_space(path: str, space: str, settings):
    """Return other data, of the same space (`UserError`: of another)."""
    from ..errors import UserError
    from ..vectors.data import load_data

    data = load_data(settings.model_copy(update={"source": path}))
    if data.card["space"] != space:
        raise UserError(
            f"--data {path} has vectors of {data.card['space']}, the run is of {space}", "use the same space"
        )
    return data


def _show(title: str, rows: Mapping[str, Mapping]) -> None:
    """Print numbers by name and column."""
    columns = [name for name in SHOWN if any(row.get(name) is not None for row in rows.values())]
    columns += ["p95_ms"] if any("p95_ms" in row for row in rows.values()) else []
    if len(rows) == 1:
        (row,) = rows.values()
        print(f"{title}:")
        for name, cell in zip(columns, _cells(row, columns), strict=True):
            low, high = (row.get(f"{name}_{end}") for end in ("low", "high"))
            print(f"  {name:<8} {cell:>8}" + ("" if low is None else f"  ({low:.4f} to {high:.4f})"))
        return
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *_cells(row, columns))
    _console().print(table)


def _console() -> Console:
    """Return the console, wide enough for tables where there is no terminal that says how wide it is."""
    return Console() if sys.stdout.isatty() else Console(width=130)


def _cells(row: Mapping, columns: Iterable[str]) -> list[str]:
    return ["" if row.get(name) is None else f"{row[name]:.{1 if name == 'p95_ms' else 4}f}" for name in columns]


def _add_settings(parser: ArgumentParser, *, data: str, out: str, field: str) -> None:
    """Add what a command that trains reads its settings from.

    Args:
        parser: of the command.
        data, out: what these flags are.
        field: of the settings, as an example.
    """
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE", help="YAML file of settings; may repeat"
    )
    parser.add_argument("--data", metavar="DIR", help=data)
    parser.add_argument("--out", metavar="DIR", help=out)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"any field, as in {field}; rwkvinside vectors fields {parser.prog.split()[-1]} lists all",
    )
    add_output_arguments(parser)


def _write(args: argparse.Namespace, numbers: dict) -> int:
    if args.json is not None:
        write_json(args.json, numbers)
    return 0
