"""One stage alone: score, evaluate, distill."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from minipuzzle.core.errors import RecipeError
from minipuzzle.core.rundir import RunDir, digest, write_atomic, write_json
from minipuzzle.core.scores import LayerScores
from minipuzzle.data.blocks import Blocks
from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.precision import autocast, check_precision
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.sharding import reshard, whole
from minipuzzle.distill.teacher import CachedTeacher, LiveTeacher
from minipuzzle.distill.teacher import cache_teacher as cache_blocks
from minipuzzle.distill.track import open_tracker
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.evaluate.served import check_tasks, latency, tasks
from minipuzzle.models.logits import token_metrics
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import open_ranks
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import ModelFolder, open_model, write_model
from minipuzzle.recipes import stages
from minipuzzle.recipes.job import Job
from minipuzzle.recipes.pipeline import run_about, run_stages
from minipuzzle.recipes.plan import check_memory, find_device, make_plan, memory_to_use
from minipuzzle.recipes.progress import Reporter
from minipuzzle.recipes.results import distilled_report, model_card_files, training_notes
from minipuzzle.recipes.schema import Recipe, SpaceSection
from minipuzzle.recipes.source import default_output, find_model
from minipuzzle.surgery.gate import reload_gate


def _job(folder: ModelFolder, recipe: Recipe, output: Path, seed: int, device: str, reporter: Reporter,
         command: str, memory_bytes: int | None = None) -> Job:
    where = find_device(device)
    plan = make_plan(folder.arch, recipe, need_budget=False, memory_bytes=memory_to_use(memory_bytes, where))
    check_memory(plan, where)
    ranks = open_ranks(where)
    run = RunDir(output) if ranks.main else None
    ranks.barrier()  # the folder is there
    return Job(plan, folder, run or RunDir(output, hold=False), seed, ranks, reporter if ranks.main else Reporter(),
               command)


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
            job.refuse_changes()
        job.ranks.barrier()
        estimates = job.plan.estimates()
        job.reporter.start({name: estimates[name] for name in ("tokenize", "score", "curves")})
        job.reporter.say(job.plan.passes())
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
    """Held-out loss (nats per token and per byte), perplexity, accuracy; against a teacher KL and agreement.

    With `speed` also latency, at the recipe's context and batch; with `task_names` also lm-eval's results.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError("evaluate runs in one process; start it without torchrun")
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
            if teacher is None:
                reference = job.reference
                found = reference.quality()
            else:
                reference = Reference(Model.load(other, device), job.evaluation_ids)
                found = measure(job.model, reference)
            bytes_per_token = job.evaluation_blocks.bytes_per_token
        finally:
            job.run.close()
    out: dict[str, Any] = {"model": str(folder.path), "teacher": str(other.path) if teacher is not None else None,
                           "tokens": reference.ids.numel()}
    alone = ("loss", "loss_stderr", "accuracy")
    out |= {k: v for k, v in found.items() if teacher is not None or k in alone}
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


