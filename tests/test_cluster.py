"""Forecasts for GPUs that are not here, and the dry run that ends as the run would."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from minipuzzle.cli import main
from minipuzzle.core.devices import find_device
from minipuzzle.core.published import published
from minipuzzle.families.architecture import Architecture
from minipuzzle.pipeline import cluster
from minipuzzle.pipeline.plan import make_plan
from minipuzzle.recipes.schema import Recipe
from minipuzzle.stages.order import STAGES

PAIRS = {"4b": ("nemotron-h-8b", "nemotron-h-4b"), "47b": ("nemotron-h-56b", "nemotron-h-47b")}


@pytest.fixture(scope="module")
def plans():
    return {name: make_plan(Architecture.from_config(published(model)), Recipe.load(recipe),
                            memory_bytes=cluster.usable(find_device("h100")), device=torch.device("cuda"))
            for name, (model, recipe) in PAIRS.items()}


def test_memory_is_what_the_run_itself_would_decide_by(plans):
    """Blocks computed again where they must be, 8-bit moments where they are asked for; the
    forecast itself is held against the simulation in test_memory.py."""
    card, plan = find_device("h100"), plans["4b"]
    whole, small = (cluster.training_bytes(plan, card, 1, name) for name in ("adamw", "adamw8bit"))
    saved = (8 - 2.1) * plan.largest.parameters
    assert whole - small == pytest.approx(saved, rel=0.01)
    assert whole > cluster.usable(card) >= small
    more = cluster.training_bytes(plan, find_device("b200"), 1)
    assert more >= whole  # a larger card keeps what the smaller one computes again


def test_more_gpus_take_less_each_and_less_time(plans):
    card = find_device("h100")
    before = cluster.needs(plans["4b"], STAGES, card, 2)
    after = cluster.needs(plans["4b"], STAGES, card, 16)
    for few, many in zip(before, after, strict=True):
        assert many.seconds <= few.seconds
        assert many.disk_bytes == few.disk_bytes
    assert [need.name for need in before] == [stage.name for stage in STAGES]


def run(*args):
    return CliRunner().invoke(main, ["prune", *args, "--dry-run", "--json"])


@pytest.mark.parametrize(("model", "recipe", "gpu", "gpus", "code", "said"), [
    ("nemotron-h-8b", "nemotron-h-4b", "h100", "1", 6, "it fits with distillation.optimizer=adamw8bit"),
    ("nemotron-h-8b", "nemotron-h-4b", "h100", "8", 0, None),
    ("nemotron-h-56b", "nemotron-h-47b", "h100", "8", 6, "it fits on --gpus 64"),
    ("nemotron-h-56b", "nemotron-h-47b", "h100", "64", 0, None),
    ("nemotron-h-56b", "nemotron-h-47b", "rtx4090", "64", 6, "no number of them is enough")])
def test_recipes_are_accepted_and_refused_on_the_right_cards(model, recipe, gpu, gpus, code, said):
    result = run(model, "--recipe", recipe, "--gpu", gpu, "--gpus", gpus)
    assert result.exit_code == code, result.output
    told = json.loads(result.stdout)
    assert told["fits"] is (code == 0)
    assert {"name", "seconds", "gpu_bytes", "host_bytes", "disk_bytes"} <= told["stages"][0].keys()
    assert [stage["name"] for stage in told["stages"]] == [stage.name for stage in STAGES]
    if said:
        assert said in told["refusal"]
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_published_name_needs_no_network_and_leaves_nothing(tmp_path, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    result = run("nemotron-h-8b", "--gpu", "h200", "--set", "distillation.tokens=0")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    config = tmp_path / "config.json"
    config.write_text(json.dumps(published("nemotron-h-8b")))
    same = run(str(config), "--gpu", "h200", "--set", "distillation.tokens=0")
    assert json.loads(same.stdout)["stages"] == json.loads(result.stdout)["stages"]


def test_here_it_fails_as_the_run_would(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "photos"
    foreign.mkdir()
    assert run("-o", str(foreign)).exit_code == 0
    assert list(foreign.iterdir()) == []  # an empty folder is taken, by the run
    (foreign / "a.jpg").write_text("x")
    for args, code, said in ((("-o", str(foreign)), 2, "is not empty"),
                             (("--data", "nowhere.txt"), 2, "nowhere.txt"),
                             (("--gpu", "h1000"), 2, "nearest is h100"),
                             (("--gpus", "8"), 2, "of which card"),
                             (("--memory", "64KiB"), 6, "64 KiB")):
        result = run(*args)
        assert result.exit_code == code, (args, result.output)
        assert said in result.stderr
    assert [path.name for path in foreign.iterdir()] == ["a.jpg"]
    result = CliRunner().invoke(main, ["prune", "--gpu", "h100"])
    assert (result.exit_code, "add --dry-run" in result.stderr) == (2, True)
