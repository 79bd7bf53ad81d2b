"""The plan: everything that can be known, or be wrong, before the first weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from minipuzzle.core import environment
from minipuzzle.core.budget import Budget, Workload, human_budget, human_bytes, human_count, human_length
from minipuzzle.core.errors import InputError
from minipuzzle.costs.cost import Cost, cost, layer_parameters
from minipuzzle.data.corpus import check_sources
from minipuzzle.distill.loop import pass_tokens
from minipuzzle.distill.memory import SPARE, fitted, table
from minipuzzle.distill.precision import compute_dtype, resolve
from minipuzzle.distill.settings import Phase, TrainSettings
from minipuzzle.evaluate.retrieval import SAMPLES, TASKS
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.passes import STREAM_BYTES
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import samples_per_walk
from minipuzzle.pipeline.machine import machine_memory
from minipuzzle.pipeline.world import Memory
from minipuzzle.recipes.schema import DATA_SECTIONS, DistillationSection, Recipe
from minipuzzle.search.grid import search_architectures
from minipuzzle.search.halving import entrants
from minipuzzle.search.space import Space, resolve_space
from minipuzzle.surgery.refit import refit_bytes, samples_needed

SPARE_BYTES = 2**30  # for activations, libraries, and what else a process holds


def budget_of(settings: Recipe, parent: Architecture) -> Budget:
    """The budget in numbers: what is relative is of the parent at the same workload."""
    return Budget.parse(settings.budget, cost(parent, settings.workload.build()).to_json())


def refit_samples(settings: Recipe, parent: Architecture) -> int:
    """Calibration samples that a refit of the writers takes; 0 without one."""
    c = settings.calibration
    return 0 if settings.surgery.refit == "none" else max(c.samples, samples_needed(parent, c.sequence_length))


def phases_of(settings: Recipe) -> tuple[Phase, ...]:
    """The phases of the training; none where the recipe names none."""
    d = settings.distillation
    return tuple(Phase(*values) for values in d.parts("tokens", "sequence_length", "batch_tokens", "learning_rate")
                 ) if d.phases else ()


def longest_sequence(settings: Recipe) -> int:
    """Tokens of the longest sequence that is trained on."""
    return int(max(length for length, in settings.distillation.parts("sequence_length")))


@dataclass(frozen=True)
class Estimate:
    """What a stage is thought to take. seconds: apart from its FLOPs; memory_bytes: at its peak,
    where the parent is read layer by layer; disk_bytes: of what it writes. trains: students.
    references: on how many parts of the held-out blocks it keeps a model's activations."""

    flops: float = 0.0
    trains: bool = False
    seconds: float = 0.5
    memory_bytes: int = 0
    disk_bytes: int = 0
    references: int = 0