def distill(student: str | Path, teacher: str | Path, recipe: Recipe, output_dir: Path, seed: int, device: str,
            reporter: Reporter, command: str = "", cache_teacher: Path | None = None,
            track: str | None = None) -> dict[str, Any]:
    """Distil one folder from another -> OUTPUT_DIR/model/, through the reload gate; the same command continues.

    Under torchrun the processes share the batches and the weights. `cache_teacher`: a folder with the teacher's top
    words, made first where something is missing; then training needs no teacher, and no KL is measured. `track`: also
    send the metrics to tensorboard, wandb or trackio.

    Raises:
        RecipeError: no tokens, different vocabularies, settings that do not go together.
    """
    small, big = open_model(find_model(student)), open_model(find_model(teacher))
    d = recipe.distillation
    if d.tokens == 0:
        raise RecipeError("distillation.tokens is 0: nothing to do; set it with --set distillation.tokens=10M")
    if small.arch.vocab_size != big.arch.vocab_size:
        raise RecipeError(f"vocabularies differ: student {small.arch.vocab_size}, teacher {big.arch.vocab_size}")
    if cache_teacher is not None and d.top_k == 0:
        raise RecipeError("--cache-teacher keeps the teacher's top words; say how many: --set distillation.top_k=64")
    layers = _layer_map(small, big)
    if d.hidden_loss_weight and (cache_teacher or not layers or small.arch.hidden_size != big.arch.hidden_size):
        raise RecipeError("distillation.hidden_loss_weight needs a teacher in memory, a student of the same hidden "
                          "size, and its minipuzzle.json, which names the layers it kept")
    check_precision(d.precision, find_device(device))
    tracker = open_tracker(track, output_dir)
    job = _job(big, recipe, output_dir, seed, device, reporter, command)
    ranks = job.ranks
    # what decides the numbers: another student, teacher, data or setting is another run of training
    what = {"student": small.fingerprint, "teacher": big.fingerprint, "tokens": job.inputs["tokenize"], "seed": seed,
            "distillation": d.model_dump(exclude={"activation_checkpointing", "data", "tournament_tokens"})}
    state = job.run.path / "distillation" / digest(what)
    try:
        if ranks.main:
            if different := job.run.differences("distill", what):
                raise RecipeError(f"{output_dir} distils with other settings ({'; '.join(different)}); with those the "
                                  "same command continues, with another -o it starts anew")
            write_json(job.run.path / "run.json", run_about(job) | {"student": small.fingerprint})
        job.reporter.start({"tokenize": 5.0, "cache": 30.0 if cache_teacher else 0.0, "distill": 100.0})
        stages.tokenize_data(job)
        blocks, settings = stages.training_blocks(job), stages.settings(job)
        for note in training_notes(job):
            job.reporter.say(note)
        source: Model | CachedTeacher
        if cache_teacher is not None:
            source = _cached(job, cache_teacher, blocks, settings)
        else:
            # in several processes the shards go to the device, the whole stays on the CPU
            source = job.model if ranks.size == 1 else Model.load(big, "cpu")
        reference = job.reference if cache_teacher is None and ranks.main else None
        before = _measure(Model.load(small, ranks.device), reference, job) if ranks.main else None
        pupil = HybridLM(small.family, small.arch,
                         Model.load(small, ranks.device if ranks.size == 1 else "cpu").by_name())
        dtypes = small.dtypes(tuple(range(small.arch.num_layers)))

        def evaluate(s: HybridLM) -> dict[str, float]:
            if ranks.size > 1:
                return _sharded_loss(s, job)
            written = ((n, p.detach().to(dtypes[n]).float()) for n, p in s.parameters_by_name().items())
            return _measure(Model.build(s.family, s.arch, written), reference, job)

        if ranks.main:
            job.run.commit("distill", what, [], 0.0)  # from its first step on it is this training and no other
            stages.show_metrics(job, state)
        with job.reporter.stage("distill", d.tokens) as update:
            done = distill_model(pupil, source, blocks, settings, state, layers=layers, ranks=ranks,
                                 evaluate=evaluate, track=tracker if ranks.main else lambda row: None,
                                 evaluate_every=max(1, settings.steps(d.sequence_length) // stages.EVALUATIONS),
                                 progress=lambda tokens, loss: update(tokens, f"{tokens:,} tokens, loss {loss:.3f}"))
        weights = {n: whole(p.detach()).to(dtypes[n]) for n, p in pupil.parameters_by_name().items()}
        after = teacher_loss = None
        final = job.run.path / "model"
        if ranks.main:
            unchecked = job.run.path / "model-unchecked"
            write_model(unchecked, small.arch.to_config(small.config), weights.items(), small.path)
            reload_gate(unchecked, job.evaluation_ids[:2])
            after = _measure(Model.load(open_model(unchecked), ranks.device), reference, job)
            parent = None if reference is None else reference.quality()
            teacher_loss = None if parent is None else parent["loss"]
            report = distilled_report(job, small.arch, layers, {"parent": parent, "pruned": before, "distilled": after},
                                      done)
            for name, text in model_card_files(report).items():
                write_atomic(unchecked / name, text)
            shutil.rmtree(final, ignore_errors=True)
            unchecked.replace(final)
            write_atomic(job.run.path / "metrics.jsonl", (state / "metrics.jsonl").read_text())
        before, after, teacher_loss = ranks.broadcast((before, after, teacher_loss))
    except RecipeError:
        job.run.discard_unused()
        raise
    finally:
        job.run.close()
        ranks.close()
    return {"path": str(final), "tokens": done.tokens, "seconds": done.seconds, "loss_before": before["loss"],
            "kl_before": before.get("kl"), "loss": after["loss"], "kl": after.get("kl"), "loss_teacher": teacher_loss,
            "best_step": done.best_step, "skipped": done.skipped, "processes": ranks.size}


def _layer_map(small: ModelFolder, big: ModelFolder) -> tuple[int, ...]:
    """The teacher's layer of each of the student's; empty if it is not known."""
    if small.arch.pattern == big.arch.pattern:
        return tuple(range(big.arch.num_layers))
    try:
        kept = tuple(json.loads((small.path / "minipuzzle.json").read_text())["result"]["kept_layers"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        return ()
    fits = len(kept) == small.arch.num_layers and all(0 <= i < big.arch.num_layers for i in kept)
    return kept if fits else ()


def _cached(job: Job, folder: Path, blocks: Blocks, settings: TrainSettings) -> CachedTeacher:
    """Write what is missing of the teacher's cache; open it."""
    steps, size = settings.steps(blocks.sequence_length), settings.batch(blocks.sequence_length)
    wanted = blocks.numbers(settings.seed, 0, steps * size)
    key = {"teacher": job.folder.fingerprint, "tokenizer": job.tokenizer_hash, "data": blocks.corpus_hash,
           "sequence_length": blocks.sequence_length, "top_k": settings.top_k, "temperature": settings.temperature,
           "precision": "fp32" if settings.precision == "fp32" else "bf16"}

    def teacher() -> LiveTeacher:
        return LiveTeacher(Model.load(job.folder, job.device),
                           autocast=lambda: autocast(settings.precision, job.device))

    with job.reporter.stage("cache", len(set(wanted)) / job.ranks.size) as update:
        cache_blocks(folder, teacher, blocks, wanted, key, job.ranks, lambda done: update(done, "blocks"))
    return CachedTeacher(folder, job.device)


def _measure(model: Model, reference: Reference | None, job: Job) -> dict[str, float]:
    """Against the teacher, or alone."""
    if reference is not None:
        return measure(model, reference)
    ids = job.evaluation_ids
    parts = [token_metrics([final_hidden(model, part)], model.head, part)[0] for part in torch.split(ids, 4)]
    return {"loss": float(torch.cat([part.loss for part in parts]).mean())}


@torch.no_grad()
def _sharded_loss(student: HybridLM, job: Job) -> dict[str, float]:
    """Held-out loss of a student in shards: each process reads its part. All read equally many blocks, since they
    put each layer together; what comes again does not count."""
    ids, ranks = job.evaluation_ids, job.ranks
    own = range(ranks.rank, -(-len(ids) // ranks.size) * ranks.size, ranks.size)
    losses = []
    for part in torch.split(ids[[i % len(ids) for i in own]], 4):
        hidden = student(part)
        losses.append(token_metrics([hidden], student.head, part)[0].loss)
    reshard(student)
    mine = torch.cat(losses)[: sum(i < len(ids) for i in own)].tolist()
    values = [float(x) for found in ranks.gather(mine) for x in found]
    return {"loss": sum(values) / len(values)}
