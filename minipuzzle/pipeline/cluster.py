"""What a run takes on GPUs that are not here: time, memory and disk for each stage, and what would make it fit.

Memory of training is distill/memory.py's forecast, with what would be decided there (blocks computed
again, sequences of a pass, the chunk of the loss, shards). Time: FLOPs over those of the cards at
EFFICIENCY of their dense bf16 peak; a roofline of each operation gives 0.3 (8B -> 4B) to 0.45
(56B -> 47B) without any communication. Nothing of this was compared with a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minipuzzle.core.budget import human_bytes, human_count, human_length
from minipuzzle.core.devices import Device
from minipuzzle.distill.memory import SPARE
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.models.passes import STREAM_BYTES
from minipuzzle.models.ranks import Ranks
from minipuzzle.pipeline.plan import Plan
from minipuzzle.pipeline.stage import Stage

EFFICIENCY = 0.3
PER_HOST = 8  # GPUs of a machine
MOST_GPUS = 4096


@dataclass(frozen=True)
class Need:
    """Of a stage: bytes of each GPU, of each host, and of the disk that it fills. `memory`: what a process
    that trains holds at the peak of a step; `phases`: of its training, with the seconds of each."""

    name: str
    seconds: float
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    memory: Mapping[str, int] = field(default_factory=dict)
    phases: Sequence[Mapping[str, Any]] = ()

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value not in ({}, ())}


def needs(plan: Plan, stages: Iterable[Stage], device: Device, gpus: int) -> list[Need]:
    """What each stage takes on so many of these cards, PER_HOST in a machine."""
    speed = gpus * device.flops["bf16"] * EFFICIENCY
    out = []
    for stage in stages:
        own = stage.estimate(plan)
        memory = training(plan, device, gpus)[1] if own.trains else {}
        gpu = sum(memory.values()) if own.trains else _pass_bytes(plan, device) if own.flops else 0
        host = plan.copy_bytes * min(gpus, PER_HOST) // gpus if own.trains else plan.layers_bytes
        host += own.references * plan.reference_bytes * min(gpus, PER_HOST) // gpus
        phases = _phases(plan, speed) if own.trains and stage.name == "distill" else ()
        out.append(Need(stage.name, own.flops / speed + own.seconds, gpu, host, own.disk_bytes, memory, phases))
    return out


def training(plan: Plan, device: Device, gpus: int) -> tuple[TrainSettings, dict[str, int]]:
    """How it would be trained, and what each GPU holds at the peak of a step."""
    return plan.training(Ranks(torch.device("cuda"), 0, gpus, min(gpus, PER_HOST)), device.memory_bytes)


def _phases(plan: Plan, speed: float) -> tuple[dict[str, Any], ...]:
    """Of a training in phases, the tournament's share of the first included."""
    d, begin, out = plan.recipe.distillation, 0, []
    for tokens, length in d.parts("tokens", "sequence_length") if d.phases else ():
        out.append({"tokens": tokens, "sequence_length": length,
                    "seconds": plan.trained_flops(begin, begin + tokens) / speed})
        begin += tokens
    return tuple(out)


def _pass_bytes(plan: Plan, device: Device) -> int:
    """Of a pass that scores or measures: the parent, or the layers that are read of it, and the
    streams of its variants."""
    streams = STREAM_BYTES["cuda"]
    whole = plan.weight_bytes * plan.parent_cost.parameters + streams
    return whole if whole <= usable(device) else plan.layers_bytes + streams


def usable(device: Device) -> int:
    """What a run may take of a card."""
    return int(device.memory_bytes * SPARE)


def refusal(plan: Plan, stages: Sequence[Stage], device: Device, gpus: int) -> str:
    """Why the run does not fit on these cards, and what would; empty where it does."""
    worst = max(needs(plan, stages, device, gpus), key=lambda need: need.gpu_bytes)
    if worst.gpu_bytes <= usable(device):
        return ""
    said = (f"{worst.name} needs about {human_bytes(worst.gpu_bytes)} on each of {gpus} {device.label}, "
            f"which has {human_bytes(usable(device))} to use ({1 - SPARE:.0%} kept free): it does not fit by "
            f"{human_bytes(worst.gpu_bytes - usable(device))}")
    for words, other, number in _remedies(plan, gpus):
        if max(need.gpu_bytes for need in needs(other, stages, device, number)) <= usable(device):
            return f"{said}; it fits with {words}"
    return f"{said}; no number of them is enough: choose a larger card, or a shorter distillation.sequence_length"


