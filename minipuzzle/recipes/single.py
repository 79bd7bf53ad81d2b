"""One stage alone: score, evaluate, distill."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from minipuzzle.core.errors import RecipeError
from minipuzzle.core.rundir import RunDir, digest, write_json
from minipuzzle.core.scores import LayerScores
from minipuzzle.distill.loop import distill_model
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.evaluate.served import check_tasks, latency, tasks
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import open_ranks
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import ModelFolder, open_model, write_model
from minipuzzle.recipes import stages
from minipuzzle.recipes.job import Job
from minipuzzle.recipes.pipeline import run_about
from minipuzzle.recipes.plan import find_device, make_plan
from minipuzzle.recipes.progress import Reporter
from minipuzzle.recipes.schema import Recipe, SpaceSection
from minipuzzle.recipes.source import default_output, find_model
from minipuzzle.surgery.gate import reload_gate


def _job(folder: ModelFolder, recipe: Recipe, output: Path, seed: int, device: str, reporter: Reporter,
         command: str, memory_bytes: int | None = None) -> Job:
    plan = make_plan(folder.arch, recipe, need_budget=False)
    ranks = open_ranks(find_device(device))
    run = RunDir(output) if ranks.main else None
    ranks.barrier()  # the folder is there
    return Job(plan, folder, run or RunDir(output, hold=False), seed, ranks, reporter if ranks.main else Reporter(),
               command, memory_bytes=memory_bytes)


def score(model: str | Path, recipe: Recipe, output_dir: Path | None, seed: int, device: str, reporter: Reporter,
          command: str = "", memory_bytes: int | None = None) -> tuple[Path, pd.DataFrame]:
    """(OUTPUT_DIR/scores, the layer table): the first stages of `prune`, which would go on from here.

    A parent that does not fit into `memory_bytes` (left out: the machine's) is read from the disk layer by layer. Under
    torchrun the samples are split over the processes.
    """
    folder = open_model(find_model(model))
    job = _job(folder, recipe, output_dir or default_output(folder, recipe, seed), seed, device, reporter, command,
               memory_bytes)
    try:
        if job.ranks.main:
            job.refuse_changes(redo=False)
            write_json(job.run.path / "run.json", run_about(job))
        job.ranks.barrier()
        estimates = job.plan.estimates()
        reporter.start({name: estimates[name] for name in ("tokenize", "score", "curves")})
        for stage in (stages.tokenize_data, stages.score, stages.curves):
            stage(job)
    finally:
        job.run.close()
    path = job.run.path / "scores"
    return path, LayerScores.read(path / "layers.csv").table


def evaluate(model: str | Path, teacher: str | Path | None, recipe: Recipe, device: str = "cpu",
             speed: bool = False, task_names: Sequence[str] = (), limit: int | None = None) -> dict[str, Any]:
    """Held-out loss (nats per token and per byte), perplexity, accuracy; against a teacher KL and agreement.

    With `speed` also latency, at the recipe's context and batch; with `task_names` also lm-eval's results.
    """
    if task_names:
        check_tasks(list(task_names))
    folder = open_model(find_model(model))
    other = open_model(find_model(teacher)) if teacher is not None else folder
    if other.arch.vocab_size != folder.arch.vocab_size:
        raise RecipeError(f"vocabularies differ: {folder.arch.vocab_size} and the teacher's {other.arch.vocab_size}")
    with tempfile.TemporaryDirectory() as scratch:
        spaceless = recipe.model_copy(update={"space": SpaceSection()})  # the recipe's is another model's
        job = _job(folder, spaceless, Path(scratch) / "run", 0, device, Reporter(), "")
        try:
            stages.tokenize_data(job)
            reference = Reference(Model.load(other, device), job.evaluation_ids)
            found = measure(job.model, reference)
            bytes_per_token = job.evaluation_blocks.bytes_per_token
        finally:
            job.run.close()
    out: dict[str, Any] = {"model": str(folder.path), "teacher": str(other.path) if teacher is not None else None,
                           "tokens": reference.ids.numel()}
    alone = ("loss", "loss_stderr", "accuracy")
    out |= {k: v for k, v in found.items() if teacher is not None or k in alone}
    out |= {"loss_per_byte": found["loss"] / bytes_per_token, "perplexity": float(torch.tensor(found["loss"]).exp())}
    if speed:
        out["latency"] = latency(folder.path, device, recipe.workload.context, recipe.workload.batch)
    if task_names:
        out["tasks"] = tasks(folder.path, list(task_names), device, limit)
    return out


def distill(student: str | Path, teacher: str | Path, recipe: Recipe, output_dir: Path, seed: int, device: str,
            reporter: Reporter, command: str = "") -> dict[str, Any]:
    """Distil one folder from another -> OUTPUT_DIR/model/, through the reload gate; the same command continues.

    Raises:
        RecipeError: no tokens, or different vocabularies.
    """
    small, big = open_model(find_model(student)), open_model(find_model(teacher))
    d = recipe.distillation
    if d.tokens == 0:
        raise RecipeError("distillation.tokens is 0: nothing to do; set it with --set distillation.tokens=10M")
    if small.arch.vocab_size != big.arch.vocab_size:
        raise RecipeError(f"vocabularies differ: student {small.arch.vocab_size}, teacher {big.arch.vocab_size}")
    job = _job(big, recipe, output_dir, seed, device, reporter, command)
    try:
        write_json(job.run.path / "run.json", run_about(job) | {"student": small.fingerprint})
        reporter.start({"tokenize": 5.0, "distill": 100.0})
        stages.tokenize_data(job)
        start = Model.load(small, device)
        before = measure(start, job.reference)
        pupil = HybridLM(small.family, small.arch, start.by_name())
        # another student, teacher, data or setting is another run of training
        key = digest([small.fingerprint, job.inputs["tokenize"], big.fingerprint, d.model_dump(), seed])
        state = job.run.path / "distillation" / key
        with reporter.stage("distill", d.tokens) as update:
            done = distill_model(pupil, job.model, stages.training_blocks(job), stages.settings(job), state,
                                 progress=lambda tokens, loss: update(tokens, f"KL {loss:.3f}"))
        unchecked, final = job.run.path / "model-unchecked", job.run.path / "model"
        config = small.arch.to_config(small.config)
        dtypes = small.dtypes(tuple(range(small.arch.num_layers)))
        write_model(unchecked, config, ((n, p.detach().to(dtypes[n])) for n, p in pupil.parameters_by_name().items()),
                    small.path)
        reload_gate(unchecked, job.evaluation_ids[:2])
        after = measure(Model.load(open_model(unchecked), device), job.reference)
        teacher_loss = measure(job.model, job.reference)["loss"]
        shutil.rmtree(final, ignore_errors=True)
        unchecked.replace(final)
        shutil.copyfile(state / "metrics.jsonl", job.run.path / "metrics.jsonl")
    finally:
        job.run.close()
    return {"path": str(final), "tokens": done.tokens, "seconds": done.seconds, "loss_before": before["loss"],
            "kl_before": before["kl"], "loss": after["loss"], "kl": after["kl"], "loss_teacher": teacher_loss}
