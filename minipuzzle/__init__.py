"""minipuzzle makes hybrid language models smaller: it scores, searches, slices and distils.

    from minipuzzle import Recipe, Run, prune
    run = prune("path/or/hub-id", Recipe.load("default"), output_dir="runs/mine")
    run.candidates, run.model_path, run.report_path, run.plot_tradeoff()
    Run.open("runs/mine")

Names are resolved when they are first used (PEP 562): importing minipuzzle does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minipuzzle._version import __version__

if TYPE_CHECKING:
    from minipuzzle.core.budget import Budget
    from minipuzzle.core.scores import LayerScores, WidthScores
    from minipuzzle.distill.loop import distill_model
    from minipuzzle.families.architecture import Architecture
    from minipuzzle.importance.layers import score_layers
    from minipuzzle.importance.widths import score_widths
    from minipuzzle.recipes.schema import Recipe
    from minipuzzle.search.candidate import Candidate
    from minipuzzle.search.grid import search_architectures
    from minipuzzle.verbs.prune import prune
    from minipuzzle.verbs.run import Run

_HOMES = {
    "Architecture": "families.architecture",
    "Budget": "core.budget",
    "Candidate": "search.candidate",
    "LayerScores": "core.scores",
    "Recipe": "recipes.schema",
    "Run": "verbs.run",
    "WidthScores": "core.scores",
    "distill_model": "distill.loop",
    "prune": "verbs.prune",
    "score_layers": "importance.layers",
    "score_widths": "importance.widths",
    "search_architectures": "search.grid",
}

__all__ = [
    "Architecture",
    "Budget",
    "Candidate",
    "LayerScores",
    "Recipe",
    "Run",
    "WidthScores",
    "__version__",
    "distill_model",
    "prune",
    "score_layers",
    "score_widths",
    "search_architectures",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minipuzzle' has no attribute {name!r}")
    return getattr(import_module(f"minipuzzle.{_HOMES[name]}"), name)
