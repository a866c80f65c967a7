"""The tables of docs/benchmarks.md that are made of a session's results; what was not measured has no table."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...errors import UserError
from ...support.files import write_text
from .results import read
from .staging import PACKAGE

PAGE = "docs/benchmarks.md"
BEGIN, END = "<!-- GPU tables: begin -->", "<!-- GPU tables: end -->"
WIDTH = 100  # of the page's text
FASTEST = 3  # configurations that are shown of those that were tried
Line = Mapping


def write_tables(file: Path) -> None:
    """Write the tables of a results file between the markers of the page.

    Raises:
        UserError: no such file, no working tree, or a page without markers.
    """
    page = PACKAGE.parent / PAGE
    for path in (file, page):
        if not path.is_file():
            raise UserError(f"there is no {path}")
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{page} lacks {BEGIN} or {END}")
    write_text(page, f"{before}{BEGIN}\n\n{tables(read(file))}\n{END}{after}")


def tables(lines: Sequence[Line]) -> str:
    """Return the tables of all stages in Markdown, each below a line that says what it has."""
    by_stage: dict[str, list[Line]] = {}
    for line in lines:
        if "ended" not in line and "error" not in line and "skipped" not in line:
            by_stage.setdefault(line["stage"], []).append(line)
    measured = by_stage.get("kernels", [])
    parts = [
        _about(lines),
        *_correctness([*by_stage.get("correct", []), *measured]),
        _times(measured),
        _passes(measured, by_stage.get("peers", [])),
        *_mixers(measured),
        _windows(measured),
        _decoding(measured),
        _configurations(measured),
        _profiles(by_stage.get("nsight", [])),
        _training(by_stage.get("training", [])),
        *_generation(by_stage.get("generation", [])),
    ]
    return "\n".join(filter(None, parts))


def _about(lines: Sequence[Line]) -> str:
    known: dict = {}
    for line in lines:
        if line["stage"] == "session" and line["what"] == "about":
            known |= line
        elif line["stage"] == "facts":
            renamed = {"name": "card"} if line["what"] == "card" else {}
            known = {renamed.get(key, key): value for key, value in line.items()} | known
    driver = str(known.get("driver", "unknown")).partition(",")[0]
    words = [f"{known.get('card', 'unknown card')}, driver {driver}", f"torch {known.get('torch', 'unknown')}"]
    words += [f"Triton {known.get('triton', 'unknown')}"]
    text = f"Measured on {known.get('date', 'an unknown day')} at commit {known.get('commit', 'unknown')}:"
    return f"{text}\n{', '.join(words)}.\n"


def _correctness(lines: Sequence[Line]) -> list[str]:
    """Return a table by mode and head size, and one of all other checks."""
    grouped: dict[tuple[str, int], list[Line]] = {}
    others = []
    for line in lines:
        if found := re.match(r"float64 \d+,\d+,\d+,(\d+) (\w+)", line["what"]):
            grouped.setdefault((found[2], int(found[1])), []).append(line)
        elif "distances" in line:
            others.append(line)
    rows = [
        (mode, size, len(some), _distance(max(map(_worst, some))), _number(some[0]["limit"]), _held(some))
        for (mode, size), some in grouped.items()
    ]
    text = "Distance from float64, relative L2, the worst of y, the final state and seven gradients:"
    more = [(line["what"], _distance(_worst(line)), _number(line["limit"]), _held([line])) for line in others]
    return [
        _table(text, ("mode", "N", "cases", "worst", "limit", "kept"), rows),
        _table("Other checks:", ("", "worst", "limit", "kept"), more),
    ]


def _worst(line: Line) -> float:
    """Return the largest distance; one that is no number is the worst of all."""
    return max(math.inf if isinstance(x, str) else x for x in line["distances"].values())


def _held(lines: Iterable[Line]) -> str:
    return "yes" if all(line["ok"] for line in lines) else "**no**"


def _distance(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


LAUNCHES = {  # column: launches of which it has the sum
    "prepare": ["forward prepare"],
    "scan": ["forward scan_forward", "forward scan_forward affine", "forward advance"],
    "prepare again": ["backward prepare"],
    "scan back": ["backward scan_backward", "backward scan_backward affine", "backward advance"],
    "gradient": ["backward gradient"],
    "sum of heads": ["backward sum_heads"],
}


def _times(lines: Sequence[Line]) -> str:
    timed = [line for line in lines if "launches" in line]
    known = {name for line in timed for name in line["launches"]}
    columns = {column: names for column, names in LAUNCHES.items() if not known.isdisjoint(names)}
    rows = []
    for line in timed:
        cells = []
        for names in columns.values():
            some = [line["launches"][name] for name in names if name in line["launches"]]
            ms, floor = (sum(part[key] for part in some) for key in ("ms", "floor_ms"))
            cells.append(f"{_number(ms)} ({_number(floor)})" if some else "-")
        rows.append((_case(line["what"].removeprefix("time ")), *cells, _number(line["launched_ms"])))
    text = (
        "Milliseconds of each launch, and in brackets of a copy of the bytes that it reads and writes "
        "(B,T,H,N, balanced unless another mode is named; G: heads of k, v, a, b; L: tokens of a chunk; "
        "scans with segments are three launches):"
    )
    return _table(text, ("", *columns, "all"), rows)


def _passes(kernels: Sequence[Line], peers: Sequence[Line]) -> str:
    """Return whole passes as a user calls them: ours, fla's, attention's; ours beside theirs."""
    shapes: dict[str, dict[str, str]] = {}
    tried = set()
    for line in kernels:
        if "forward_ms" in line:
            cells = {"triton": _both(line), "bytes": _number(line["ideal_ms"])}
            shapes[_case(line["what"].removeprefix("time "))] = cells
    fastest: dict[tuple[str, str], float] = {}
    for line in peers:
        found = re.fullmatch(r"(\w+)\S* B=(\d+) T=(\d+) H=(\d+) N=(\d+) ?(.*)", line["what"])
        if not found or "forward_backward_ms" not in line:
            continue
        (name, *sizes, setting), ms = found.groups(), line["forward_backward_ms"]
        shape = ",".join(sizes)
        tried |= {line["tried"]} if "tried" in line else set()
        if ms < fastest.get((shape, name), math.inf):
            fastest[shape, name] = ms
            shapes.setdefault(shape, {})[name] = _both(line) + (f" ({setting})" if setting else "")
    names = ("triton", "fla", "attention", "bytes")
    rows = [(shape, *(cells.get(name, "-") for name in names)) for shape, cells in shapes.items()]
    text = "Milliseconds forward / forward and backward as a user calls them; those of other implementations are "
    text += "of one process with ours (bytes: both passes, as a copy of what any implementation must move"
    for count in sorted(tried):
        text += f"; fla: its best setting, each kernel having tried {count} of its configurations only"
    return _table(f"{text}):", ("", "`wkv7`", "fla, `chunk_rwkv7`", "causal attention", "bytes"), rows)


def _mixers(lines: Sequence[Line]) -> list[str]:
    """Return a table of the mixer's kernels as they are launched, and one of the settings that were tried."""
    measured = [line for line in lines if "mixer_launches" in line]
    kernels = list(measured[0]["mixer_launches"]) if measured else []
    rows = [
        (
            line["what"].removeprefix("mixer "),
            *(f"{_number(part['ms'])} ({_number(part['floor_ms'])})" for part in line["mixer_launches"].values()),
        )
        for line in measured
    ]
    tried = [
        (
            *(line["what"].removeprefix("mixer "), kernel, f"{len(some)}"),
            "; ".join(f"{_number(row['ms'])}: {row['with']}" for row in some[:FASTEST]),
        )
        for line in measured
        for kernel, some in line["tried"].items()
    ]
    text = "The work around the recurrence in bf16, milliseconds of each launch, and in brackets of a copy of the "
    text += "bytes that it reads and writes:"
    return [
        _table(text, ("", *(f"`{kernel}`" for kernel in kernels)), rows),
        _table(f"Settings of them, the {FASTEST} fastest:", ("", "kernel", "tried", "fastest"), tried),
    ]


