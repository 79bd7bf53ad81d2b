"""What a run takes on GPUs that are not here: time, memory and disk for each stage, by formula.

Memory of training on N processes, P parent and S student parameters, sequences of T tokens
(docs/distillation.md; within 10 % of what torch's memory tracker finds on fake tensors for the
published pairs, tests/test_cluster.py; not compared with a GPU):

    2P/N  teacher, bf16         4S/N + 4S/N + 8S/N  weights, gradient and moments, float32
    + 2 bytes x (embeddings and heads of both, and the largest block of both): gathered whole
    + 2 bytes x T x hidden x layers of the student: its stream, with activation checkpointing
    + 5 logit chunks of 1 GiB, and 5 bytes for each element of the student's head: the loss

Time: FLOPs over those of the cards at EFFICIENCY of their dense bf16 peak. A roofline of each
operation gives 0.3 (8B -> 4B) to 0.45 (56B -> 47B) without any communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minipuzzle.core.budget import human_bytes
from minipuzzle.core.devices import Device
from minipuzzle.families.cost import layer_parameters
from minipuzzle.models.passes import STREAM_BYTES
from minipuzzle.pipeline.plan import Plan
from minipuzzle.pipeline.stage import Stage

EFFICIENCY = 0.3
MARGIN = 0.1  # of a card, for the context, collectives and fragmentation: an assumption
PER_HOST = 8  # GPUs of a machine
LOSS_BYTES = 5 * 2**30
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
            gpu, host = training_bytes(plan, gpus), _host_bytes(plan, gpus)
        else:
            gpu, host = (_pass_bytes(plan, device) if own.flops else 0), plan.layers_bytes
        out.append(Need(stage.name, own.flops / speed + own.seconds, gpu, host, own.disk_bytes))
    return out


def training_bytes(plan: Plan, gpus: int) -> int:
    """At the peak of a training step, on each GPU, one sequence at a time."""
    parent, student = plan.parent_cost.parameters, plan.largest.parameters
    arch, hidden = plan.parent, plan.largest_arch.hidden_size
    tables = 2 * arch.vocab_size * (arch.hidden_size + hidden)
    block = 2 * max(layer_parameters(arch, i) for i in range(arch.num_layers))
    streams = plan.recipe.distillation.sequence_length * hidden * plan.largest_arch.num_layers
    sharded = 2 * parent + 16 * student
    return (sharded // gpus + 2 * (tables + block + streams)
            + LOSS_BYTES + 5 * arch.vocab_size * hidden)


def _host_bytes(plan: Plan, gpus: int) -> int:
    """A copy of the state that is being written, of the processes of a machine."""
    return 12 * plan.largest.parameters * min(gpus, PER_HOST) // gpus


def _pass_bytes(plan: Plan, device: Device) -> int:
    """Of a pass that scores or measures: the parent, or the layers that are read of it, and the
    streams of its variants."""
    streams = STREAM_BYTES["cuda"]
    whole = plan.weight_bytes * plan.parent_cost.parameters + streams
    return whole if whole <= usable(device) else plan.layers_bytes + streams


def usable(device: Device) -> int:
    """What a run may take of a card."""
    return int(device.memory_bytes * (1 - MARGIN))


def refusal(plan: Plan, stages: Sequence[Stage], device: Device, gpus: int) -> str:
    """Why the run does not fit on these cards, and what would; empty where it does."""
    worst = max(needs(plan, stages, device, gpus), key=lambda need: need.gpu_bytes)
    if worst.gpu_bytes <= usable(device):
        return ""
    said = (f"{worst.name} needs about {human_bytes(worst.gpu_bytes)} on each of {gpus} {device.label}, "
            f"which has {human_bytes(usable(device))} to use ({MARGIN:.0%} kept free)")
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
