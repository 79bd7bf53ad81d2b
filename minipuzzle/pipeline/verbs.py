"""The pipeline: tokenize, score, curves, search, measure, tournament, distill, export, report; as plain calls.

    Recipe -> tokens -> LayerScores, WidthScores, WidthCurves -> [Candidate] -> measured -> distilled -> model/, report

Every stage leaves files and a manifest (core/rundir.py): the same command continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minipuzzle.core import interrupt
from minipuzzle.core.environment import world_size
from minipuzzle.core.errors import RecipeError
from minipuzzle.core.files import machine_errors, restore_folder, write_atomic, write_json, write_sealed
from minipuzzle.core.rundir import RunDir
from minipuzzle.distill.precision import check_precision
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.weights import ModelFolder, open_model
from minipuzzle.pipeline import stages
from minipuzzle.pipeline.job import Job
from minipuzzle.pipeline.plan import Plan, check_disk, check_memory, find_device, make_plan, memory_to_use
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.pipeline.research import candidates_document
from minipuzzle.pipeline.results import make_report, run_about
from minipuzzle.pipeline.run import Run
from minipuzzle.pipeline.source import bundled_model, default_output, find_model, reopen
from minipuzzle.recipes.schema import Recipe
from minipuzzle.report.html import write_report
from minipuzzle.search.candidate import to_frame


def prune(model: str | Path | None = None, recipe: Recipe | None = None, output_dir: str | Path | None = None, *,
          seed: int = 0, device: str = "cpu", redo: bool = False, fresh: bool = False, candidate: str | None = None,
          reporter: Reporter | None = None, command: str = "", memory_bytes: int | None = None) -> Run:
    """Make a model smaller: the whole pipeline. Left out: the bundled model, the default recipe, their own folder.

    `candidate`: of a run that has come to its candidates (`output_dir`, or `model` alone) distil this one too. It goes
    to RUN/candidates/NAME/ and the run's own result stays; the Run that comes back is that folder. `memory_bytes`: what
    may be used (left out: the machine's); a parent that does not fit is read from the disk layer by layer, by all
    stages but distillation.

    Raises:
        MinipuzzleError: one of its kinds, each with its exit code (core/errors.py).
    """
    if candidate is not None:
        if fresh:
            raise RecipeError("--fresh deletes the run that --candidate goes on with; leave one out")
        if output_dir is None:
            model, recipe, output_dir, seed = reopen(model, [])
    recipe = recipe or Recipe()
    where = find_device(device)
    if world_size() > 1:
        raise RecipeError("prune runs in one process; score and distill are the verbs for torchrun")
    folder, plan = prepare(model, recipe, memory_to_use(memory_bytes, where))
    path = Path(output_dir) if output_dir else default_output(folder, recipe, seed)
    check_disk(plan, path)
    check_memory(plan, where)
    check_precision(recipe.distillation.precision, where)
    run = RunDir(path)
    try:
        with machine_errors(path):
            if fresh:
                run.clear()
            job = Job(plan, folder, run, seed, Ranks(where), reporter or Reporter(), command, candidate)
            if candidate is not None:
                _open_candidate(job, candidate)
            job.refuse_changes(redo)
            return _run(job)
    except RecipeError:
        run.discard_unused()
        raise
    finally:
        run.close()


def _open_candidate(job: Job, name: str) -> None:
    """Make the candidate's folder. Raise RecipeError if the run has no such candidate."""
    if job.run.manifest("tournament") is None:
        raise RecipeError(f"{job.run.path} has not come to its candidates yet; run it without --candidate first")
    known = [c.name for c in job.read_candidates("tournament")]
    if name not in known:
        raise RecipeError(f"{job.run.path} has no candidate {name!r}; candidates.csv lists {len(known)}, "
                          f"{known[0]} first")
    (job.result.path / "stages").mkdir(parents=True, exist_ok=True)


def prepare(model: str | Path | None, recipe: Recipe, memory_bytes: int | None = None) -> tuple[ModelFolder, Plan]:
    """Find the model, check its headers, and plan; reads no weight."""
    path = find_model(model) if model is not None else bundled_model()
    folder = open_model(path)
    return folder, make_plan(folder.arch, recipe, memory_bytes=memory_bytes)


def _run(job: Job) -> Run:
    restore_folder(job.result.path / "model")
    job.reporter.start(job.plan.estimates())
    run_stages(job, stages.tokenize_data, stages.score, stages.curves, stages.search, stages.measure_candidates,
               stages.tournament, stages.distill, stages.export)
    return report(job)


def run_stages(job: Job, *every: Callable[[Job], None]) -> None:
    """One after the other; run.json says after each how far it is."""
    _write_about(job)
    for stage in every:
        stage(job)
        _write_about(job)
        interrupt.check()  # a signal that came after the stage's last report of progress


def _write_about(job: Job) -> None:
    if job.ranks.main and job.candidate is None:  # another candidate's result leaves the run as it is
        write_sealed(job.run.path / "run.json", run_about(job), indent=1)


def report(job: Job) -> Run:
    """Everything that was found -> candidates.csv, candidates.json, report.json, report.html."""
    found, path = stages.candidates(job), job.result.path
    write_json(path / "candidates.json", candidates_document(
        job.plan.budget, job.plan.workload, job.folder.path.name, job.plan.parent, found))
    frame = to_frame(found)
    write_atomic(path / "candidates.csv", frame.to_csv(index=False))
    data = make_report(job, found)
    write_report(data, path)
    _write_about(job)
    return Run(path, data, frame)
