"""Write the figures of a run."""

from pathlib import Path

from ..errors import UserError
from ..runs.directory import RunDirectory
from ..runs.metrics_file import read_metrics
from .figures import alignment_figure, loss_figure, overview_figure, save_figure, validation_figure

FIGURES = {
    "report.png": overview_figure,
    "loss.png": loss_figure,
    "alignment.png": alignment_figure,
    "validation.png": validation_figure,
}


def write_report(run: Path, out: Path | None = None) -> list[Path]:
    """Draw what a run has measured so far.

    Args:
        run: run directory with a metrics.jsonl.
        out: folder for the PNGs; None is the run directory, where an export looks for report.png.

    Returns:
        The files written: report.png (everything on one page) and one file for each figure with data.

    Raises:
        UserError: no metrics, a damaged line, or nothing to draw.
    """
    metrics = RunDirectory(run).metrics
    rows = read_metrics(metrics)
    written = []
    for name, draw in FIGURES.items():
        figure = draw(rows)
        if figure is not None:
            path = (out or run) / name
            save_figure(figure, path)
            written.append(path)
    if not written:
        raise UserError(f"{metrics} has no training step and no evaluation yet", "train the run first")
    return written
