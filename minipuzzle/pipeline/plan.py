"""The plan: everything that can be known, or be wrong, before the first weight is read."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.budget import Budget, Workload, human_budget, human_bytes, human_count
from minipuzzle.core.errors import InputError, ResourceError
from minipuzzle.data.blocks import spread_tokens
from minipuzzle.data.corpus import check_sources, has_end, parse_blend
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.cost import Cost, cost, layer_parameters
from minipuzzle.importance.racing import Race
from minipuzzle.models.passes import STREAM_BYTES
from minipuzzle.models.walk import samples_per_walk
from minipuzzle.pipeline.machine import machine_memory
from minipuzzle.pipeline.world import Memory
from minipuzzle.recipes.schema import DATA_SECTIONS, Recipe
from minipuzzle.search.grid import search_architectures
from minipuzzle.search.space import Space, resolve_space
from minipuzzle.surgery.refit import refit_bytes, samples_needed, writer_inputs

# key, the only value that exists so far, and what to say. Accepting and ignoring a setting would be
# a lie.
_NOT_YET = (("search.export", "uniform"),)
HELD_OUT_TOKENS = 2**20  # of a source
EVALUATIONS = 12  # looks at the selection part of the held-out blocks during a whole distillation
CONTROLS = 8  # random architectures that are measured beside the best predicted, to judge the prediction
CURVE_POINTS = 3  # measured widths per axis; between them the search interpolates
# of a large matrix product's speed: what the whole forward pass of a hybrid reaches on CPU, from
# benchmarks/results/main_job.json; only the estimates of time depend on it
EFFICIENCY = 0.3
SPARE_BYTES = 2**30  # for activations, libraries, and what else a process holds


def the_race(settings: Recipe, arch: Architecture) -> Race:
    """How many layers of each kind the search will drop, and how sure of the choice it shall be."""
    drops = resolve_space(dict(settings.space), arch).drops
    return Race({unit: (min(drops[name]), max(drops[name])) for name, unit in arch.family.drops.items()},
                settings.scores.confidence, settings.scores.layer_metric)


def budget_of(settings: Recipe, parent: Architecture) -> Budget:
    """The budget in numbers: what is relative is of the parent at the same workload."""
    return Budget.parse(settings.budget, cost(parent, settings.workload.build()).to_json())


def curve_widths(space: Space, parent: Architecture) -> dict[str, tuple[int, ...]]:
    """The widths of each axis at which curves are measured: spread over the space, its ends among
    them."""
    out = {}
    for axis, values in space.widths.items():
        widths = sorted(w for w in values if w != parent.sizes()[axis])
        count = min(CURVE_POINTS, len(widths))
        places = [round(i * (len(widths) - 1) / max(1, count - 1)) for i in range(count)]
        out[axis] = tuple(widths[p] for p in places)
    return out


def refit_samples(settings: Recipe, parent: Architecture) -> int:
    """Calibration samples that a refit of the writers takes; 0 without one."""
    c = settings.calibration
    return 0 if settings.surgery.refit == "none" else max(c.samples, samples_needed(parent, c.sequence_length))


def tokens_needed(settings: Recipe, parent: Architecture,
                  data: Mapping[str, str]) -> dict[str, dict[str, int | None]]:
    """source -> split -> tokens that do for what is read; None: all there are. `data`: section of
    the recipe -> what it reads. Training goes over all of a source that has an end; calibration and
    evaluation spread their blocks over the first `spread_tokens` and HELD_OUT_TOKENS of it."""
    c, d = settings.calibration, settings.distillation
    # two parts, and a quarter more: documents are shared out whole
    held_out = 5 * settings.evaluation.samples * c.sequence_length // 2
    samples = max(c.samples, refit_samples(settings, parent))
    whole = {"calibration": spread_tokens(samples, c.sequence_length), "distillation": None}
    train = {"calibration": samples * c.sequence_length,
             "distillation": d.tokens + d.batch_tokens + d.sequence_length}
    out: dict[str, dict[str, int | None]] = {}
    for section, name in data.items():
        for source in parse_blend(name) if section != "distillation" or d.tokens else ():
            ends, limits = has_end(source), out.setdefault(source, {})
            limits["held_out"] = max(HELD_OUT_TOKENS, 2 * held_out) if ends else held_out
            if section in train:
                limits["train"] = whole[section] if ends else (limits.get("train") or 0) + train[section]
    return out


@dataclass(frozen=True)
class Plan:
    """The resolved request. `points` and `feasible` count architectures of the space and those
    within the budget; `memory_bytes` is what may be used."""

    parent: Architecture
    recipe: Recipe
    workload: Workload
    budget: Budget
    parent_cost: Cost
    space: Space
    points: int
    feasible: int
    largest: Cost
    memory_bytes: int

    @property
    def refit_samples(self) -> int:
        return refit_samples(self.recipe, self.parent)

    @property
    def students_bytes(self) -> int:
        """Of the largest student in float32: with gradient and two moments where it is trained,
        else as it was cut, as it was written, and plainly sliced. Nothing where none is made."""
        return 4 * (4 if self.recipe.distillation.tokens else 3) * self.largest.parameters if self.feasible else 0

    @property
    def refit_bytes(self) -> int:
        """The streams of a refit, and the Gram matrix of one block."""
        tokens = self.refit_samples * self.recipe.calibration.sequence_length
        return refit_bytes(self.parent, tokens) if tokens else 0

    @property
    def resident(self) -> bool:
        """Whether the parent is held in memory from the first stage to the last: in float32, twice
        if it is rotated."""
        copies = 2 if self.recipe.surgery.hidden == "rotate" else 1
        needed = 4 * self.parent_cost.parameters * copies + self.students_bytes + self.refit_bytes
        return needed + SPARE_BYTES <= self.memory_bytes

    @property
    def layers_bytes(self) -> int:
        """Of the layers that a pass from the disk holds, in float32: two that are read, one that is
        cut."""
        arch = self.parent
        return 12 * max(layer_parameters(arch, i) for i in range(arch.num_layers))

    @property
    def stream_bytes(self) -> int | None:
        """Memory for the streams of a pass; None: what is fastest."""
        return None if self.resident else max(1, self.memory_bytes // 2 - self.layers_bytes)

    @property
    def memory(self) -> Memory:
        """How it is used."""
        students = (self.memory_bytes / 2 - 8 * self.parent_cost.parameters) // (16 * self.largest.parameters)
        return Memory(self.memory_bytes, self.resident, self.stream_bytes, max(1, int(students)))

    def passes(self) -> str:
        """How often scoring goes through the weights, and from where, in words."""
        c, arch = self.recipe.calibration, self.parent
        streams = self.stream_bytes or STREAM_BYTES["cpu"]
        size = min(c.samples, samples_per_walk(arch, c.sequence_length, arch.num_layers + 1, streams))
        where = "in memory" if self.resident else "layer by layer from disk"
        count = -(-c.samples // size)
        return (f"{c.samples} samples of {c.sequence_length} tokens, {size} at a time, in {count} "
                f"pass{'es' if count > 1 else ''} over the weights ({human_bytes(4 * self.parent_cost.parameters)} in "
                f"float32), {where}; {human_bytes(self.memory_bytes)} to use")

    def estimates(self) -> dict[str, float]:
        """Seconds that each stage may take here, from its FLOPs and a quick look at this machine's
        speed."""
        r = self.recipe
        speed = _matmul_flops_per_second(self.parent) * EFFICIENCY
        parent, child = self.parent_cost.flops_per_token, self.largest.flops_per_token
        calibration = r.calibration.samples * r.calibration.sequence_length
        held_out = r.evaluation.samples * r.calibration.sequence_length
        points = sum(len(w) for w in curve_widths(self.space, self.parent).values())
        share = min(r.distillation.tournament_tokens, r.distillation.tokens)
        per_token = parent + 3 * child
        look = held_out * child if r.distillation.tokens else 0
        # the parent, the student twice, and Gram matrices in float64
        refit = r.calibration.sequence_length * self.refit_samples * (
            parent + 2 * child + 4 * self.parent.num_layers * writer_inputs(self.parent) ** 2)
        flops = {"tokenize": 0.0, "score": calibration * parent * (self.parent.num_layers / 2 + 2),
                 "curves": calibration * parent * (points + 1), "search": 0.0,
                 "measure": held_out * (parent + child * min(r.search.measure + CONTROLS, self.feasible)),
                 "tournament": float((per_token * share + refit + 2 * look) * min(r.search.finalists, self.feasible)),
                 "distill": float(per_token * (r.distillation.tokens - share) + EVALUATIONS * look),
                 "export": held_out * 3.0 * parent}
        fixed = {"tokenize": 5.0, "search": 1.0, "export": 15.0}
        return {name: count / speed + fixed.get(name, 0.5) for name, count in flops.items()}

    def lines(self) -> list[str]:
        """The plan in words."""
        estimates = self.estimates()
        limits = ", ".join(f"{key} {human_budget(key, limit)}" for key, limit in self.budget.limits)
        p, w, d = self.parent_cost, self.workload, self.recipe.distillation
        search = self.recipe.search
        measured, finalists = min(search.measure, self.feasible), min(search.finalists, self.feasible)
        training = (f"tournament of {finalists}, distill the winner on {human_count(d.tokens)} tokens" if d.tokens else
                    "nothing is trained")
        return [
            f"parent     {self.parent}",
            f"           {human_count(p.parameters)} parameters; {human_bytes(p.memory_bytes)} in memory "
            f"(weights {human_bytes(p.weights_bytes)}, KV cache {human_bytes(p.kv_cache_bytes)}, "
            f"Mamba state {human_bytes(p.mamba_state_bytes)})",
            f"workload   {w.precision} weights, {w.kv_precision} KV, {w.state_precision} state, "
            f"context {w.context}, batch {w.batch}",
            f"budget     {limits}",
            f"space      {self.points:,} architectures, {self.feasible:,} within the budget; the largest of them "
            f"{human_count(self.largest.parameters)} parameters, {human_bytes(self.largest.memory_bytes)}",
            f"then       measure {measured}, {training}",
            f"scoring    {self.passes()}",
            "stages     " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in estimates.items()),
            f"time       about {sum(estimates.values()) / 60:.1f} min on this machine (a rough estimate)",
        ]

    def to_json(self) -> dict[str, Any]:
        return {"parent": self.parent.to_json(), "parent_cost": self.parent_cost.to_json(),
                "workload": self.workload.to_json(), "budget": self.budget.to_json(), "points": self.points,
                "feasible": self.feasible, "largest": self.largest.to_json(), "estimates": self.estimates(),
                "recipe": self.recipe.model_dump()}


def make_plan(parent: Architecture, recipe: Recipe, need_budget: bool = True,
              memory_bytes: int | None = None, reads: tuple[str, ...] = DATA_SECTIONS) -> Plan:
    """Resolve a recipe for a parent. Scoring alone does not need the budget to be met.
    `memory_bytes`: what may be used, the machine's if left out. `reads`: the sections whose data
    are read.

    Raises:
        InputError: a setting that is wrong, does not fit the parent, or is not built yet.
        Infeasible: nothing in the space meets the budget.
    """
    values = recipe.model_dump()
    for path, only in _NOT_YET:
        section, key = path.split(".")
        if values[section][key] != only:
            raise InputError(f"{path} = {values[section][key]!r} is not built yet; the only value is {only!r}")
    if recipe.scores.racing and recipe.scores.iterative:
        raise InputError("scores.racing and scores.iterative exclude each other: a race ends with the first round")
    d = recipe.distillation
    if d.batch_tokens < d.sequence_length:
        raise InputError(f"distillation.batch_tokens {d.batch_tokens} is less than one sequence of "
                          f"{d.sequence_length} tokens; raise it or lower distillation.sequence_length")
    if d.top_k > parent.vocab_size:
        raise InputError(f"distillation.top_k {d.top_k} is more than the model's {parent.vocab_size} words; 0 takes "
                          "all")
    for name in dict.fromkeys(values[section]["data"] for section in reads):
        check_sources(name)
    workload = recipe.workload.build()
    parent_cost = cost(parent, workload)
    budget = Budget.parse(recipe.budget, parent_cost.to_json())
    space = resolve_space(recipe.space.model_dump(), parent)
    if d.hidden_loss_weight and space.widths["hidden_size"] != (parent.hidden_size,) and need_budget:
        raise InputError("distillation.hidden_loss_weight compares streams of the same size: keep the parent's with "
                          f"space.hidden_size = {parent.hidden_size}, or set it to 0")
    memory = machine_memory() if memory_bytes is None else memory_bytes
    if not need_budget:
        return Plan(parent, recipe, workload, budget, parent_cost, space, space.num_points, 0, parent_cost, memory)
    # without scores the search only enumerates and prices, largest first
    found = search_architectures(parent, space, budget, workload, keep=1)
    return Plan(parent, recipe, workload, budget, parent_cost, space, found.points, found.feasible,
                found.candidates[0].cost, memory)


def check_disk(plan: Plan, folder: Path) -> None:
    """Room for the states of the tournament and of the winner (weights, two moments and the best
    weights, float32), and for the result.

    Raises:
        ResourceError: too little.
    """
    there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    states = plan.recipe.search.finalists + 1 if plan.recipe.distillation.tokens else 0
    needed = plan.largest.parameters * (16 * states + 8)
    if free < needed:
        raise ResourceError(f"{there} has {human_bytes(free)} free, the run needs about {human_bytes(needed)}; "
                            "choose another disk with -o, or fewer search.finalists")


def check_memory(plan: Plan, device: torch.device) -> None:
    """Room for what cannot be read layer by layer: a student, the teacher where it is trained, a
    refit; for scoring alone the layers themselves.

    Raises:
        ResourceError: too little.
    """
    if not plan.feasible:
        if plan.memory_bytes < plan.layers_bytes:
            raise ResourceError(f"scoring holds up to three layers in float32, {human_bytes(plan.layers_bytes)} of "
                                f"this model; there is {human_bytes(plan.memory_bytes)} to use: raise --memory")
        return
    trains = plan.recipe.distillation.tokens > 0
    teacher = 4 * plan.parent_cost.parameters if trains else plan.layers_bytes
    needed = plan.students_bytes + teacher + plan.refit_bytes
    if plan.resident or plan.memory_bytes >= needed:
        return
    what = "the parent, and a student with its gradient and moments, in float32" if trains else "a student in float32"
    refit = f", {human_bytes(plan.refit_bytes)} of it to refit" if plan.refit_bytes else ""
    less = "; --set distillation.tokens=0 prunes only, and reads the parent layer by layer" if trains else ""
    raise ResourceError(f"{device} has {human_bytes(plan.memory_bytes)} to use, the run needs about "
                        f"{human_bytes(needed)} for {what}{refit}; use a machine with more memory{less}")


def _matmul_flops_per_second(arch: Architecture) -> float:
    """The fastest of some matrix products of the model's own shape: what another process takes does
    not count."""
    tokens, hidden, wide = 2048, arch.hidden_size, writer_inputs(arch)
    x, w = torch.randn(tokens, hidden), torch.randn(wide, hidden)
    x @ w.T
    best, end = float("inf"), time.perf_counter() + 0.3
    while (begin := time.perf_counter()) < end:
        x @ w.T
        best = min(best, time.perf_counter() - begin)
    return 2.0 * tokens * hidden * wide / best
