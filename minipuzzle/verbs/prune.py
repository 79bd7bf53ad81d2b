"""The whole pipeline: a model and a recipe -> a smaller model and its report.

Every stage leaves files and a manifest (core/rundir.py): the same command continues where it
stopped.
"""

from __future__ import annotations

from pathlib import Path

import torch

from minipuzzle.core import environment
from minipuzzle.core.errors import InputError
from minipuzzle.core.files import read_json, restore_folder, write_atomic, write_json
from minipuzzle.distill.precision import check_training
from minipuzzle.evaluate.served import check_tasks
from minipuzzle.models.weights import ModelFolder, open_model
from minipuzzle.pages.html import write_report
from minipuzzle.pipeline.forecast import check_disk, check_memory, estimates
from minipuzzle.pipeline.machine import find_device, memory_to_use
from minipuzzle.pipeline.plan import Plan, budget_of, make_plan
from minipuzzle.pipeline.progress import Reporter, Terminal
from minipuzzle.pipeline.stage import Runner
from minipuzzle.pipeline.world import World
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.candidate import Candidate, to_frame
from minipuzzle.stages.candidates import AGAIN, candidates_document, read_candidates
from minipuzzle.stages.order import RESULT, stages_of
from minipuzzle.stages.quantizing import check as check_quantization
from minipuzzle.stages.results import make_report
from minipuzzle.verbs.folder import (
    candidate_folder,
    default_output,
    find_candidate,
    goes_on,
    is_run,
    open_run,
    open_teacher,
    reopen,
    take_scores,
    teacher_of_run,
    write_about,
)
from minipuzzle.verbs.run import Run
from minipuzzle.verbs.source import bundled_model, find_model, recipe_of


def prune(model: str | Path | None = None, recipe: Recipe | str | Path | None = None,
          output_dir: str | Path | None = None, *, seed: int = 0, device: str = "cpu", redo: bool = False,
          fresh: bool = False, candidate: str | Candidate | None = None, scores: str | Path | None = None,
          teacher: str | Path | None = None, reporter: Reporter | None = None, command: str = "",
          memory_bytes: int | None = None) -> Run:
    """Make a model smaller: the whole pipeline. Left out: the bundled model, the default recipe,
    their own folder. `reporter`: who hears of progress; left out, the terminal or notebook.

    A run as `model` goes on; with another recipe its model is pruned by that, from its scores, into
    RUN/budgets/NAME/. `candidate`: of a run that has come to its candidates (`output_dir`, or
    `model` alone), or of a later search of it, by name, or one of your own: distil this one too. It
    goes to RUN/candidates/NAME/ and the run's own result stays; the Run that comes back is that
    folder. `scores`: a run, or what `score` made, to take the scores from. `memory_bytes`: what may be
    used (left out: the machine's); a parent that does not fit is read from the disk layer by layer,
    by all stages but distillation.

    `teacher`: what the students learn from and are compared with, in place of the model that is cut:
    the original, where that is the result of a run. It has the same tokenizer.

    Raises:
        MinipuzzleError: one of its kinds, each with its exit code (core/errors.py).
    """
    if model is not None and is_run(model):
        teacher = teacher_of_run(model, teacher)
    if candidate is not None:
        if fresh:
            raise InputError("--fresh deletes the run that --candidate goes on with; leave one out")
        if output_dir is None:
            model, recipe, output_dir, seed = reopen(model, [])
    elif model is not None and is_run(model):
        model, recipe, output_dir, seed, scores = goes_on(model, recipe, output_dir, seed, scores)
    recipe = recipe_of(recipe)
    chosen, asked = (None, None) if candidate is None else find_candidate(Path(output_dir or ""), candidate, recipe)
    folder, other, plan, where = prepare(model, asked or recipe, device, memory_bytes, teacher)
    path = Path(output_dir) if output_dir else default_output(folder, recipe, seed, other)
    check_machine(plan, path, where)
    with open_run(path, where) as (ranks, run):
        with ranks.together():
            if fresh and ranks.main:
                run.clear()
        world = World(folder, recipe, seed, ranks.device, path / "tokens", plan.memory, chosen, asked,
                      command, other)
        with ranks.together():
            result = run if chosen is None else candidate_folder(run, chosen.name)
        stages = stages_of(recipe)
        runner = Runner(stages, recipe, world, run, ranks, (reporter or Terminal()) if ranks.main else Reporter(),
                        dict.fromkeys(RESULT, result))
        runner.redo = redo
        with ranks.together():
            if ranks.main:
                runner.refuse_changes(redo)
                if scores is not None:
                    take_scores(runner, scores)
                restore_folder(result.path / "model")
        runner.reporter.start(estimates(plan, stages))
        runner.make(lambda: write_about(runner))
        with ranks.together():
            if ranks.main:
                return write_results(runner)
        return Run.open(result.path)


def prepare(model: str | Path | None, recipe: Recipe, device: str = "cpu",
            memory_bytes: int | None = None, teacher: str | Path | None = None
            ) -> tuple[ModelFolder, ModelFolder | None, Plan, torch.device]:
    """Find the model and another teacher, check their headers, and plan for the device; reads no
    weight.

    Raises:
        MinipuzzleError: what `prune` refuses before it opens its folder.
    """
    where = find_device(device)
    d = recipe.distillation
    check_training(d.precision, d.optimizer, d.compile, where)
    check_quantization(recipe.quantization, where)
    if recipe.evaluation.tasks:
        check_tasks(recipe.evaluation.tasks, "evaluation.tasks", load=True)
    folder = open_model(find_model(model) if model is not None else bundled_model())
    other = open_teacher(teacher, folder)
    plan = make_plan(folder.arch, recipe, memory_bytes=memory_to_use(memory_bytes, where), device=where,
                     processes=environment.world_size(), teacher=other.arch if other else None)
    return folder, other, plan, where


def check_machine(plan: Plan, path: Path, device: torch.device) -> None:
    """Raise ResourceError without room for the run, on the disk of its folder or in memory."""
    stages = stages_of(plan.recipe)
    check_disk(plan, stages, path)
    check_memory(plan, stages, device)


def write_results(runner: Runner) -> Run:
    """Everything that was found -> candidates.csv, candidates.json, report.json, report.html."""
    given = runner.given(runner.stages["export"], lambda done, note: None)
    path, recipe, arch = given.folder, given.asked, given.parent.arch
    report = make_report(given, read_json(path / "search" / "result.json", hint=AGAIN), runner.stage_list())
    if "quantize" in runner.stages:
        quantised = read_json(path / "quantized" / "quantization.json", hint=AGAIN)
        report = report.model_copy(update={"quantization": quantised})
    found = read_candidates(given.files, given.candidate, recipe.search.rank)
    write_json(path / "candidates.json", candidates_document(
        budget_of(recipe, arch), recipe.workload.build(), given.parent.folder.path.name, arch, found))
    frame = to_frame(found)
    write_atomic(path / "candidates.csv", frame.to_csv(index=False))
    write_report(report, path)
    write_about(runner)
    return Run(path, report.to_json(), frame)


