"""Forecasts for GPUs that are not here, and the dry run that ends as the run would."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from conftest import RECIPE, neither_gate_nor_page

from minipuzzle import prune
from minipuzzle.cli import main
from minipuzzle.core.devices import find_device
from minipuzzle.core.published import published
from minipuzzle.core.rundir import RunDir
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline import cluster
from minipuzzle.pipeline.plan import make_plan
from minipuzzle.recipes.schema import Recipe
from minipuzzle.stages.order import STAGES
from minipuzzle.verbs.source import bundled_model

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
    low = replace(plan, recipe=plan.recipe.with_overrides(settings={"distillation.optimizer": "adamw8bit"}))
    whole, small = (cluster.training(p, card, 1)[1] for p in (plan, low))
    assert whole["moments"] - small["moments"] == pytest.approx((8 - 2.1) * plan.largest.parameters, rel=0.01)
    assert sum(whole.values()) > cluster.usable(card) >= sum(small.values())
    how, more = cluster.training(plan, find_device("b200"), 1)
    assert sum(more.values()) >= sum(whole.values())  # a larger card has larger passes
    assert (how.activation_checkpointing, how.pass_tokens, how.loss_tokens) == (True, None, None)


def test_more_gpus_take_less_each_and_less_time(plans):
    card = find_device("h100")
    before = cluster.needs(plans["4b"], STAGES, card, 2)
    after = cluster.needs(plans["4b"], STAGES, card, 16)
    for few, many in zip(before, after, strict=True):
        assert many.seconds <= few.seconds
        assert many.disk_bytes == few.disk_bytes
    assert [need.name for need in before] == [stage.name for stage in STAGES]


def test_hosts_hold_the_parents_activations_on_held_out_blocks(plans):
    """1024 blocks of 8192 tokens and 4096 channels in bf16, 69 GB: on the host, shared by the processes, and counted
    in the stages that measure students one by one."""
    plan, card = replace(plans["4b"], weight_bytes=2), find_device("h100")
    assert plan.reference_bytes == 1024 * 8192 * 4096 * 2
    none = replace(plan, recipe=plan.recipe.with_overrides(settings={"evaluation.samples": 2}))
    for gpus in (1, 16):
        more = {n.name: n.host_bytes - less.host_bytes for n, less in zip(
            cluster.needs(plan, STAGES, card, gpus), cluster.needs(none, STAGES, card, gpus), strict=True)}
        on_a_host = (plan.reference_bytes - none.reference_bytes) * min(gpus, 8) // gpus
        for name in ("tournament", "distill"):
            assert more[name] == pytest.approx(on_a_host, rel=1e-6)
        assert more["score"] == more["measure"] == 0
    settings = {"evaluation.samples": 2**21}
    result = run("nemotron-h-8b", "--recipe", "nemotron-h-4b", "--gpu", "h100", "--gpus", "8",
                 *(f"{key}={value}" for key, value in settings.items()))
    told = {stage["name"]: stage for stage in json.loads(result.stdout)["stages"]}
    assert told["distill"]["host_bytes"] > 2**21 * 8192 * 4096 * 2


def run(*args):
    return CliRunner().invoke(main, ["prune", *args, "--dry-run", "--json"])


@pytest.mark.parametrize(("model", "recipe", "gpu", "gpus", "code", "said"), [
    ("nemotron-h-8b", "nemotron-h-4b", "h100", "1", 6, "it fits with distillation.optimizer=adamw8bit"),
    ("nemotron-h-8b", "nemotron-h-4b", "h100", "8", 0, None),
    ("nemotron-h-8b", "nemotron-h-4b-1xh100", "h100", "1", 0, None),
    ("nemotron-h-8b", "nemotron-h-4b-1xh100", "rtx4090", "1", 6, "it does not fit by 41.99 GiB; it fits with --gpus 8"),
    ("nemotron-h-8b", "nemotron-h-4b-8xh100", "h100", "8", 0, None),
    ("nemotron-h-8b", "nemotron-h-4b-8xh100", "rtx4090", "8", 6, "it fits with --gpus 256"),
    ("nemotron-3-nano-30b-a3b", "nemotron-3-nano-22b-8xh100", "h100", "8", 0, None),
    ("nemotron-3-nano-30b-a3b", "nemotron-3-nano-22b-8xh100", "rtx5090", "8", 6, "it fits with --gpus 64"),
    ("nemotron-h-56b", "nemotron-h-47b-64xh100", "h100", "64", 0, None),
    ("nemotron-h-56b", "nemotron-h-47b-64xh100", "h100", "16", 6, "it fits with distillation.optimizer=adamw8bit"),
    ("nemotron-h-56b", "nemotron-h-47b", "h100", "8", 6, "it fits with --gpus 32"),
    ("nemotron-h-56b", "nemotron-h-47b", "h100", "64", 0, None),
    ("nemotron-h-56b", "nemotron-h-47b", "rtx4090", "64", 6, "no number of them is enough")])
def test_recipes_are_accepted_and_refused_on_the_right_cards(model, recipe, gpu, gpus, code, said):
    result = run(model, "--recipe", recipe, "--gpu", gpu, "--gpus", gpus)
    assert result.exit_code == code, result.output
    told = json.loads(result.stdout)
    assert told["fits"] is (code == 0)
    assert {"name", "seconds", "gpu_bytes", "host_bytes", "disk_bytes"} <= told["stages"][0].keys()
    assert [stage["name"] for stage in told["stages"]] == [stage.name for stage in STAGES]
    trained = [stage for stage in told["stages"] if "memory" in stage]
    assert [stage["name"] for stage in trained] == ["tournament", "distill"]
    for stage in trained:
        assert stage["gpu_bytes"] == sum(stage["memory"].values())
        assert {"teacher", "weights", "gradients", "moments", "activations", "loss"} <= stage["memory"].keys()
    for stage in told["stages"]:
        if phases := stage.get("phases"):
            assert [(p["tokens"], p["sequence_length"]) for p in phases] == [
                (p["tokens"], p["sequence_length"]) for p in told["recipe"]["distillation"]["phases"]]
            tournament = next(s["seconds"] for s in told["stages"] if s["name"] == "tournament")
            assert stage["seconds"] < sum(p["seconds"] for p in phases) < stage["seconds"] + tournament
    assert any("phases" in stage for stage in told["stages"]) is bool(told["recipe"]["distillation"]["phases"])
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


@pytest.fixture(scope="module")
def asked(model_folder, texts, tmp_path_factory):
    """A model, a recipe, and the run of another recipe."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "recipe.yaml").write_text(RECIPE.replace("DATA", str(texts)))
    with neither_gate_nor_page():
        prune(model_folder, Recipe.load(folder / "recipe.yaml").with_overrides(settings={"distillation.tokens": 0}),
              folder / "other")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").write_text("x")
    return folder


