"""Measured quality of a folder, alone or beside a teacher; its speed; lm-eval's tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipuzzle.core.environment import world_size
from minipuzzle.core.errors import InputError
from minipuzzle.data.corpus import check_sources
from minipuzzle.evaluate.quality import Reference, check_finite, measure
from minipuzzle.evaluate.retrieval import make_probe, measure_models
from minipuzzle.evaluate.served import check_tasks, latency, tasks
from minipuzzle.models.passes import Pass
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import find_device
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.recipes.schema import Recipe
from minipuzzle.verbs.folder import scratch_world
from minipuzzle.verbs.source import find_model


def evaluate(model: str | Path, teacher: str | Path | None, recipe: Recipe, device: str = "cpu",
             speed: bool = False, task_names: Sequence[str] = (), limit: int | None = None,
             reporter: Reporter | None = None) -> dict[str, Any]:
    """Held-out loss (nats per token and per byte), perplexity, accuracy; against a teacher KL,
    agreement, and the paired difference of the losses. On the final part of the held-out blocks,
    the one that `prune` reports.

    With `speed` also latency, at the recipe's context and batch; with `task_names` also lm-eval's
    results. `reporter` hears of progress.
    """
    reporter = reporter or Reporter()
    if world_size() > 1:
        raise InputError("evaluate runs in one process; start it without torchrun")
    if task_names:
        check_tasks(list(task_names))
    folder = open_model(find_model(model))
    other = open_model(find_model(teacher)) if teacher is not None else folder
    if other.arch.vocab_size != folder.arch.vocab_size:
        raise InputError(f"vocabularies differ: {folder.arch.vocab_size} and the teacher's {other.arch.vocab_size}")
    data = (recipe.evaluation.samples, recipe.calibration.sequence_length)
    check_sources(recipe.evaluation.data)
    ranks = Ranks(find_device(device))
    reporter.start({"tokenize": 5.0, "measure": 30.0, "retrieval": 10.0} | ({"latency": 30.0} if speed else {})
                   | ({"tasks": 300.0} if task_names else {}))
    with scratch_world(folder, recipe, ranks, ("evaluation",), reporter) as world:
        final_NT = world.held_out_ids(*data)[1]
        source = world.parent.source if teacher is None else Model.load(other, ranks.device, world.dtype)
        with reporter.stage("measure", 2 * len(final_NT)) as update:
            reference = Reference(source, final_NT, world.parent.memory.stream_bytes if teacher is None else None,
                                  ranks, lambda done: update(done, ""))
            found = reference.quality() if teacher is None else measure(world.parent.model, reference)
        check_finite(found, folder.path, world.parent.model, final_NT)
        probe = make_probe(folder.arch.vocab_size, recipe.calibration.probe_context)
        with reporter.stage("retrieval", len(probe.ids_NT)) as update:
            run = Pass(source, probe.ids_NT, memory_bytes=world.parent.memory.stream_bytes,
                       progress=lambda done: update(done, ""))
            retrieved = measure_models(probe, source, [] if teacher is None else [world.parent.model], run)[-1]
        bytes_per_token = world.blocks("evaluation", "held_out", data[1]).bytes_per_token
    out: dict[str, Any] = {"model": str(folder.path), "teacher": str(other.path) if teacher is not None else None,
                           "tokens": reference.ids.numel()}
    of_one = ("loss", "loss_stderr", "accuracy", "accuracy_stderr")
    out |= {k: v for k, v in found.items() if teacher is not None or k in of_one}
    if teacher is not None:
        out["paired"] = {"loss_minus_parent": out.pop("loss_minus_parent"),
                         "stderr": out.pop("loss_minus_parent_stderr", None)}
    out |= {"loss_per_byte": found["loss"] / bytes_per_token, "perplexity": _perplexity(found["loss"])}
    out["retrieval"] = retrieved
    if speed:
        with reporter.stage("latency", 1):
            out["latency"] = latency(folder.path, device, recipe.workload.context, recipe.workload.batch)
    if task_names:
        with reporter.stage("tasks", 1):
            out["tasks"] = tasks(folder.path, list(task_names), device, limit)
    return out


def _perplexity(loss: float) -> float | None:
    """None where no float holds it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None
