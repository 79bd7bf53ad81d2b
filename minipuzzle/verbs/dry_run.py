"""What `prune` would do and take, and whether it would be refused; no weight is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.devices import Device, find_device
from minipuzzle.core.errors import InputError, MinipuzzleError, ResourceError
from minipuzzle.core.rundir import RunDir, refuse_foreign
from minipuzzle.distill.precision import check_training
from minipuzzle.evaluate.served import check_tasks
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.weights import ModelFolder, open_model
from minipuzzle.pipeline import cluster, machine
from minipuzzle.pipeline.forecast import check_disk, check_memory, estimates, host_bytes
from minipuzzle.pipeline.plan import Plan, make_plan
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.pipeline.stage import Runner, Stage
from minipuzzle.pipeline.world import World
from minipuzzle.recipes.schema import Recipe
from minipuzzle.stages.order import RESULT, stages_of
from minipuzzle.stages.quantizing import check as check_quantization
from minipuzzle.verbs.folder import default_output, open_teacher, scores_to_take
from minipuzzle.verbs.source import bundled_model, config_of


def dry_run(model: str | None, recipe: Recipe, output_dir: Path | None = None, *, seed: int = 0,
            device: str = "cpu", memory_bytes: int | None = None, redo: bool = False,
            fresh: bool = False, scores: str | Path | None = None, teacher: str | Path | None = None,
            gpu: str | None = None, gpus: int | None = None
            ) -> tuple[dict[str, Any], list[str], MinipuzzleError | None]:
    """(what --json prints, the same in words, what the run would be refused with after that).

    `model`: what `prune` takes, and a config.json or a published name, of which nothing is fetched.
    `gpu`, `gpus`: forecast for these cards in place of this machine.

    Raises:
        MinipuzzleError: as the run, before there is a plan.
    """
    if gpus is not None and gpu is None:
        raise InputError(f"--gpus {gpus} of which card? Add --gpu NAME; 'minipuzzle devices' lists them")
    card = None if gpu is None else find_device(gpu)
    where = torch.device("cuda") if card else machine.find_device(device)
    if card is None:
        d = recipe.distillation
        check_training(d.precision, d.optimizer, d.compile, where)
        check_quantization(recipe.quantization, where)
        if recipe.evaluation.tasks:  # their questions are fetched by the run
            check_tasks(recipe.evaluation.tasks, "evaluation.tasks")
        memory_bytes = machine.memory_to_use(memory_bytes, where)
    if card and teacher:
        raise InputError("--gpu forecasts a run whose model teaches: leave --teacher or --gpu out")
    folder, arch = _find(model)
    if folder is None and teacher:
        raise InputError(f"--teacher needs a model folder to make smaller; {model} is a configuration")
    other = open_teacher(teacher, folder) if folder else None
    plan = make_plan(arch, recipe, memory_bytes=cluster.usable(card) if card else memory_bytes,
                     device=where, teacher=other.arch if other else None)
    if card:  # whose bf16 cannot be asked for here
        plan = replace(plan, weight_bytes=4 if recipe.distillation.precision == "fp32" else 2)
    path = output_dir or (default_output(folder, recipe, seed, other) if folder else Path("runs"))
    stages = stages_of(recipe)
    found, more = _on_cards(plan, stages, card, gpus or 1) if card else _here(plan, stages)
    error = None
    try:
        if card and (said := cluster.refusal(plan, stages, card, gpus or 1)):
            raise ResourceError(said)
        if card is None:
            if folder:
                _check_run(path, folder, recipe, seed, where, plan, redo, fresh, other)
                if scores is not None:
                    world = World(folder, recipe, seed, where, path / "tokens", plan.memory, teacher=other)
                    there = RunDir(path, hold=False)
                    scores_to_take(Runner(stages, recipe, world, there, Ranks(where), Reporter()), scores)
            check_disk(plan, stages, path)
            check_memory(plan, stages, where)
    except MinipuzzleError as refused:
        error = refused
    about = plan.to_json() | {"stages": [need.to_json() for need in found], "fits": error is None,
                              "refusal": None if error is None else str(error)}
    return about, [*plan.lines(), *more], error


def _find(model: str | None) -> tuple[ModelFolder | None, Architecture]:
    if model is None or os.path.isdir(model):
        folder = open_model(bundled_model() if model is None else Path(model))
        return folder, folder.arch
    config = config_of(model)
    arch = Architecture.from_config(config)
    arch.check_prunable(config)
    return None, arch


def _on_cards(plan: Plan, stages: Sequence[Stage], card: Device, gpus: int) -> tuple[list[cluster.Need], list[str]]:
    found = cluster.needs(plan, stages, card, gpus)
    how = cluster.training(plan, card, gpus)[0] if any(need.memory for need in found) else None
    return found, cluster.lines(found, card, gpus, how)


def _here(plan: Plan, stages: Sequence[Stage]) -> tuple[list[cluster.Need], list[str]]:
    """On this machine, whose speed is looked at for a moment."""
    seconds, found, more = estimates(plan, stages), [], []
    for stage in stages:
        need, size = stage.estimate(plan), host_bytes(plan, stage)
        on_gpu, on_host = (0, size) if plan.on_host else (
            size, need.trains * plan.copy_bytes + need.references * plan.reference_bytes)
        memory = dict[str, int]()
        if need.trains and plan.feasible:
            how, memory = plan.training()
            more = cluster.memory_lines(memory, how, plan.memory_bytes, plan.usable_bytes)
        found.append(cluster.Need(stage.name, seconds[stage.name], on_gpu, on_host, need.disk_bytes, memory))
    told = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return found, [f"stages     {told}", f"time       about {sum(seconds.values()) / 60:.1f} min on this "
                                         "machine (a rough estimate)", *more]


def _check_run(path: Path, folder: ModelFolder, recipe: Recipe, seed: int, device: torch.device,
               plan: Plan, redo: bool, fresh: bool, teacher: ModelFolder | None) -> None:
    """Refuse as the run would what lies in its folder; a folder that is not there stays so."""
    refuse_foreign(path)
    if fresh or redo or not (path / "run.json").is_file():
        return
    run = RunDir(path)
    try:
        world = World(folder, recipe, seed, device, path / "tokens", plan.memory, teacher=teacher)
        Runner(stages_of(recipe), recipe, world, run, Ranks(device), Reporter(), dict.fromkeys(RESULT, run)
               ).refuse_changes(redo=False)
    finally:
        run.close()
