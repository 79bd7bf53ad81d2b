"""Candidates on disk: `search` writes them whole, later stages what they add to some of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from minipuzzle.core.budget import Budget, Workload
from minipuzzle.core.files import CANDIDATES_BYTES, read_json, reading, write_atomic
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.grid import SearchResult, search_architectures
from minipuzzle.search.keep import keep_retrieval
from minipuzzle.search.rank import rank
from minipuzzle.search.space import Space

AGAIN = "run with --redo to make it again"
Qualities = dict[str, dict[str, Any]]  # by a candidate's name
PREDICTED, MEASURED, MOVES, CONTROLS, TOURNAMENT = (
    f"search/{name}.json" for name in ("predicted", "measured", "moves", "controls", "tournament"))


def write_candidates(path: Path, candidates: list[Candidate]) -> None:
    """All that is known of them."""
    write_atomic(path, json.dumps([c.to_json() for c in candidates], allow_nan=False))


def read_candidates(files: Mapping[str, Path], chosen: Candidate | None = None, by: str = "kl") -> list[Candidate]:
    """The candidates as the stages that made `files` left them, best first.

    `by`: the recipe's search.rank. After the tournament the winner is `chosen`, and comes first.
    `chosen` in its place need not be one of them: a later search may have found it.

    Raises:
        CorruptArtifact: a file is damaged.
    """
    found = _read(files[PREDICTED])
    if MEASURED in files:
        measured = read_json(files[MEASURED], hint=AGAIN)
        found = [replace(c, measured=measured.get(c.name)) for c in found] + read_moves(files)
    if TOURNAMENT not in files:
        return rank(found, by)
    about = read_tournament(files)
    with reading(files[TOURNAMENT], hint=AGAIN):
        first = chosen.name if chosen else about["winner"]
        found += [chosen] if chosen and first not in {c.name for c in found} else []
        found = [replace(c, after_distillation=about["found"].get(c.name), chosen=c.name == first) for c in found]
    return sorted(rank(found, by), key=lambda c: not c.chosen)


def read_moves(files: Mapping[str, Path]) -> list[Candidate]:
    """The neighbours of the best that were measured too."""
    return _read(files[MOVES])


def read_controls(files: Mapping[str, Path]) -> list[Candidate]:
    """Random architectures of the space, measured."""
    return rank(_read(files[CONTROLS]))


def read_tournament(files: Mapping[str, Path]) -> dict[str, Any]:
    """`winner`, `found` (name -> quality after its last step of the tournament, and its `tokens`),
    `marks` (tokens of each comparison), `key` of the states' folders."""
    about: dict[str, Any] = read_json(files[TOURNAMENT], hint=AGAIN)
    return about


def chosen_one(files: Mapping[str, Path], chosen: Candidate | None) -> Candidate:
    """The candidate that is distilled."""
    return read_candidates(files, chosen)[0]


def _read(path: Path) -> list[Candidate]:
    with reading(path, hint=AGAIN):
        about = path.stat()
    return list(_parsed(path, about.st_mtime_ns, about.st_size))


@lru_cache(maxsize=4)
def _parsed(path: Path, mtime_ns: int, size: int) -> tuple[Candidate, ...]:
    """Of a file in this state: every stage asks, and thousands of candidates take a second to
    read."""
    found = read_json(path, hint=AGAIN, top=list, limit=CANDIDATES_BYTES)
    with reading(path, hint=AGAIN):
        return tuple(Candidate.from_json(c) for c in found)


def find_candidates(recipe: Recipe, parent: Architecture, space: Space, budget: Budget, workload: Workload,
                    scores: LayerScores | None, curves: WidthCurves | None) -> SearchResult:
    """What `search_architectures` finds by the recipe's settings; raises what it raises."""
    search = recipe.search
    space, scores = keep_retrieval(search.keep_retrieval, workload.context, parent, space, scores)
    return search_architectures(parent, space, budget, workload, scores, curves, recipe.scores.layer_metric,
                                search.keep, search.damage)


def candidates_document(budget: Budget, workload: Workload, parent_name: str, parent: Architecture,
                        candidates: list[Candidate], warnings: list[str] | None = None) -> dict[str, Any]:
    """candidates.json: the budget, the parent, and every candidate with its cost and quality;
    `warnings` where the order does not tell all."""
    about = {"name": parent_name, "architecture": parent.to_json(), "cost": cost(parent, workload).to_json()}
    return {"schema": 1, "budget": budget.to_json(), "workload": workload.to_json(), "parent": about,
            "warnings": warnings or [], "candidates": [c.to_json() for c in candidates]}
