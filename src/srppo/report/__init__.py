"""The report: report.html and plots/*.png, made of nothing but the files of a run folder, whatever of them there is."""

from __future__ import annotations

from pathlib import Path

from srppo.files import write_bytes, write_errors
from srppo.links import refuse_links
from srppo.report.page import render
from srppo.report.plots import draw_all
from srppo.report.record import read_run
from srppo.report.speed import closing_line

__all__ = ["closing_line", "write_report"]


def write_report(run_folder: str | Path) -> Path:
    """Write the plots and the page into a run folder; returns the page's path.

    Raises RunFolderError where the folder is no run or cannot be written. What an unfinished run lacks is named on the page.
    """
    record = read_run(run_folder)
    refuse_links(record.path)
    plots = draw_all(record)
    folder = record.path / "plots"
    with write_errors(folder):
        folder.mkdir(exist_ok=True)
    for plot in plots:
        write_bytes(folder / f"{plot.name}.png", plot.png)
    page = record.path / "report.html"
    write_bytes(page, render(record, plots).encode("utf-8", "replace"))
    return page
