"""One stage alone: score, evaluate (distill: pipeline/distill.py)."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from minipuzzle.core.environment import world_size
from minipuzzle.core.errors import RecipeError
from minipuzzle.core.files import machine_errors
from minipuzzle.core.rundir import RunDir
from minipuzzle.core.scores import LayerScores
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.evaluate.served import check_tasks, latency, tasks
from minipuzzle.models.ranks import open_ranks
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import ModelFolder, open_model
from minipuzzle.pipeline import stages
from minipuzzle.pipeline.job import Job
from minipuzzle.pipeline.plan import check_memory, find_device, make_plan, memory_to_use
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.pipeline.source import default_output, find_model
from minipuzzle.pipeline.verbs import run_stages
from minipuzzle.recipes.schema import DATA_SECTIONS, Recipe


def open_job(folder: ModelFolder, recipe: Recipe, output: Path, seed: int, device: str, reporter: Reporter,
             command: str, memory_bytes: int | None = None, reads: tuple[str, ...] = DATA_SECTIONS) -> Job:
    """The job of a verb that may run under torchrun; the caller closes its run and its ranks. `reads`: the sections
    whose data it reads."""
    where = find_device(device)
    plan = make_plan(folder.arch, recipe, need_budget=False, memory_bytes=memory_to_use(memory_bytes, where),
                     reads=reads)
    check_memory(plan, where)
    ranks = open_ranks(where)
    run = RunDir(output) if ranks.main else None
    ranks.barrier()  # the folder is there
    return Job(plan, folder, run or RunDir(output, hold=False), seed, ranks, reporter if ranks.main else Reporter(),
               command)


def score(model: str | Path, recipe: Recipe, output_dir: Path | None, seed: int, device: str, reporter: Reporter,
          command: str = "", memory_bytes: int | None = None, redo: bool = False) -> tuple[Path, pd.DataFrame]:
    """(OUTPUT_DIR/scores, the layer table): the first stages of `prune`, which would go on from here.

    A parent that does not fit into `memory_bytes` (left out: the machine's) is read from the disk layer by layer. Under
    torchrun the samples are split over the processes. `redo`: make the damaged stages again, and those that a changed
    recipe invalidates.
    """
    folder = open_model(find_model(model))
    job = open_job(folder, recipe, output_dir or default_output(folder, recipe, seed), seed, device, reporter, command,
               memory_bytes, reads=("calibration",))
    try:
        if job.ranks.main:
            job.refuse_changes(redo, fresh="")
        job.ranks.barrier()
        estimates = job.plan.estimates()
        job.reporter.start({name: estimates[name] for name in ("tokenize", "score", "curves")})
        job.reporter.say(job.plan.passes())
        with machine_errors(job.run.path):
            run_stages(job, stages.tokenize_data, stages.score, stages.curves)
    except RecipeError:
        job.run.discard_unused()
        raise
    finally:
        job.run.close()
        job.ranks.close()
    path = job.run.path / "scores"
    return path, LayerScores.read(path / "layers.csv").table


def evaluate(model: str | Path, teacher: str | Path | None, recipe: Recipe, device: str = "cpu",
             speed: bool = False, task_names: Sequence[str] = (), limit: int | None = None) -> dict[str, Any]:
    """Held-out loss (nats per token and per byte), perplexity, accuracy; against a teacher KL, agreement, and the
    paired difference of the losses. On the final part of the held-out blocks, the one that `prune` reports.

    With `speed` also latency, at the recipe's context and batch; with `task_names` also lm-eval's results.
    """
    if world_size() > 1:
        raise RecipeError("evaluate runs in one process; start it without torchrun")
    if task_names:
        check_tasks(list(task_names))
    folder = open_model(find_model(model))
    other = open_model(find_model(teacher)) if teacher is not None else folder
    if other.arch.vocab_size != folder.arch.vocab_size:
        raise RecipeError(f"vocabularies differ: {folder.arch.vocab_size} and the teacher's {other.arch.vocab_size}")
    with tempfile.TemporaryDirectory() as scratch:
        # the rest is another model's, or another verb's
        own = Recipe(**{name: getattr(recipe, name) for name in ("budget", "workload", "calibration", "evaluation")})
        job = open_job(folder, own, Path(scratch) / "run", 0, device, Reporter(), "", reads=("evaluation",))
        try:
            stages.tokenize_data(job)
            if teacher is None:
                reference = job.reference(job.final_ids)
                found = reference.quality()
            else:
                reference = Reference(Model.load(other, device), job.final_ids)
                found = measure(job.model, reference)
            bytes_per_token = job.evaluation_blocks.bytes_per_token
        finally:
            job.run.close()
    out: dict[str, Any] = {"model": str(folder.path), "teacher": str(other.path) if teacher is not None else None,
                           "tokens": reference.ids.numel()}
    of_one = ("loss", "loss_stderr", "accuracy")
    out |= {k: v for k, v in found.items() if teacher is not None or k in of_one}
    if teacher is not None:
        out["paired"] = {"loss_minus_parent": out.pop("loss_minus_parent"),
                         "stderr": out.pop("loss_minus_parent_stderr", None)}
    out |= {"loss_per_byte": found["loss"] / bytes_per_token, "perplexity": _perplexity(found["loss"])}
    if speed:
        out["latency"] = latency(folder.path, device, recipe.workload.context, recipe.workload.batch)
    if task_names:
        out["tasks"] = tasks(folder.path, list(task_names), device, limit)
    return out


def _perplexity(loss: float) -> float | None:
    """None where no float holds it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None