def _remedies(plan: Plan, gpus: int) -> Iterator[tuple[str, Plan, int]]:
    """(in words, the plan with it, GPUs), first what costs least. Fewer sequences in a pass and a smaller
    chunk of the loss are not among them: a run takes those by itself."""
    settings: dict[str, Any] = {}
    d = plan.recipe.distillation
    for key, value, here in (("activation_checkpointing", True, d.activation_checkpointing is False),
                             ("optimizer", "adamw8bit", d.optimizer == "adamw")):
        if here and d.tokens:
            settings[f"distillation.{key}"] = value
            other = replace(plan, recipe=plan.recipe.with_overrides(settings=settings))
            words = " ".join(f"{k}={str(v).lower()}" for k, v in settings.items())
            yield words, other, gpus
    more = [n for n in (2**i for i in range(13)) if gpus < n <= MOST_GPUS]
    for n in more:
        yield f"--gpus {n}", plan, n
    for n in more if settings else ():
        yield f"{words} --gpus {n}", other, n


def remedy_here(plan: Plan) -> str:
    """The first setting with which the training fits on the plan's own device; empty if none does."""
    return next((words for words, other, number in _remedies(plan, 0) if number == 0
                 and other.student_stage_bytes + other.on_host * other.reference_bytes <= other.usable_bytes), "")


def lines(found: list[Need], device: Device, gpus: int, how: TrainSettings | None) -> list[str]:
    """The tables for people. `how`: of the training, if there is one."""
    rows = [f"{'stage':<12}{'time':>10}  {'each GPU':>10}  {'each host':>10}  {'disk':>10}"]
    for n in found:
        rows.append(f"{n.name:<12}{_time(n.seconds):>10}  {human_bytes(n.gpu_bytes):>10}  "
                    f"{human_bytes(n.host_bytes):>10}  {human_bytes(n.disk_bytes):>10}")
        rows += [f"  phase {i}{'':<3}{_time(p['seconds']):>10}  {human_count(p['tokens'])} tokens of "
                 f"{human_length(p['sequence_length'])}" for i, p in enumerate(n.phases, 1)]
    total = sum(need.seconds for need in found)
    rows += [f"{'together':<12}{_time(total):>10}  on {gpus} x {device.label} "
             f"({EFFICIENCY:.0%} of its bf16 peak; a forecast, not run on a GPU)"]
    return rows if how is None else rows + memory_lines(
        next(n.memory for n in found if n.memory), how, device.memory_bytes, usable(device))


def memory_lines(memory: Mapping[str, int], how: TrainSettings, have: int, usable: int) -> list[str]:
    """What a process holds at the peak of a step, by what it is, and whether that fits."""
    left = usable - sum(memory.values())
    decided = ["blocks computed again" if how.activation_checkpointing else "blocks kept"]
    decided += [f"{human_length(how.pass_tokens)} tokens in a pass"] if how.pass_tokens else []
    decided += [f"{how.loss_tokens:,} tokens in a chunk of the loss"] if how.loss_tokens else []
    decided += ["gradients added up once a step"] if how.sync_last else []
    return ["memory of a training step, each process:",
            *(f"  {name:<12}{human_bytes(size):>12}" for name, size in memory.items() if size),
            f"  {'margin':<12}{human_bytes(have - usable):>12}  of {human_bytes(have)}",
            f"  {'fits,' if left >= 0 else 'does not fit by'} {human_bytes(abs(left))}{' left' if left >= 0 else ''}; "
            + ", ".join(decided)]


def _time(seconds: float) -> str:
    """90000 -> '1.0 days'."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
