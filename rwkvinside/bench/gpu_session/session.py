"""The parent of a session: it starts stages, kills what overruns, and never has a CUDA context itself.

Every stage is a process of its own. It appends a line to results.jsonl after each measurement, so nothing that was
measured is lost, and what fails in one stage does not reach the next.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TextIO

from ...errors import UserError
from .results import LOG, RESULTS, SUMMARY, append, read, summary
from .staging import PACKAGE, environment, importable
from .tables import PAGE, write_tables

BROKEN = 75  # exit code of a process whose CUDA context no longer works (EX_TEMPFAIL: try again)
RESTARTS = 5  # of one stage
STAGE_BEGUN, BEGUN = "=== ", "--- "  # lines of the log


@dataclass(frozen=True)
class StageEntry:
    """A stage in the order of the session.

    Attributes:
        name: as in the results.
        seconds: its share of a session that has as many as all stages together; see `share`.
        minimum: seconds below which it is not worth starting.
        module: has `run(stage)`.
    """

    name: str
    seconds: float
    minimum: float
    module: str


def _entry(name: str, seconds: float, minimum: float) -> StageEntry:
    return StageEntry(name, seconds, minimum, f"{__package__}.{name}")


STAGES = (  # what is least known first, so that a short session has it
    _entry("facts", 20, 10),
    _entry("training", 170, 55),
    _entry("generation", 80, 30),
    _entry("correct", 80, 20),
    _entry("kernels", 100, 20),
    _entry("peers", 60, 15),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `rwkvinside bench gpu`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help=f"measure; for {RESULTS}, {LOG} and {SUMMARY}")
    what.add_argument(
        "--write-docs", metavar="FILE", help=f"measure nothing; write the tables of {PAGE} from such a {RESULTS}"
    )
    parser.add_argument("--budget", type=float, default=520.0, metavar="S", help="seconds in all (default: 520)")
    parser.add_argument("--dry", action="store_true", help="run all of it on the CPU, with tiny shapes")
    parser.add_argument(
        "--stages", metavar="A,B", help=f"in this order, of {', '.join(e.name for e in STAGES)} (default: all)"
    )


def main(args: argparse.Namespace) -> int:
    """Run a session and print its summary, or write the tables of the docs; return 1 if a stage did not end well.

    Raises:
        UserError: an unknown stage, or files that are not there.
    """
    if args.write_docs is not None:
        write_tables(Path(args.write_docs))
        return 0
    directory = Path(args.out).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no process is left behind
    return run_session(directory, chosen(args.stages), args.budget, dry=args.dry)


def chosen(names: str | None) -> list[StageEntry]:
    """Return the stages of a list of names in its order; all of them where there is none.

    Raises:
        UserError: an unknown name, or one that is there twice.
    """
    known = {entry.name: entry for entry in STAGES}
    asked = list(known) if names is None else names.split(",")
    for name in asked:
        if name not in known:
            raise UserError(f"there is no stage {name!r}", f"stages: {', '.join(known)}")
    if len(set(asked)) < len(asked):
        raise UserError(f"--stages has a stage twice: {names}")
    return [known[name] for name in asked]


def share(entry: StageEntry, later: Sequence[StageEntry], left: float) -> float:
    """Return the seconds of `left` that a stage gets: in proportion to what later ones get, but its minimum at least.

    So what earlier stages have not used goes to all that follow.
    """
    total = entry.seconds + sum(other.seconds for other in later)
    return min(left, max(entry.minimum, left * entry.seconds / total))


def run_session(directory: Path, entries: Sequence[StageEntry], budget: float, *, dry: bool) -> int:
    """Run stages in order, print their summary and write it; see `main`.

    Args:
        directory: made if need be; results of an earlier session in it are replaced.
        entries: the stages.
        budget: seconds for all of them; see `share`.
        dry: on the CPU, with tiny shapes.
    """
    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, LOG, SUMMARY):
        (directory / name).unlink(missing_ok=True)
    append(directory, {"stage": "session", "what": "about", "date": f"{date.today()}", "commit": _commit()})
    with importable() as folder, open(directory / LOG, "a", encoding="utf-8") as log:
        process = _Processes(directory, folder, environment(folder, dry=dry), log, dry)
        for place, entry in enumerate(entries):
            left = budget - (time.monotonic() - started)
            if left < entry.minimum:
                end = {"ended": "skipped", "seconds": 0.0}
                end["why"] = f"{max(left, 0):.0f} s left, it needs {entry.minimum:g}"
            else:
                end = process.run(entry, share(entry, entries[place + 1 :], left))
            append(directory, {"stage": entry.name, "what": "stage", **end})
            print(f"{entry.name}: {end['ended']} after {end['seconds']:.1f} s", flush=True)
    lines = read(directory / RESULTS)
    table = summary(lines)
    (directory / SUMMARY).write_text(table, encoding="utf-8")
    print(table, flush=True)
    return int(any(line["ended"] != "ok" for line in lines if "ended" in line))


def _commit() -> str:
    """Return the commit of the working tree, or "unknown": of a copy, of an installed package."""
    if not (PACKAGE.parent / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(PACKAGE.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


@dataclass
class _Processes:
    """Starts the processes of stages.

    Attributes:
        directory: of the results.
        folder: working directory.
        environment: of the processes.
        log: gets what they print.
        dry: on the CPU.
    """

    directory: Path
    folder: Path
    environment: dict[str, str]
    log: TextIO
    dry: bool

    def run(self, entry: StageEntry, limit: float) -> dict:
        """Run a stage to its end or limit; return how it ended.

        Where a measurement takes the process or its CUDA context down, another one goes on behind it.
        """
        started = time.monotonic()
        print(f"{STAGE_BEGUN}{entry.name}, at most {limit:.0f} s", file=self.log, flush=True)
        skip = 0
        for _ in range(RESTARTS + 1):
            left = limit - (time.monotonic() - started)
            code = self._run_once(entry, left, skip)
            if code is None or not (code == BROKEN or code < 0):
                break
            skip = self._after_crash(entry, code)
            if limit - (time.monotonic() - started) < entry.minimum / 2:
                break
        end = {"seconds": round(time.monotonic() - started, 2)}
        if code is None:
            return {"ended": "killed", **end, "why": f"at its limit of {limit:.0f} s, in: {self._begun()}"}
        if code != 0:
            return {"ended": "failed", **end, "why": f"exit code {code}"}
        own = [line for line in read(self.directory / RESULTS) if line["stage"] == entry.name]
        if own and all("error" in line for line in own):
            return {"ended": "failed", **end, "why": "no measurement succeeded"}
        return {"ended": "ok", **end}

    def _after_crash(self, entry: StageEntry, code: int) -> int:
        """Return the number of measurements that the next process leaves out; note the one that crashed."""
        lines = [line for line in read(self.directory / RESULTS) if line["stage"] == entry.name]
        done = max((line.get("attempt", -1) for line in lines), default=-1)
        if code == BROKEN:  # a process that could still speak has written the line itself
            return done + 1
        error = f"the process ended with {signal.Signals(-code).name}"
        append(self.directory, {"stage": entry.name, "what": self._begun(), "attempt": done + 1, "error": error})
        return done + 2

    def _begun(self) -> str:
        """Return the measurement that was begun last, from the log."""
        text = (self.directory / LOG).read_text(encoding="utf-8", errors="replace")
        begun = [line for line in text.splitlines() if line.startswith((BEGUN, STAGE_BEGUN))]
        return begun[-1][len(BEGUN) :] if begun and begun[-1].startswith(BEGUN) else "before the first measurement"

    def _run_once(self, entry: StageEntry, seconds: float, skip: int) -> int | None:
        """Return the exit code of a process; None: it was killed at its limit."""
        words = [entry.name, "--module", entry.module, "--out", str(self.directory), "--seconds", f"{seconds:.1f}"]
        words += ["--skip", str(skip), *(["--dry"] if self.dry else [])]
        child = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.stage", *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,
        )
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also what it has started and left behind
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
