"""Run directories, as verbs find and open them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minipuzzle.core.errors import InputError
from minipuzzle.core.files import write_sealed
from minipuzzle.core.rundir import RunDir, digest, read_about
from minipuzzle.distill.loss import loss_kernel
from minipuzzle.families.ssd import kernel
from minipuzzle.models.ranks import Ranks, open_ranks
from minipuzzle.models.weights import ModelFolder
from minipuzzle.pipeline.machine import versions
from minipuzzle.pipeline.stage import Runner
from minipuzzle.recipes.schema import Recipe
from minipuzzle.stages.order import stages_of
from minipuzzle.verbs.source import bundled_model


def default_output(folder: ModelFolder, recipe: Recipe, seed: int) -> Path:
    """runs/NAME-HASH, a function of model and recipe: the same command finds its run again."""
    name = "bundled" if folder.path == bundled_model() else folder.path.resolve().name
    return Path("runs") / f"{name}-{digest([folder.fingerprint, recipe.model_dump(), seed])[:8]}"


def reopen(run: str | Path | None, given: list[str]) -> tuple[str, Recipe, Path, int]:
    """(model, recipe, folder, seed) of a run, to go on with another candidate.

    Raises:
        InputError: not a run, or options beside it, which the run has settled.
        CorruptArtifact: run.json is damaged.
    """
    path = Path(run or "")
    none = InputError(f"--candidate needs a run directory as MODEL; {run} is not one")
    if not (path / "run.json").is_file():
        raise none
    about = read_about(path)
    try:
        recipe = Recipe.from_json(about.get("recipe"), str(path / "run.json"))
        model, seed = about["model"], about["seed"]
    except (InputError, KeyError) as error:
        raise InputError(f"{none} ({error})") from None
    if given:
        raise InputError(f"--candidate goes on with the recipe of {run}; leave out the options for "
                          f"{', '.join(given)}, or prune into another folder")
    return str(model), recipe, path, seed if type(seed) is int and seed >= 0 else 0


def open_run(path: Path, device: Any) -> tuple[Ranks, RunDir]:
    """(the processes that torchrun started, the run directory), held by the main one of them."""
    ranks = open_ranks(device)
    run = RunDir(path) if ranks.main else None
    ranks.barrier()  # the folder is there
    return ranks, run or RunDir(path, hold=False)


def write_about(runner: Runner, **more: Any) -> None:
    """run.json: what the run is, for people and for `search RUN`. Another candidate's result leaves
    it as it is."""
    world = runner.world
    if not runner.ranks.main or world.candidate is not None:
        return
    folder, device = world.folder, runner.ranks.device
    done = {s["name"]: s for s in runner.stage_list()}
    stages = [done.get(s.name, {"name": s.name, "status": "open", "seconds": 0.0})
              for s in stages_of(runner.recipe)]
    write_sealed(runner.run.path / "run.json", {
        "schema": 1, "model": str(folder.path.absolute()), "recipe": runner.recipe.located().model_dump(),
        "seed": world.seed, "command": world.command, "versions": versions(), "stages": stages,
        "device": str(device), "ssm_kernel": kernel(device), "loss_kernel": loss_kernel(folder.arch.vocab_size, device),
        "model_is": folder.sampled,
        "hashes": {"model": folder.fingerprint, "tokenizer": world.tokenizer_hash}} | more, indent=1)
