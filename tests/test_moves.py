"""Local moves: where they lead, and when they stop."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_together import PARENT, SCORES, SPACE, alone, curves_of

from minipuzzle import Recipe, prune
from minipuzzle.core.budget import Budget, Workload
from minipuzzle.core.scores import LayerScores
from minipuzzle.costs.cost import cost
from minipuzzle.search.damage import predict
from minipuzzle.search.grid import search_architectures
from minipuzzle.search.moves import Neighbourhood, improved

WORKLOAD = Workload()
WHOLE = cost(PARENT, WORKLOAD).to_json()


def additive(drops, widths):
    return sum(drops) + sum(alone(*w) for w in widths)


def point(c):
    return (*(sum(PARENT.pattern[i] == kind for i in c.kept_layers) for kind in "M-*"),
            *(c.architecture.sizes()[axis] for axis in SPACE.widths))


@settings(max_examples=20)
@given(st.floats(0.45, 0.9), st.sampled_from(["memory", "params"]), st.integers(0, 2**31))
def test_moves_stay_in_the_space_and_the_budget(part, key, seed):
    """From any measured candidates, twice: one swap at the same cost, or one axis larger and at most
    one smaller; never one that was measured."""
    chance = np.random.default_rng(seed)
    scores = LayerScores(SCORES.table.assign(mse=chance.uniform(0.1, 1, PARENT.num_layers)))
    keep = frozenset(map(int, chance.choice([i for i, k in enumerate(PARENT.pattern) if k == "M"], 2, replace=False)))
    scores = dataclasses.replace(scores, keep=keep)  # the space drops 4 of 7
    curves = curves_of(additive)[0] if chance.random() < 0.5 else None
    budget = Budget.parse({key: f"{part:.3f}x"}, WHOLE)
    found = search_architectures(PARENT, SPACE, budget, WORKLOAD, scores, curves, "mse").candidates
    where = Neighbourhood(PARENT, SPACE, budget, WORKLOAD, predict(PARENT, SPACE, scores, curves, "mse"),
                          keep)
    measured = [dataclasses.replace(found[i], measured={"kl": chance.uniform()})
                for i in chance.choice(len(found), min(3, len(found)), replace=False)]
    for _ in range(2):
        near = where.around(measured, 12)
        assert len(near) <= 12
        for c in near:
            assert c.cost == cost(c.architecture, WORKLOAD)
            assert not budget.exceeded(c.cost.to_json())
            assert all(c.architecture.pattern.count(kind) in {PARENT.pattern.count(kind) - n for n in drops}
                       for kind, drops in zip("M-*", SPACE.drops.values(), strict=True))
            assert all(c.architecture.sizes()[axis] in (*values, 0) for axis, values in SPACE.widths.items())
            assert (c.predicted["damage"] is None) == (curves is None and scores is None)
            assert keep <= set(c.kept_layers)
            assert any(_one_move(base, c) for base in measured)
        keys = [(c.kept_layers, c.architecture) for c in (*measured, *near)]
        assert len(set(keys)) == len(keys)
        measured += [dataclasses.replace(c, measured={"kl": chance.uniform()}) for c in near]


def _one_move(base, c):
    before, after = point(base), point(c)
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b and a and b]
    if not changed and before[:3] == after[:3]:
        return len(set(base.kept_layers) ^ set(c.kept_layers)) == 2 and c.cost == base.cost
    return sum(b > a for a, b in changed) <= 1 and sum(b < a for a, b in changed) <= 1


def test_a_layer_that_was_scored_wrongly_comes_back():
    """The best swap is the one that costs least by the scores; and all around the cut are tried."""
    budget = Budget.parse({"params": "0.7x"}, WHOLE)
    found = search_architectures(PARENT, SPACE, budget, WORKLOAD, SCORES, None, "mse").candidates
    where = Neighbourhood(PARENT, SPACE, budget, WORKLOAD, predict(PARENT, SPACE, SCORES, None, "mse"))
    base = dataclasses.replace(next(c for c in found if c.architecture.pattern.count("M") == 5), measured={"kl": 1.0})
    swaps = [c for c in where.around([base], 1000) if point(c) == point(base)]
    assert len(swaps) >= 8
    damage = [c.predicted["damage"] for c in swaps]
    assert damage == sorted(damage)
    assert damage[0] > base.predicted["damage"]
    values = SCORES.metric("mse")
    for c in swaps:
        (back,), (gone,) = set(c.kept_layers) - set(base.kept_layers), set(base.kept_layers) - set(c.kept_layers)
        assert c.predicted["damage"] == pytest.approx(base.predicted["damage"] + values[gone] - values[back])


def test_better_beyond_the_error_of_the_difference():
    hard, wobble = np.linspace(0, 10, 16), np.tile([-0.1, 0.1], 8)
    assert improved(hard - 0.05 + wobble, hard)
    assert not improved(hard - 0.02 + wobble, hard)
    assert not improved(hard, hard)


@pytest.mark.usefixtures("without_gate_and_page")
def test_moves_are_measured_and_may_win(model_folder: Path, recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    """At most as many as asked for, beside all that were measured before; what is best goes on."""
    shutil.copytree(finished, tmp_path / "run")
    run = prune(model_folder, recipe.with_overrides(settings={"search.moves": 6}), tmp_path / "run", redo=True)
    before, after = (json.loads((path / "search" / "measured.json").read_text()) for path in (finished, run.path))
    assert before == after
    found = {c["name"]: c for c in json.loads((run.path / "candidates.json").read_text())["candidates"]}
    moves = [c for name, c in found.items() if name.startswith("m")]
    assert 3 <= len(moves) <= 6
    assert all(c["measured"]["kl"] > 0 and "kls" not in c["measured"] for c in moves)
    least = sorted((c["measured"]["kl"], name) for name, c in found.items() if c["measured"])
    trained = {name for name, c in found.items() if c["after_distillation"]}
    assert trained == {name for _, name in least[:2]}
    assert run.report["search"]["measured"] == 3 + len(moves)
    assert run.report["search"]["moves"] == len(moves)
    if least[0][1] in after:  # nothing was better: one round
        assert len(moves) == 3
