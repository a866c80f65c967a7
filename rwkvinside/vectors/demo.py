"""`rwkvinside vectors demo`: from text to a leaderboard page with decoded examples, on one small machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from ..errors import UserError
from ..support.files import write_text
from .data import Split, load_data, split
from .decoders.registry import build_decoder
from .decoders.scoring import decoded_examples
from .grid import Outcome, PlannedRun, read_plan, run_plan, write_baselines
from .leaderboard import read_baselines, read_rows, write_leaderboard
from .page import html_page
from .run import load_predictor, read_result
from .settings import RunConfig, checked
from .store import embed, read_store

PLAN, QUICK = ("vectors", "demo.yaml"), {"steps": 2, "evaluate_every": 0}
QUICK_SENTENCES = 512
SAMPLES, BEST = 4, 2  # decoded examples, and runs that decode them


def demo(out: Path, source: str, spec: str, quick: bool, say: Callable[[str], None]) -> Path:
    """Embed text, train a handful of models, write the leaderboard; return the page.

    A demo that was interrupted goes on.

    Args:
        out: directory of everything.
        source: text, see `corpora.documents_of`.
        spec: of the embedder.
        quick: a few steps only, to see that all parts work.
        say: where lines for people go.

    Raises:
        UserError: of the parts; or no run has succeeded.
    """
    store = out / "vectors"
    data = (
        read_store(store)
        if (store / "card.json").is_file()
        else embed(source, spec, store, QUICK_SENTENCES if quick else None)
    )
    say(f"{store}: {len(data.vectors):,} sentences of {data.card['source']}, {data.card['space']}")
    settings = {"data": {"source": str(store)}}
    with as_file(files("rwkvinside.recipes").joinpath(*PLAN)) as plan:
        runs = read_plan(plan, [settings, *([QUICK] if quick else [])])
    write_baselines(runs, out / "runs", say)
    outcome = run_plan(runs, out / "runs", say)
    if not outcome.finished:
        raise UserError(f"no run of the demo has succeeded: {next(iter(outcome.failed.values()), '')}")
    for path in write_leaderboard(out / "runs"):
        say(f"wrote {path}")
    both = _split_of(runs)
    page = out / "leaderboard.html"
    best = {name: load_predictor(path) for name, path in best_runs(outcome).items()}
    samples = decoded_examples(best, both, build_decoder("retrieval", both.val.data), SAMPLES)
    rows, baselines = read_rows(out / "runs"), read_baselines(out / "runs")
    write_text(page, html_page("Latent vector models", rows, baselines, samples))
    return page


def best_runs(outcome: Outcome) -> dict[str, Path]:
    """Return the runs with the best cosine, by name."""
    results = {name: read_result(path) for name, path in outcome.finished.items()}
    cosine = {name: result["metrics"]["cosine"] for name, result in results.items() if result is not None}
    names = sorted(cosine, key=lambda name: -cosine[name])[:BEST]
    return {name: outcome.finished[name] for name in names}


def _split_of(runs: list[PlannedRun]) -> Split:
    config = checked(RunConfig, runs[0].settings).data
    return split(load_data(config), config)