@pytest.mark.parametrize(("cause", "args", "code"), [
    ("device", ("--device", "cuda"), 6), ("device", ("--device", "tpu"), 2), ("memory", ("--memory", "64KiB"), 6),
    ("disk", (), 6), ("data", ("--data", "nowhere.txt"), 2), ("a folder of others", ("-o", "photos"), 2),
    ("a run of another recipe", ("-o", "other"), 2), ("a run in progress", ("-o", "other"), 6),
    ("budget", ("--budget", "params=7"), 4)])
def test_the_dry_run_is_refused_as_the_run_is(cause, args, code, asked, model_folder, monkeypatch):
    """The same exit code and the same words."""
    monkeypatch.chdir(asked)
    if cause == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    held = RunDir(asked / "other") if cause == "a run in progress" else None
    try:
        line = ["prune", str(model_folder), "--recipe", "recipe.yaml", *args]
        wet, dry = (CliRunner().invoke(main, line + more) for more in ([], ["--dry-run"]))
    finally:
        if held:
            held.close()
    assert (wet.exit_code, dry.exit_code) == (code, code), (wet.output, dry.output)
    assert wet.stderr.splitlines()[-1] == dry.stderr.splitlines()[-1]
    assert wet.stderr.startswith("minipuzzle: ")


def test_one_speed_explains_the_measured_stages_within_a_factor_of_2():
    """FLOPs of the plan over seconds of the committed run of the bundled job (2 cores): what the dry run here
    assumes, by stage."""
    measured = json.loads((Path(__file__).parent.parent / "benchmarks/results/main_job.json").read_text())["runs"][0]["stages"]
    plan = make_plan(open_model(bundled_model()).arch, Recipe())
    speeds = {stage.name: stage.estimate(plan).flops / measured[stage.name] for stage in STAGES
              if stage.name in ("score", "curves", "measure", "tournament", "distill")}
    mean = math.prod(speeds.values()) ** (1 / len(speeds))
    assert len(speeds) == 5
    assert all(mean / 2 < speed < 2 * mean for speed in speeds.values()), speeds
