"""Successive halving of finalists: its arithmetic, who stays, and a real tournament."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prune import Recorder

from minipuzzle import Recipe, prune
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.distill.trained import read_metrics
from minipuzzle.search.halving import entrants, marks_of, price, stay


@given(st.integers(1, 30), st.integers(1, 400), st.integers(0, 2**31))
def test_halving_never_takes_more_than_equal_shares(finalists, share, seed):
    """Whatever the losses are: those that do not win get (finalists - 1) shares at most, and one
    is left."""
    chance = np.random.default_rng(seed)
    marks, begin, spare = marks_of(share), 0, (finalists - 1) * share
    assert marks[-1] == share
    left = [f"c{i}" for i in range(entrants(finalists, share))]
    assert finalists <= len(left) <= 3 * finalists
    tokens = dict.fromkeys(left, 0)
    for i, mark in enumerate(marks):
        for name in left:
            tokens[name] = mark
        spare -= (len(left) - 1) * (mark - begin)
        begin = mark
        losses = {name: None if chance.random() < 0.05 else chance.normal(chance.normal(), 1, 8)
                  for name in left}
        going = stay(losses, marks[i:], spare)
        assert set(going) <= {name for name in left if losses[name] is not None}
        if len(going) <= 1:
            break
        left = going
    assert len(going) == 1 or all(values is None for values in losses.values())
    assert sum(tokens.values()) - max(tokens.values()) <= (finalists - 1) * share


def test_four_finalists_begin_as_twelve():
    """12 to 1/8 of a share, 6 to 1/4, 3 to 1/2: half a share less than 4 to their end."""
    assert marks_of(80) == [10, 20, 40, 80]
    assert entrants(4, 80) == 12
    assert price(12, [0, 10, 20, 40, 80]) == 11 * 10 + 5 * 10 + 2 * 20 == 200 < 3 * 80


def test_the_error_of_the_difference_decides_who_stays():
    """Blocks differ by far more than finalists: only the difference block by block tells them
    apart."""
    hard = np.linspace(0, 10, 16)
    wobble = np.tile([-0.1, 0.1], 8)
    losses = {"c": hard + 0.2, "a": hard, "d": hard + 0.3 + wobble, "b": hard + 0.02 + wobble}
    assert stay(losses, [1, 2], spare=100) == ["a", "b"]  # c and d are worse beyond their error
    losses["c"] = hard + 0.03 - wobble
    assert stay(losses, [1, 2], spare=100) == ["a", "b", "c"]  # not told from b
    assert stay(losses, [1, 2], spare=1) == ["a", "b"]  # but not paid for
    assert stay(losses, [1, 2], spare=0) == ["a"]
    assert stay(losses, [2], spare=100) == ["a"]  # the last mark
    assert stay({"a": None, "b": None}, [1, 2], spare=100) == []
    assert stay({"a": None, "b": np.array([np.nan])}, [1], spare=100) == []


SETTINGS = {"search.tournament": "halving", "search.measure": 6, "distillation.tournament_tokens": 512,
            "distillation.tokens": 1024}


def rows(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second" and not k.startswith("eval_")}
            for row in read_metrics(folder)]


@pytest.mark.usefixtures("without_gate_and_page")
def test_a_tournament_by_halves(model_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Stopped in its second round and continued it is what it would have been; the winner's training is
    that of the same candidate in a run where all are trained alike."""
    halving = recipe.with_overrides(settings=SETTINGS)
    run = prune(model_folder, halving, tmp_path / "run")
    about = json.loads((run.path / "search" / "tournament.json").read_text())
    tokens = {name: found["tokens"] for name, found in about["found"].items()}
    assert about["marks"] == [64, 128, 256, 512]
    assert len(tokens) == 6
    assert sorted(tokens.values())[:3] == [64, 64, 64]
    assert tokens[about["winner"]] == max(tokens.values()) >= 128
    told = run.report["distillation"]
    assert told["tokens"] == 1024
    assert told["tokens_all"] == 1024 + sum(tokens.values()) - tokens[about["winner"]] <= 1024 + 512
    order = [c["after_distillation"]["tokens"] for c in run.report["candidates"] if c["after_distillation"]]
    assert order == sorted(order, reverse=True)

    stopped = tmp_path / "stopped"
    shutil.copytree(run.path, stopped, ignore=shutil.ignore_patterns("distillation", "model"))
    for name in ("tournament", "distill", "export"):
        (stopped / "stages" / f"{name}.json").unlink()
    with pytest.raises(Interrupted):
        prune(model_folder, halving, stopped, reporter=Recorder("tournament", 3))
    assert len(list(stopped.glob("distillation/*/state-*"))) == 6
    prune(model_folder, halving, stopped)
    for name in ("search/tournament.json", "model/model.safetensors", "candidates.json"):
        assert (stopped / name).read_bytes() == (run.path / name).read_bytes(), name

    alike = recipe.with_overrides(settings=SETTINGS | {"search.tournament": "equal", "search.finalists": 6})
    shutil.copytree(run.path, tmp_path / "alike", ignore=shutil.ignore_patterns("distillation", "model"))
    equal = prune(model_folder, alike, tmp_path / "alike", redo=True)
    assert equal.report["distillation"]["tokens_all"] == 1024 + 5 * 512
    if equal.report["result"]["candidate"] != about["winner"]:
        equal = prune(model_folder, alike, equal.path, candidate=about["winner"])
    assert rows(equal.path) == rows(run.path)
