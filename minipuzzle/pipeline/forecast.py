"""What a run will take on this machine, in time, memory and disk: each stage tells its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from minipuzzle.core.budget import human_bytes
from minipuzzle.core.errors import ResourceError
from minipuzzle.pipeline.cluster import remedy_here
from minipuzzle.pipeline.machine import machine_memory, matmul_flops_per_second
from minipuzzle.pipeline.plan import Plan
from minipuzzle.pipeline.stage import Stage
from minipuzzle.surgery.refit import writer_inputs

# of a large matrix product's speed: what the whole forward pass of a hybrid reaches on CPU, from
# benchmarks/results/main_job.json; only the estimates of time depend on it
EFFICIENCY = 0.3


def estimates(plan: Plan, stages: Iterable[Stage]) -> dict[str, float]:
    """Seconds that each stage may take here, from its FLOPs and a quick look at the machine's
    speed."""
    speed = matmul_flops_per_second(plan.parent.hidden_size, writer_inputs(plan.parent)) * EFFICIENCY
    needs = {stage.name: stage.estimate(plan) for stage in stages}
    return {name: need.flops / speed + need.seconds for name, need in needs.items()}


def host_bytes(plan: Plan, stage: Stage) -> int:
    """At the stage's peak, on the device that it runs on."""
    own = stage.estimate(plan)
    needed = own.memory_bytes + plan.on_host * own.references * plan.reference_bytes
    return max(needed, plan.resident_bytes) if plan.resident and own.flops else needed


def check_disk(plan: Plan, stages: Iterable[Stage], folder: Path) -> None:
    """Room for the states of training and for the result.

    Raises:
        ResourceError: too little.
    """
    there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free, needed = shutil.disk_usage(there).free, sum(stage.estimate(plan).disk_bytes for stage in stages)
    if free < needed:
        raise ResourceError(f"{there} has {human_bytes(free)} free, the run needs about {human_bytes(needed)}; "
                            "choose another disk with -o, or fewer search.finalists")


def check_memory(plan: Plan, stages: Iterable[Stage], device: torch.device) -> None:
    """Room for what cannot be read layer by layer.

    Raises:
        ResourceError: too little.
    """
    made = [stage.estimate(plan) for stage in stages]
    kept = plan.reference_bytes * max(own.references for own in made)
    needed = max(own.memory_bytes + plan.on_host * own.references * plan.reference_bytes for own in made)
    host = 0 if plan.on_host else plan.copy_bytes + kept
    if host > machine_memory():
        raise ResourceError(f"the host has {human_bytes(machine_memory())} for each process; the copy of the student "
                            f"that is written while it trains and the parent's activations on "
                            f"{plan.recipe.evaluation.samples} held-out blocks need {human_bytes(host)}; use more "
                            "processes, fewer evaluation.samples, or a machine with more memory")
    if plan.usable_bytes >= needed:
        return
    if not plan.feasible:
        raise ResourceError(f"scoring holds up to three layers in {plan.held_in}, {human_bytes(needed)} of this model; "
                            f"there is {human_bytes(plan.memory_bytes)} to use: raise --memory")
    trains = plan.recipe.distillation.tokens > 0
    written = ", and the copy that is written," if plan.on_host else ""
    what = (f"the parent, and a student with its gradient and moments{written} in float32" if trains else
            "a student in float32")
    refit = f", {human_bytes(plan.refit_bytes)} of it to refit" if plan.refit_bytes else ""
    refit += f", {human_bytes(kept)} of it for held-out activations (evaluation.samples)" if kept > needed / 4 else ""
    less = "; --set distillation.tokens=0 prunes only, and reads the parent layer by layer" if trains else ""
    fits = f"; it fits with --set {words}" if trains and (words := remedy_here(plan)) else less
    raise ResourceError(f"{device} has {human_bytes(plan.usable_bytes)} to use, the run needs about "
                        f"{human_bytes(needed)} for {what}{refit}; use a machine with more memory, by "
                        f"{human_bytes(needed - plan.usable_bytes)}{fits}")