def _windows(lines: Sequence[Line]) -> str:
    measured = [line for line in lines if "window_launches" in line]
    kernels = list(measured[0]["window_launches"]) if measured else []
    rows = [
        (
            line["what"].removeprefix("windows "),
            *(f"{_number(part['ms'])} ({_number(part['floor_ms'])})" for part in line["window_launches"].values()),
            *(_number(line[f"{path}_ms"]) for path in ("triton", "pytorch")),
        )
        for line in measured
    ]
    text = "Windows in bf16, milliseconds of each launch, and in brackets of a copy of the bytes that it reads and "
    text += "writes; forward and backward as a user calls them, by these kernels and by PyTorch:"
    return _table(text, ("", *(f"`{kernel}`" for kernel in kernels), "both passes", "PyTorch"), rows)


def _both(line: Line) -> str:
    return f"{_number(line['forward_ms'])} / {_number(line['forward_backward_ms'])}"


def _decoding(lines: Sequence[Line]) -> str:
    rows = [
        (line["what"].removeprefix("decode "), *(_number(1e3 * line[f"{name}_ms"]) for name in ("graph", "floor")))
        + (_number(1e3 * line["eager_ms"]), _number(line["host_us"]))
        for line in lines
        if line["what"].startswith("decode ")
    ]
    text = "One token, 32 heads of 64, microseconds (as a CUDA graph; a copy of its bytes; called by itself; "
    text += "of the host):"
    return _table(text, ("rows", "graph", "bytes", "called", "host"), rows)


