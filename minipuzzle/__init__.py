"""minipuzzle makes hybrid language models smaller: it scores, searches, slices and distils.

    from minipuzzle import Recipe, Run, prune
    run = prune("path/or/hub-id", Recipe.load("default"), output_dir="runs/mine")
    run.candidates, run.layers, run.model_path, run.report_path, run.plot_tradeoff()
    run.evaluate(), run.load_model(), run.search("memory=0.6x"), run.prune("c0012"), run.compare("runs/other")
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
    from minipuzzle.families.architecture import Architecture
    from minipuzzle.recipes.schema import Recipe
    from minipuzzle.search.candidate import Candidate
    from minipuzzle.verbs.notebook import distill_model, score_layers, score_widths
    from minipuzzle.verbs.prune import prune
    from minipuzzle.verbs.run import Run
    from minipuzzle.verbs.search import search_architectures

_HOMES = {
    "Architecture": "families.architecture",
    "Budget": "core.budget",
    "Candidate": "search.candidate",
    "LayerScores": "core.scores",
    "Recipe": "recipes.schema",
    "Run": "verbs.run",
    "WidthScores": "core.scores",
    "distill_model": "verbs.notebook",
    "prune": "verbs.prune",
    "score_layers": "verbs.notebook",
    "score_widths": "verbs.notebook",
    "search_architectures": "verbs.search",
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


def __dir__() -> list[str]:
    return __all__
