"""Run: a finished run, to look at from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from minipuzzle.core.errors import InputError
from minipuzzle.core.files import CANDIDATES_BYTES, read_json, reading
from minipuzzle.core.rundir import read_about
from minipuzzle.core.scores import LayerScores
from minipuzzle.pages import candidates as of_candidates
from minipuzzle.pages import layers as of_layers
from minipuzzle.pages import training
from minipuzzle.pages.compare import comparison
from minipuzzle.pages.html import render_head
from minipuzzle.pages.svg import Draw, styled
from minipuzzle.report import facts
from minipuzzle.report.report import Report
from minipuzzle.search.candidate import Candidate


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
        if not isinstance(path, str | Path):
            raise InputError(f"a run is a folder, not {type(path).__name__}")
        path = Path(path)
        hint = "'minipuzzle prune' finishes it"
        if not (path / "report.json").is_file():
            raise InputError(f"{path} is not a finished run; {hint}")
        report = read_json(path / "report.json", InputError, hint, limit=CANDIDATES_BYTES)
        with reading(path / "candidates.csv", InputError, hint):
            return cls(path, report, pd.read_csv(path / "candidates.csv"))

    plot_tradeoff = _figure(of_candidates.tradeoff)
    plot_layers = _figure(of_layers.layers)
    plot_layers_by_other_metrics = _figure(of_layers.layers_by_other_metrics)
    plot_kept_layers = _figure(of_layers.kept_grid)
    plot_prediction = _figure(of_candidates.prediction)
    plot_widths = _figure(of_layers.widths)
    plot_cuts = _figure(of_layers.cuts)
    plot_ranks = _figure(of_candidates.ranks)
    plot_tournament = _figure(training.tournament)
    plot_distillation = _figure(training.distillation)
    plot_memory = _figure(training.memory)
    plot_stages = _figure(training.stages)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {facts.headline(Report.read(self.report))}"

    def _repr_html_(self) -> str:
        return render_head(self.report)

    @property
    def layers(self) -> pd.DataFrame:
        """The layer scores, a row per layer of the parent, and whether the result `kept` it."""
        kept = self.report["result"].get("kept_layers") or []
        table = LayerScores.read(self._whole / "scores" / "layers.csv").table
        return table.assign(kept=table["layer"].isin(kept))

    def load_model(self, dtype: Any = "auto", **options: Any) -> Any:
        """The result in transformers: `AutoModelForCausalLM.from_pretrained(model_path, **options)`,
        which runs no code of the folder."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(self.model_path), dtype=dtype, local_files_only=True,
                                                    trust_remote_code=False, **options)

    def evaluate(self, data: str | None = None, teacher: str | Path | None = None, device: str = "cpu",
                 ) -> dict[str, Any]:
        """`minipuzzle evaluate` of the result against its parent (or another teacher), by the run's recipe;
        `data` in place of its own."""
        from minipuzzle.pipeline.progress import Terminal
        from minipuzzle.verbs.evaluate import evaluate
        from minipuzzle.verbs.search import run_recipe

        recipe = run_recipe(self._whole, {}, {}).with_overrides(data=data)
        return evaluate(self.model_path, teacher or str(read_about(self._whole)["model"]), recipe, device,
                        reporter=Terminal())

    def compare(self, *others: Run | str | Path) -> pd.DataFrame:
        """A row per run: sizes, losses, recovery, time."""
        runs = [self, *(other if isinstance(other, Run) else Run.open(other) for other in others)]
        if len({run.path.resolve() for run in runs}) < len(runs):
            raise InputError("compare: a run is named twice")
        return pd.DataFrame(comparison({str(run.path): run.report for run in runs})["runs"]).set_index("name")

    def search(self, budget: str | Mapping[str, str] | None = None, **settings: Any) -> pd.DataFrame:
        """`minipuzzle search RUN`: its scores under another budget, into RUN/searches/. `settings`: keys of
        the recipe's section space. A table of candidates, best first; of a sweep ("memory=0.5x,0.6x") of
        budgets."""
        from minipuzzle.verbs.search import budget_texts, research, run_recipe

        recipe = run_recipe(self._whole, budget_texts(budget), {f"space.{k}": v for k, v in settings.items()})
        return research(recipe, self._whole, None, None, None)[2]

    def prune(self, candidate: str | Candidate | None = None, budget: str | Mapping[str, str] | None = None, *,
              settings: Mapping[str, Any] | None = None, **options: Any) -> Run:
        """`prune RUN --candidate NAME`: also distil that candidate (by name, of the run or of a search;
        or one of your own) into RUN/candidates/NAME/. Or with another budget, or other `settings`
        ({"distillation.tokens": "1M"}), prune from its scores into RUN/budgets/. `options` as of
        `minipuzzle.prune`."""
        from minipuzzle.verbs.prune import prune
        from minipuzzle.verbs.search import budget_texts, run_recipe

        if candidate is not None:
            if budget or settings:
                raise InputError("a candidate was found for a budget already; leave budget and settings out")
            return prune(self._whole, candidate=candidate, **options)
        recipe = run_recipe(self._whole, budget_texts(budget), settings or {})
        return prune(self._whole, recipe, **options)

    def push_to_hub(self, repo: str | None = None, *, private: bool = True, dry_run: bool = False) -> dict[str, Any]:
        """`minipuzzle push RUN`: model/ and its card to the Hugging Face Hub."""
        from minipuzzle.verbs.push import push

        return push(self.model_path, repo or self.path.resolve().name, private, dry_run)

    @property
    def _whole(self) -> Path:
        """The run's folder, of a candidate's result too."""
        return self.path if (self.path / "run.json").is_file() else self.path.parent.parent

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"