@dataclass(frozen=True)
class Plan:
    """The resolved request. `points` and `feasible` count architectures of the space and those
    within the budget; `memory_bytes` is what each of the `processes` may use, `weight_bytes` what a
    weight of the parent takes of it."""

    parent: Architecture
    recipe: Recipe
    workload: Workload
    budget: Budget
    parent_cost: Cost
    space: Space
    points: int
    feasible: int
    largest: Cost
    largest_arch: Architecture
    memory_bytes: int
    weight_bytes: int
    processes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    teacher: Architecture | None = None  # another one than the parent

    @property
    def on_host(self) -> bool:
        """Whether its memory is the host's, not a GPU's."""
        return self.device.type == "cpu"

    @property
    def refit_samples(self) -> int:
        return refit_samples(self.recipe, self.parent)

    @property
    def finalists(self) -> int:
        """Candidates that begin the tournament."""
        search, d = self.recipe.search, self.recipe.distillation
        (batch,), *_ = d.parts("batch_tokens")
        steps = -(-min(d.tournament_tokens, d.tokens) // batch)
        halving = search.tournament == "halving" and steps
        return min(entrants(search.finalists, steps) if halving else search.finalists, self.feasible)

    @property
    def calibration_tokens(self) -> int:
        return self.recipe.calibration.samples * self.recipe.calibration.sequence_length

    @property
    def retrieval_tokens(self) -> int:
        """Of the samples that measure retrieval."""
        return len(TASKS) * SAMPLES * self.recipe.calibration.probe_context

    @property
    def held_out_tokens(self) -> int:
        """Of one of the two parts."""
        return self.recipe.evaluation.samples * self.recipe.calibration.sequence_length

    @property
    def parent_flops(self) -> float:
        """Of the parent's forward pass, for a token of a calibration sample."""
        return _flops(self.parent, self.recipe.calibration.sequence_length)

    @property
    def teacher_bytes(self) -> int:
        """Of another teacher than the parent, beside it."""
        return 0 if self.teacher is None else self.weight_bytes * cost(self.teacher, self.workload).parameters

    @property
    def student_flops(self) -> float:
        """The same of the largest student."""
        return _flops(self.largest_arch, self.recipe.calibration.sequence_length)

    def trained_flops(self, first: int, last: int) -> float:
        """Of a training from one token of its budget to another: the teacher's forward pass, and the
        student three times."""
        parts = self.recipe.distillation.parts("tokens", "sequence_length")
        begin, found = 0, 0.0
        for number, (tokens, length) in enumerate(parts, 1):
            end = begin + tokens if number < len(parts) else max(last, begin)
            inside = max(0, min(last, end) - max(first, begin))
            found += inside * (_flops(self.teacher or self.parent, length) + 3 * _flops(self.largest_arch, length))
            begin = end
        return found

    @property
    def held_in(self) -> str:
        """The dtype of the parent in memory."""
        return "float32" if self.weight_bytes == 4 else "bf16"

    @property
    def students_bytes(self) -> int:
        """Of the largest student in float32: with gradient and two moments where it is trained, and
        the copy that is written; else as it was cut, as it was written, and plainly sliced. Nothing
        where none is made."""
        copies = (4 if self.recipe.distillation.tokens else 3) if self.feasible else 0
        return 4 * copies * self.largest.parameters // self.processes + self.on_host * self.copy_bytes

    @property
    def copy_bytes(self) -> int:
        """Of the host: weights and moments, while they are written."""
        trained = self.recipe.distillation.tokens and self.feasible
        return 12 * self.largest.parameters // self.processes if trained else 0

    @property
    def reference_bytes(self) -> int:
        """Of the host: a model's last activations on one part of the held-out blocks."""
        blocks = -(-self.recipe.evaluation.samples // self.processes)
        return self.weight_bytes * blocks * self.recipe.calibration.sequence_length * self.parent.hidden_size

    @property
    def student_stage_bytes(self) -> int:
        """Of a stage that makes students: a training step, or the students and what is read of the parent; a
        refit."""
        if self.recipe.distillation.tokens and self.feasible:
            beside = self.weight_bytes * self.parent_cost.parameters // self.processes if self.teacher else 0
            return sum(self.training()[1].values()) + beside + self.refit_bytes
        return self.students_bytes + self.refit_bytes + self.layers_bytes

    @property
    def usable_bytes(self) -> int:
        """Of a GPU's memory a part stays free, for its context, collectives and fragmentation."""
        return int(self.memory_bytes * SPARE) if self.device.type == "cuda" else self.memory_bytes

    def training(self, ranks: Ranks | None = None, memory_bytes: int | None = None
                 ) -> tuple[TrainSettings, dict[str, int]]:
        """How the largest student would be trained by such processes, and what one of them holds at the peak of a
        step, in bytes (distill/memory.py). Left out: those of the plan."""
        d, per_host = self.recipe.distillation, environment.number("LOCAL_WORLD_SIZE", 1)
        precision = resolve(d.precision, self.device)
        if ranks is not None and d.precision == "auto":
            precision = "bf16"  # of cards that are not here, all of which have it
        ranks = ranks or Ranks(self.device, 0, self.processes, min(self.processes, per_host))
        again = None if d.activation_checkpointing == "auto" else d.activation_checkpointing
        settings = TrainSettings(d.tokens, d.batch_tokens, d.learning_rate, optimizer=d.optimizer,
                                 precision=precision, activation_checkpointing=again)
        length, teacher = longest_sequence(self.recipe), self.teacher or self.parent
        made = fitted(settings, teacher, [self.largest_arch], ranks,
                      self.memory_bytes if memory_bytes is None else memory_bytes, length)
        return made, table(teacher, self.largest_arch, made, ranks, max(pass_tokens(ranks.device), length))

    @property
    def state_bytes(self) -> int:
        """Of a training on the disk: weights, two moments and the best weights, in float32."""
        return 16 * self.largest.parameters if self.recipe.distillation.tokens else 0

    @property
    def refit_bytes(self) -> int:
        """The streams of a refit, and the Gram matrix of one block."""
        tokens = self.refit_samples * self.recipe.calibration.sequence_length
        return refit_bytes(self.parent, tokens) if tokens else 0

    @property
    def resident_bytes(self) -> int:
        """Of the parent in memory, and of what is made beside it."""
        return (self.weight_bytes * self.parent_cost.parameters + self.teacher_bytes + self.students_bytes
                + self.refit_bytes + self.on_host * self.reference_bytes)

    @property
    def resident(self) -> bool:
        """Whether the parent is held in memory, by several processes until they train."""
        return self.resident_bytes + SPARE_BYTES <= self.memory_bytes

    @property
    def layers_bytes(self) -> int:
        """Of the layers that a pass from the disk holds: two that are read, one that is cut."""
        arch = self.parent
        return 3 * self.weight_bytes * max(layer_parameters(arch, i) for i in range(arch.num_layers))

    @property
    def stream_bytes(self) -> int | None:
        """Memory for the streams of a pass; None: what is fastest."""
        return None if self.resident else max(1, self.memory_bytes // 2 - self.layers_bytes)

    @property
    def memory(self) -> Memory:
        """How it is used."""
        room = self.memory_bytes / 2 - 2 * self.weight_bytes * self.parent_cost.parameters - self.teacher_bytes
        students = room // ((28 if self.on_host else 16) * self.largest.parameters)
        return Memory(self.memory_bytes, self.resident, self.stream_bytes, max(1, int(students)))

    def passes(self) -> str:
        """How often scoring goes through the weights, and from where, in words."""
        c, arch = self.recipe.calibration, self.parent
        streams = self.stream_bytes or STREAM_BYTES["cpu"]
        size = min(c.samples, samples_per_walk(arch, c.sequence_length, arch.num_layers + 1, streams))
        where = "in memory" if self.resident else "layer by layer from disk"
        count = -(-c.samples // size)
        weights = human_bytes(self.weight_bytes * self.parent_cost.parameters)
        return (f"{c.samples} samples of {c.sequence_length} tokens, {size} at a time, in {count} "
                f"pass{'es' if count > 1 else ''} over the weights ({weights} in "
                f"{self.held_in}), {where}; {human_bytes(self.memory_bytes)} to use")

    def lines(self) -> list[str]:
        """The plan in words."""
        limits = ", ".join(f"{key} {human_budget(key, limit)}" for key, limit in self.budget.limits)
        p, w, d = self.parent_cost, self.workload, self.recipe.distillation
        search = self.recipe.search
        measured = min(search.measure, self.feasible)
        phases = ", then ".join(f"{human_count(tokens)} tokens" + (f" of {human_length(length)}" if d.phases else "")
                                for tokens, length in d.parts("tokens", "sequence_length"))
        training = (f"tournament of {self.finalists}, distill the winner on {phases}" if d.tokens else
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
        ]

    def to_json(self) -> dict[str, Any]:
        return {"parent": self.parent.to_json(), "parent_cost": self.parent_cost.to_json(),
                "workload": self.workload.to_json(), "budget": self.budget.to_json(), "points": self.points,
                "feasible": self.feasible, "largest": self.largest.to_json(), "recipe": self.recipe.model_dump()}


def _flops(arch: Architecture, length: int) -> float:
    """Of a forward pass, for a token of a sequence."""
    found = cost(arch, Workload(context=length)).prefill_flops_per_token
    return float(found + 2 * arch.vocab_size * arch.hidden_size)  # the head sees every token


def check_phases(d: DistillationSection) -> None:
    """Raise InputError for a phase that has no whole sequence in a step, and for a tournament longer
    than the first."""
    for number, (tokens, length, batch) in enumerate(d.parts("tokens", "sequence_length", "batch_tokens"), 1):
        which = f"distillation.phases, phase {number} of {len(d.phases)}: " if d.phases else "distillation."
        if batch < length:
            raise InputError(f"{which}batch_tokens {batch} is less than one sequence of {length} tokens; raise it or "
                             f"lower {'' if d.phases else 'distillation.'}sequence_length")
        if d.phases and d.tokens and number == 1 and d.tournament_tokens > tokens:
            raise InputError(f"distillation.tournament_tokens {d.tournament_tokens:,} exceeds the {tokens:,} tokens of "
                             f"the first of {len(d.phases)} phases, to which the tournament belongs; lower it")


def make_plan(parent: Architecture, recipe: Recipe, need_budget: bool = True,
              memory_bytes: int | None = None, reads: tuple[str, ...] = DATA_SECTIONS,
              device: torch.device | None = None, processes: int = 1,
              teacher: Architecture | None = None) -> Plan:
    """Resolve a recipe for a parent. Scoring alone does not need the budget to be met.
    `memory_bytes`: what may be used, the machine's if left out. `reads`: the sections whose data
    are read. `device`: where it will run, the CPU if left out. `processes`: that share the students.
    `teacher`: another one than the parent.

    Raises:
        InputError: a setting that is wrong or does not fit the parent.
        Infeasible: nothing in the space meets the budget.
    """
    if recipe.scores.racing and recipe.scores.iterative:
        raise InputError("scores.racing and scores.iterative exclude each other: a race ends with the first round")
    if recipe.search.rank == "tasks" and not recipe.evaluation.tasks:
        raise InputError("search.rank tasks needs tasks, and evaluation.tasks names none; for example "
                         "--set evaluation.tasks=[mmlu]")
    d = recipe.distillation
    check_phases(d)
    if d.top_k > parent.vocab_size:
        raise InputError(f"distillation.top_k {d.top_k} exceeds the vocabulary of {parent.vocab_size} tokens; 0 takes "
                          "all")
    for name in dict.fromkeys(source for section in reads for source in recipe.sources(section)):
        check_sources(name)
    if teacher is not None and teacher.vocab_size != parent.vocab_size:
        raise InputError(f"vocabularies differ: {parent.vocab_size} tokens, and the teacher's {teacher.vocab_size}")
    if teacher is not None and d.hidden_loss_weight:
        raise InputError("distillation.hidden_loss_weight compares streams layer by layer, and the teacher's layers "
                         "are not the parent's: set it to 0, or leave --teacher out")
    workload = recipe.workload.build()
    parent_cost = cost(parent, workload)
    budget = Budget.parse(recipe.budget, parent_cost.to_json())
    space = resolve_space(recipe.space.model_dump(), parent)
    if d.hidden_loss_weight and space.widths["hidden_size"] != (parent.hidden_size,) and need_budget:
        raise InputError("distillation.hidden_loss_weight compares streams of the same size: keep the parent's with "
                          f"space.hidden_size = {parent.hidden_size}, or set it to 0")
    memory = machine_memory() if memory_bytes is None else memory_bytes
    device = device or torch.device("cpu")
    weight = compute_dtype(d.precision, device).itemsize
    if not need_budget:
        return Plan(parent, recipe, workload, budget, parent_cost, space, space.num_points, 0, parent_cost,
                    parent, memory, weight, processes, device)
    # without scores the search only enumerates and prices, largest first
    found = search_architectures(parent, space, budget, workload, keep=1)
    return Plan(parent, recipe, workload, budget, parent_cost, space, found.points, found.feasible,
                found.candidates[0].cost, found.candidates[0].architecture, memory, weight, processes, device,
                teacher)


