"""Stages on their own: what one can see, what makes it stale, in which order they are made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minipuzzle.core.errors import InputError, ResourceError
from minipuzzle.core.rundir import RunDir
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.forecast import check_disk, check_memory, estimates
from minipuzzle.pipeline.plan import Estimate, make_plan
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.pipeline.stage import Given, Runner, Stage, restrict, values
from minipuzzle.recipes.schema import Recipe
from minipuzzle.stages.order import STAGES
from minipuzzle.verbs.source import bundled_model


def write(given: Given, name: str, text: str) -> list[Path]:
    path = given.folder / name
    path.write_text(text)
    return [path]


def first(given: Given) -> list[Path]:
    return write(given, "first.txt", f"{given.settings.calibration.samples} of {given.seed}")


def second(given: Given) -> list[Path]:
    return write(given, "second.txt", given.file("first.txt").read_text() + " and more")


FIRST = Stage("first", first, settings=("calibration.samples",), world=("seed",))
SECOND = Stage("second", second, after=("first",))
WORLD: Any = SimpleNamespace(seed=3, identities={"seed": lambda: 3})


def runner(folder: Path, recipe: Recipe, *stages: Stage) -> Runner:
    return Runner(stages, recipe, WORLD, RunDir(folder), Ranks(torch.device("cpu")), Reporter())  # type: ignore[arg-type]


def with_samples(samples: int) -> Recipe:
    return Recipe().with_overrides(settings={"calibration.samples": samples})


def test_a_stage_sees_what_it_declares_and_nothing_else(tmp_path: Path) -> None:
    seen: list[Given] = []

    def look(given: Given) -> list[Path]:
        seen.append(given)
        return []

    stage = Stage("look", look, settings=("calibration.samples", "search"), after=("first",))
    one = runner(tmp_path / "run", with_samples(7), FIRST, SECOND, stage)
    one.make()
    (given,) = seen
    assert given.settings.calibration.samples == 7
    assert given.settings.search == Recipe().search
    assert given.file("first.txt").read_text() == "7 of 3"
    with pytest.raises(AttributeError):
        _ = given.settings.calibration.sequence_length
    with pytest.raises(AttributeError):
        _ = given.settings.distillation
    with pytest.raises(AssertionError, match=r"second\.txt"):
        given.file("second.txt")
    for what in ("seed", "parent", "tokenizer", "candidate"):
        with pytest.raises(AssertionError, match="does not declare"):
            getattr(given, what)
    one.run.close()


def test_a_stage_is_made_again_when_what_it_declares_changed_and_only_then(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before = runner(folder, with_samples(7), FIRST, SECOND)
    before.make()
    before.run.close()
    (folder / "second.txt").rename(tmp_path / "kept.txt")  # a stage that runs writes it anew
    (tmp_path / "kept.txt").rename(folder / "second.txt")
    other = runner(folder, with_samples(7).with_overrides(settings={"search.measure": 3}), FIRST, SECOND)
    other.refuse_changes(redo=False)
    other.run.close()
    changed = runner(folder, with_samples(8), FIRST, SECOND)
    with pytest.raises(InputError, match=r"calibration.samples: 7 -> 8.*again: first, second"):
        changed.refuse_changes(redo=False)
    changed.refuse_changes(redo=True)
    changed.make()
    assert (folder / "second.txt").read_text() == "8 of 3 and more"
    changed.run.close()


def test_the_order_is_that_of_the_data(tmp_path: Path) -> None:
    third = Stage("third", second, after=("second", "first"))
    one = runner(tmp_path / "run", Recipe(), third, SECOND, FIRST)
    assert list(one.stages) == ["first", "second", "third"]
    one.make()
    assert [row["status"] for row in one.stage_list()] == ["done"] * 3
    one.run.close()


def test_a_restricted_recipe_keeps_whole_sections_and_single_keys() -> None:
    view = restrict(Recipe(), ("search", "surgery.hidden"))
    assert view.search.measure == Recipe().search.measure
    assert view.surgery.hidden == Recipe().surgery.hidden
    with pytest.raises(AttributeError):
        _ = view.surgery.refit
    assert values(Recipe(), ("surgery.hidden", "scores")).keys() == {
        "surgery.hidden", *(f"scores.{k}" for k in Recipe().scores.model_dump())}


def test_what_a_stage_takes_is_asked_of_its_declaration(tmp_path: Path) -> None:
    """Seconds, memory and disk: no list beside the stages knows them."""
    plan = make_plan(open_model(bundled_model()).arch, Recipe(), memory_bytes=2**20)
    greedy = Stage("greedy", lambda given: [], lambda plan: Estimate(seconds=7.0, memory_bytes=3 * 2**40, disk_bytes=2**70))
    assert estimates(plan, (greedy,)) == {"greedy": 7.0}
    with pytest.raises(ResourceError, match="needs about 3 TiB"):
        check_memory(plan, (greedy,), torch.device("cpu"))
    with pytest.raises(ResourceError, match="free, the run needs about"):
        check_disk(plan, (greedy,), tmp_path)
    takes = {stage.name: stage.estimate(plan) for stage in STAGES}
    assert all(takes[name].memory_bytes > 0 for name in ("score", "curves", "measure", "tournament", "distill", "export"))
    # a state of each finalist, the winner's, the one before it while that is written; the folder
    assert sum(need.disk_bytes for need in takes.values()) == plan.largest.parameters * (
        16 * (Recipe().search.finalists + 2) + 8)