def _configurations(lines: Sequence[Line]) -> str:
    found: dict[tuple[str, str], list[Line]] = {}
    failed: dict[tuple[str, str], int] = {}
    for line in lines:
        if name := re.match(r"configurations (\w+) (\S+ \w+)", line["what"]):
            place = (name[1], _case(name[2]))
            found.setdefault(place, []).extend(line["fastest"])
            failed[place] = failed.get(place, 0) + len(line["failed"])
    rows = []
    for (part, case), tried in found.items():
        best = sorted(tried, key=lambda row: row["ms"])
        words = "; ".join(f"{_number(row['ms'])}: {row['with']}" for row in best[:FASTEST])
        last = f", the slowest {_number(best[-1]['ms'])}" if len(best) > FASTEST else ""
        rows.append((part, case, f"{len(tried)} ({failed[part, case]} failed)", words + last))
    text = f"Configurations tried, the {FASTEST} fastest, milliseconds of the launches that they concern "
    text += "(L: tokens of a chunk, BV and BK: rows and columns at a time):"
    return _table(text, ("part", "B,T,H,N", "tried", "fastest"), rows)


def _profiles(lines: Sequence[Line]) -> str:
    rows = [
        (
            *(line["kernel"], line["size"], line["tokens_per_chunk"], line["warps"], _number(line["duration_us"])),
            *(line["registers"], line["active_warps_per_scheduler"], f"{line['no_eligible_percent']} %"),
            *(f"{line['dram_percent']} %", f"{line['stall_percent']} %" if "stall_percent" in line else "-"),
        )
        for line in lines
    ]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    text = f"Nsight Compute, 2 rows of 4096 tokens and 4096 channels, balanced, at commit {commits} (warps of a "
    text += "program; warps on a scheduler; cycles in which none could issue; time waiting for loads, where it "
    text += "says so):"
    columns = (
        "",
        "N",
        "tokens of a chunk",
        "warps",
        "us",
        "registers",
        "on a scheduler",
        "none ready",
        "DRAM",
        "loads",
    )
    return _table(text, columns, rows)


def _training(lines: Sequence[Line]) -> str:
    rows = [
        (
            *(line["what"], f"{line['tokens_per_s']:,.0f}", f"{100 * line['mfu']:.1f} %"),
            *(_number(line[key]) if key in line else "-" for key in ("peak_gib", "predicted_gib")),
        )
        for line in lines
        if "mfu" in line
    ]
    text = "Training in bf16, random weights (a step's rows x tokens, and rows of a forward):"
    return _table(text, ("", "tokens/s", "MFU", "peak GiB", "predicted GiB"), rows)


def _generation(lines: Sequence[Line]) -> list[str]:
    """Return a table by length of context, and one of tokens that are launched as CUDA graphs."""
    rows = [
        (
            *(line["what"], f"{line['prefill_tokens_per_s']:,.0f}", _number(line["ms_per_token"])),
            f"{line['cache_bytes'] / 2**20:,.1f}",
        )
        for line in lines
        if "ms_per_token" in line
    ]
    graphed = [
        (line["what"], _number(line["eager_ms"]), _number(line["graphed_ms"])) for line in lines if "graphed_ms" in line
    ]
    text = "Generation in bf16, random weights (rows x tokens of context):"
    return [
        _table(text, ("", "prefill tokens/s", "ms a token", "cache MiB"), rows),
        _table("Milliseconds a token:", ("", "launched from Python", "as one CUDA graph"), graphed),
    ]


def _case(name: str) -> str:
    """Return a case's name without the mode that is meant where none is named."""
    return name.replace(" balanced", "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _table(text: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a text and a table, or nothing if there are no rows."""
    if not rows:
        return ""
    head, *body = (
        "|" + "|".join(f" {cell} " if cell != "" else " " for cell in line) + "|\n" for line in (columns, *rows)
    )
    return f"{textwrap.fill(text, WIDTH)}\n\n{head}|{'---|' * len(columns)}\n{''.join(body)}"
