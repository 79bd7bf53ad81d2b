"""Run: a finished run, to look at from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from minipuzzle.core.errors import InputError
from minipuzzle.core.files import CANDIDATES_BYTES, read_json, reading
from minipuzzle.report import curves, plots
from minipuzzle.report.report import Report
from minipuzzle.report.svg import Draw, styled


def _figure(draw: Draw) -> Callable[[Run], Figure | None]:
    def plot(self: Run) -> Figure | None:
        return styled(draw, Report.read(self.report))

    plot.__doc__ = f"{draw.__doc__} None where the run has nothing to draw."
    return plot


@dataclass(frozen=True)
class Run:
    """A finished run, or the result of one of its candidates (RUN/candidates/NAME).

    `candidates` has a row per candidate: first what is in `model/`, then best first. The figures
    are those of the report.
    """

    path: Path
    report: dict[str, Any]
    candidates: pd.DataFrame

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in a folder.

        Raises:
            InputError: it is not a finished one.
        """
        path = Path(path)
        hint = "'minipuzzle prune' finishes it"
        if not (path / "report.json").is_file():
            raise InputError(f"{path} is not a finished run; {hint}")
        report = read_json(path / "report.json", InputError, hint, limit=CANDIDATES_BYTES)
        with reading(path / "candidates.csv", InputError, hint):
            return cls(path, report, pd.read_csv(path / "candidates.csv"))

    plot_tradeoff = _figure(plots.tradeoff)
    plot_layers = _figure(plots.layers)
    plot_layers_by_other_metrics = _figure(plots.layers_by_other_metrics)
    plot_kept_layers = _figure(plots.kept_grid)
    plot_prediction = _figure(plots.prediction)
    plot_widths = _figure(curves.widths)
    plot_cuts = _figure(curves.cuts)
    plot_ranks = _figure(curves.ranks)
    plot_tournament = _figure(curves.tournament)
    plot_distillation = _figure(curves.distillation)
    plot_memory = _figure(curves.memory)
    plot_stages = _figure(curves.stages)

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"
