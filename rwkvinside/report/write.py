"""Write what people look at of a run: the page, and each figure with the numbers behind it."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from ..support.files import write_text
from .facts import run_facts
from .figures import overview_figure, save_figure
from .page import Picture, pictures_of, report_page
from .tables import csv_text

PAGE, OVERVIEW, FIGURES = "report.html", "report.png", "figures"


def write_report(run: Path, out: Path | None = None, evaluation: Path | None = None) -> list[Path]:
    """Write what a run has measured so far.

    Args:
        run: run directory with a metrics.jsonl.
        out: folder to write into; None is the run directory, where an export looks for report.png.
        evaluation: JSON of `rwkvinside eval` for the scores by position; None is eval.json in the run directory.

    Returns:
        The files written: report.html, report.png (the figures on one picture, for a model card), and for each figure
        with data figures/NAME.svg, .pdf and .csv.

    Raises:
        UserError: no metrics, a damaged line, or nothing to draw.
    """
    facts, out = run_facts(run, evaluation), out or run
    overview = overview_figure(facts.rows)
    if overview is None:
        raise UserError(f"{run / 'metrics.jsonl'} has no training step and no evaluation yet", "train the run first")
    pictures = pictures_of(facts)
    save_figure(overview, out / OVERVIEW)
    files = write_pictures(pictures.values(), out / FIGURES)
    write_text(out / PAGE, report_page(facts, pictures))
    return [out / PAGE, out / OVERVIEW, *files]


def write_pictures(pictures: Iterable[Picture], folder: Path) -> list[Path]:
    """Write figures as SVG and PDF and their numbers as CSV; return the files."""
    written = []
    for picture in pictures:
        for form in ("svg", "pdf"):
            save_figure(picture.figure, folder / f"{picture.name}.{form}")
        write_text(folder / f"{picture.name}.csv", csv_text(picture.rows))
        written += [folder / f"{picture.name}.{form}" for form in ("svg", "pdf", "csv")]
    return written
