"""Distillation in phases: a schedule, data and lengths that change on the way, stopped anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import RECIPE, neither_gate_nor_page
from test_distill import SEQ, assert_same, blocks, rows, student, tiny_model

from minipuzzle import Recipe, prune
from minipuzzle.cli import main
from minipuzzle.core.errors import InputError
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.data.blocks import TokenBlocks
from minipuzzle.distill.loop import distill_model, first_places
from minipuzzle.distill.settings import Phase, TrainSettings
from minipuzzle.models.ranks import Ranks
from minipuzzle.pipeline.progress import Reporter, Update

SHORT, LONG = Phase(5 * 4 * SEQ, SEQ, 4 * SEQ, 3e-3), Phase(4 * 2 * 2 * SEQ, 2 * SEQ, 4 * SEQ, 3e-3)
SETTINGS = TrainSettings(SHORT.tokens + LONG.tokens, 1, 1.0, seed=5, phases=(SHORT, LONG))


def longer() -> TokenBlocks:
    return replace(blocks(), sequence_length=2 * SEQ)


def train(folder: Path, stop: int = 0) -> Any:
    """Up to the end, or to a signal after step `stop`."""
    def progress(done: int, row: dict[str, Any]) -> None:
        if row["step"] == stop:
            raise Interrupted(15)

    pupil = student()
    distill_model(pupil, tiny_model(), [blocks(), longer()], SETTINGS, folder, progress=progress)
    return pupil


def test_phases_of_one_peak_are_one_cosine_and_another_peak_begins_its_own() -> None:
    one, two, three = Phase(100, 10, 20, 1.0), Phase(90, 30, 30, 1.0), Phase(40, 20, 40, 0.5)
    made = TrainSettings(230, 0, 9.0, warmup=0.25, phases=(one, two, three)).schedule(0)
    alone = TrainSettings(0, 0, 1.0, warmup=0.25)
    assert (made.starts, made.steps) == ([0, 5, 8], 9)
    assert [made.phase(step) for step in range(9)] == [0] * 5 + [1] * 3 + [2]
    assert [made.tokens(n) for n in range(10)] == [0, 20, 40, 60, 80, 100, 130, 160, 190, 230]
    assert [made.rate(step) for step in range(8)] == [alone.rate(step, 8) for step in range(8)]
    assert made.rate(8) == 0.5  # the warm-up of its one step
    assert [made.steps_of(n) for n in (1, 20, 21, 100, 101, 130, 190, 191, None)] == [1, 1, 2, 5, 6, 6, 8, 9, 9]


def test_stopped_and_killed_in_either_phase(tmp_path: Path) -> None:
    """The weights and the rows are those of a training that nobody disturbed."""
    whole = train(tmp_path / "whole")
    found = rows(tmp_path / "whole")
    assert [row["phase"] for row in found] == [1] * 5 + [2] * 4
    assert found[-1]["tokens"] == SETTINGS.tokens
    for step in (2, 5, 7):
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", step)
        if step == 7:  # killed after a state of the first phase: rows of the second are made again
            (tmp_path / "parts" / "state-7").rename(tmp_path / "parts" / "state.tmp")
            shutil.copytree(tmp_path / "kept", tmp_path / "parts" / "state-2")
        if step == 2:
            shutil.copytree(tmp_path / "parts" / "state-2", tmp_path / "kept")
    assert_same(train(tmp_path / "parts"), whole)
    assert rows(tmp_path / "parts") == found


def test_each_phase_reads_its_own_blocks_and_goes_on_in_those_of_an_earlier_one(tmp_path: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of (seed, step): no block of an epoch comes twice where a phase reads on."""
    seen: list[np.ndarray] = []
    real = TokenBlocks.block

    def block(self: TokenBlocks, i: int) -> np.ndarray:
        seen.append(real(self, i))
        return seen[-1]

    monkeypatch.setattr(TokenBlocks, "block", block)
    again = replace(SETTINGS, phases=(SHORT, LONG, replace(SHORT, learning_rate=1e-3)))
    distill_model(student(), tiny_model(), [blocks(), longer(), blocks()], again, tmp_path)
    monkeypatch.undo()
    sizes = [len(ids) for ids in seen]
    assert sizes == [SEQ] * 20 + [2 * SEQ] * 8 + [SEQ] * 20
    order = [blocks().block(i) for i in blocks().numbers(5, 0, 40)]
    assert np.array_equal(np.stack(seen[:20] + seen[28:]), np.stack(order))
    assert np.array_equal(np.stack(seen[20:28]), np.stack([longer().block(i) for i in longer().numbers(5, 0, 8)]))
    other = replace(blocks(), corpus_hash="another")
    schedule = again.schedule(0)
    assert first_places(schedule, [blocks(), longer(), other]) == [0, 0, 0]
    assert first_places(schedule, [blocks(), longer(), blocks()]) == [0, 0, 20]
    with pytest.raises(InputError, match=r"a step of phase 2 has 2 sequences .* 4 processes cannot share"):
        distill_model(student(), tiny_model(), [blocks(), longer()], SETTINGS, tmp_path / "four",
                      ranks=Ranks(torch.device("cpu"), 0, 4))


# in a recipe
# -------------------------------------------------------------------------------------------------

PHASES = """
distillation:
  data: DATA
  tournament_tokens: 128
  sequence_length: 32
  batch_tokens: 64
  learning_rate: 3.0e-3
  phases:
    - tokens: 192
    - tokens: 256
      sequence_length: 64
      data: OTHER
      batch_tokens: 128
      learning_rate: 1.0e-3
"""


