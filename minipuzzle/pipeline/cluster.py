"""What a run takes on GPUs that are not here: time, memory and disk for each stage.

Memory of training is distill/memory.py's forecast, with what would be decided there (activation
checkpointing, shards). Time: FLOPs over those of the cards at EFFICIENCY of their dense bf16 peak; a
roofline of each operation gives 0.3 (8B -> 4B) to 0.45 (56B -> 47B) without any communication.
Nothing of this was compared with a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minipuzzle.core.budget import human_bytes
from minipuzzle.core.devices import Device
from minipuzzle.distill.loop import pass_tokens
from minipuzzle.distill.memory import SPARE, fitted, forecast
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
    """Of a stage: bytes of each GPU, of each host, and of the disk that it leaves."""

    name: str
    seconds: float
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def needs(plan: Plan, stages: Iterable[Stage], device: Device, gpus: int) -> list[Need]:
    """What each stage takes on so many of these cards, PER_HOST in a machine."""
    speed = gpus * device.flops["bf16"] * EFFICIENCY
    out = []
    for stage in stages:
        own = stage.estimate(plan)
        if own.trains:
            gpu, host = training_bytes(plan, device, gpus), plan.copy_bytes * min(gpus, PER_HOST) // gpus
        else:
            gpu, host = (_pass_bytes(plan, device) if own.flops else 0), plan.layers_bytes
        out.append(Need(stage.name, own.flops / speed + own.seconds, gpu, host, own.disk_bytes))
    return out


def training_bytes(plan: Plan, device: Device, gpus: int, optimizer: str = "") -> int:
    """At the peak of a training step, on each GPU."""
    d = plan.recipe.distillation
    ranks = Ranks(torch.device("cuda"), 0, gpus, min(gpus, PER_HOST))
    again = None if d.activation_checkpointing == "auto" else d.activation_checkpointing
    settings = TrainSettings(d.tokens, d.batch_tokens, d.learning_rate, optimizer=optimizer or d.optimizer,
                             precision="bf16" if d.precision == "auto" else d.precision,
                             activation_checkpointing=again)
    tokens = max(pass_tokens(ranks.device), d.sequence_length)
    made = fitted(settings, plan.parent, [plan.largest_arch], ranks, tokens, device.memory_bytes)
    return forecast(plan.parent, plan.largest_arch, made, ranks, tokens)


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
            f"which has {human_bytes(usable(device))} to use ({1 - SPARE:.0%} kept free)")
    if 0 < training_bytes(plan, device, gpus, "adamw8bit") <= usable(device) < worst.gpu_bytes and (
            plan.recipe.distillation.tokens and _pass_bytes(plan, device) <= usable(device)):
        return f"{said}; it fits with distillation.optimizer=adamw8bit"
    more = next((n for n in (2**i for i in range(13)) if gpus < n <= MOST_GPUS
                 and max(need.gpu_bytes for need in needs(plan, stages, device, n)) <= usable(device)),
                None)
    if more:
        return f"{said}; it fits on --gpus {more}"
    return f"{said}; no number of them is enough: choose a larger card, or a shorter distillation.sequence_length"


def lines(found: list[Need], device: Device, gpus: int) -> list[str]:
    """The table for people."""
    rows = [f"{'stage':<12}{'time':>10}  {'each GPU':>10}  {'each host':>10}  {'disk':>10}"]
    rows += [f"{n.name:<12}{_time(n.seconds):>10}  {human_bytes(n.gpu_bytes):>10}  "
             f"{human_bytes(n.host_bytes):>10}  {human_bytes(n.disk_bytes):>10}" for n in found]
    total = sum(need.seconds for need in found)
    return [*rows, f"{'together':<12}{_time(total):>10}  on {gpus} x {device.label} "
            f"({EFFICIENCY:.0%} of its bf16 peak; a forecast, not run on a GPU)"]


def _time(seconds: float) -> str:
    """90000 -> '1.0 days'."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