@pytest.fixture(scope="module")
def phased(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    other = shutil.copytree(texts, tmp_path_factory.mktemp("other") / "texts")
    for file in list(other.iterdir())[:150]:
        file.unlink()
    text = RECIPE.partition("distillation:")[0] + PHASES
    return Recipe.parse(text.replace("DATA", str(texts)).replace("OTHER", str(other)), "test")


class Stop(Reporter):
    """Ends the run as a signal would, when the row of this step is told."""

    def __init__(self, run: Path, step: int) -> None:
        super().__init__()
        self.metrics, self.step = run / "metrics.jsonl", step

    @contextmanager
    def _show(self, name: str, total: float) -> Iterator[Update]:
        def update(done: float, text: str = "") -> None:
            if name == "distill" and len(self.metrics.read_text().splitlines()) == self.step:
                raise Interrupted(15)

        yield update


def test_a_run_in_phases_stopped_in_the_second(phased: Recipe, model_folder: Path, tmp_path: Path) -> None:
    with neither_gate_nor_page():
        whole = prune(model_folder, phased, tmp_path / "whole")
        with pytest.raises(Interrupted):
            prune(model_folder, phased, tmp_path / "parts", reporter=Stop(tmp_path / "parts", 4))
        parts = prune(model_folder, phased, tmp_path / "parts")
    first, second = (run.report["distillation"] for run in (whole, parts))
    assert [row["phase"] for row in first["curve"]] == [1, 1, 1, 2, 2]
    assert [row["lr"] for row in first["curve"]][3] == 1e-3  # its own warm-up
    assert [(p["tokens"], p["sequence_length"], p["batch_tokens"], p["learning_rate"]) for p in first["phases"]] == [
        (192, 32, 64, 3e-3), (256, 64, 128, 1e-3)]
    assert (first["tokens"], phased.distillation.tokens) == (448, 448)
    assert {Path(p["data"]).parent.name[:5] for p in first["phases"]} == {"data0", "other"}

    def timeless(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in curve]

    assert timeless(first["curve"]) == timeless(second["curve"])
    assert (whole.model_path / "model.safetensors").read_bytes() == (parts.model_path / "model.safetensors").read_bytes()
    card = (whole.model_path / "README.md").read_text()
    assert "192 tokens of 32, then 256 of 64" in card
    assert str(phased.distillation.phases[1].data) in card
    # another rate of a phase trains again, and scores and tokens stay
    changed = phased.model_dump()["distillation"]["phases"]
    changed[1]["learning_rate"] = 2e-3
    with pytest.raises(InputError, match=r"distillation\.phases: .* stages to make again: tournament, distill, export\."):
        prune(model_folder, phased.with_overrides(settings={"distillation.phases": changed}), whole.path)


def test_what_phases_may_be(texts: Path) -> None:
    def refused(distillation: str) -> str:
        with pytest.raises(InputError) as error:
            Recipe.parse(f"recipe: 1\ndistillation: {{{distillation}}}", "mine.yaml")
        return str(error.value)

    def plan(*settings: str) -> str:
        words = [part for setting in settings for part in ("--set", setting)]
        result = CliRunner().invoke(main, ["prune", "nemotron-h-8b", "--gpu", "h200", "--dry-run", *words])
        assert result.exit_code in (0, 2), result.output
        return result.stderr or result.stdout

    assert "3,000 + 1,000 = 4,000 tokens, distillation.tokens is 5,000" in refused(
        "tokens: 5k, phases: [{tokens: 3k}, {tokens: 1k}]")
    assert "line 2: distillation.phases.1.tokens = 'many'" in refused("phases: [{tokens: 3k}, {tokens: many}]")
    assert "unknown key 'distillation.phases.0.rate'; known: tokens, sequence_length" in refused(
        "phases: [{tokens: 3k, rate: 1}]")
    assert "distillation.phases, phase 2 of 2: batch_tokens 65536 is less than one sequence of 131072 tokens" in plan(
        "distillation.phases=[{tokens: 1M}, {tokens: 1M, batch_tokens: 64k, sequence_length: 128k}]")
    assert "distillation.tournament_tokens 80,000 exceeds the 50,000 tokens of the first of 2 phases" in plan(
        "distillation.phases=[{tokens: 50k}, {tokens: 1M}]")
    assert "each of the 2 distillation.phases has its own learning_rate" in plan(
        "distillation.phases=[{tokens: 1M, learning_rate: 1.0e-3}, {tokens: 1M, learning_rate: 1.0e-4}]",
        "distillation.learning_rate=1.0e-5")
    assert "2M tokens of 8k, then 500k tokens of 32k" in plan("distillation.batch_tokens=64k", (
        "distillation.phases=[{tokens: 2M, sequence_length: 8k}, {tokens: 500k, sequence_length: 32k}]"))
    assert "nothing is trained" in plan("distillation.phases=[{tokens: 2M}]", "distillation.tokens=0")
    made = Recipe.parse("recipe: 1\ndistillation: {phases: [{tokens: 3k, data: a.txt}, {tokens: 1k}]}", "mine")
    assert (made.distillation.tokens, made.sources("distillation")) == (4000, ["a.txt", "stdlib"])
    assert Recipe.parse(made.dump(), "again") == made
    assert made.with_overrides(data=str(texts)).sources("distillation") == [str(texts)]
    fewer = made.with_overrides(settings={"distillation.phases": [{"tokens": "2k"}]})
    assert fewer.distillation.tokens == 2000
    assert made.with_overrides(settings={"distillation.phases": []}).distillation.tokens == 4000
    assert json.loads(json.dumps(made.model_dump()))["distillation"]["phases"][0]["tokens"] == 3000
