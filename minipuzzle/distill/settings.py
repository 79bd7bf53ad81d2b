"""What a run of training is: its budget, its losses, its schedule."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

CHANGES_NOTHING = ("activation_checkpointing", "pass_tokens", "loss_tokens", "sync_last", "shards")


@dataclass(frozen=True)
class Phase:
    """A part of a training. `batch_tokens`: of a step; `learning_rate`: the peak."""

    tokens: int
    sequence_length: int
    batch_tokens: int
    learning_rate: float

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return max(1, self.batch_tokens // self.sequence_length)

    @property
    def step_tokens(self) -> int:
        return self.batch * self.sequence_length

    def steps(self, tokens: int | None = None) -> int:
        """Steps that `tokens` (or all of the phase's) make, rounded up."""
        return math.ceil((self.tokens if tokens is None else tokens) / self.step_tokens)


@dataclass(frozen=True)
class TrainSettings:
    """`tokens` is the whole budget; `batch_tokens` are the tokens of a step. `phases`: parts of the
    training one after the other; none: one of `tokens`, `batch_tokens` and `learning_rate`, at the
    length of the blocks. What changes no number, but for the order of sums:
    `activation_checkpointing` (None: where it is needed); `pass_tokens` of a forward and backward pass and
    `loss_tokens` of a chunk of logits (None: what is fastest on the device); `sync_last`:
    gradients are added up over processes in the last pass of a step alone, each holding a whole one
    until then; `shards`: processes that hold the weights between them, all if None."""

    tokens: int
    batch_tokens: int
    learning_rate: float
    temperature: float = 1.0
    kl_weight: float = 1.0
    lm_loss_weight: float = 0.0
    hidden_loss_weight: float = 0.0
    top_k: int = 0
    precision: str = "fp32"
    activation_checkpointing: bool | None = False
    optimizer: str = "adamw"
    compile: bool = False
    pass_tokens: int | None = None
    loss_tokens: int | None = None
    sync_last: bool = False
    shards: int | None = None
    warmup: float = 0.05
    final_rate: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    phases: tuple[Phase, ...] = ()

    def schedule(self, sequence_length: int) -> Schedule:
        """The steps of the training. `sequence_length`: of the blocks, where there are no phases."""
        one = Phase(self.tokens, sequence_length, self.batch_tokens, self.learning_rate)
        return Schedule(self, self.phases or (one,))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at a step: linear warm-up, then a cosine to `final_rate` of the peak."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        along = (step - warm) / max(1, steps - warm)
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * along)))

    def resumable(self) -> dict[str, Any]:
        """What must be the same when a run goes on: all that changes its numbers."""
        plain = {"optimizer": "adamw", "compile": False, "phases": []}  # states of earlier versions do not say
        values = asdict(self) | {"phases": [asdict(phase) for phase in self.phases]}
        return {k: v for k, v in values.items() if k not in CHANGES_NOTHING and plain.get(k) != v}


@dataclass(frozen=True)
class Schedule:
    """A training step by step. Consecutive phases with the same peak share one warm-up and cosine; a
    phase with another peak begins its own."""

    settings: TrainSettings
    phases: tuple[Phase, ...]

    @cached_property
    def starts(self) -> list[int]:
        """The first step of each phase."""
        return [0, *accumulate(phase.steps() for phase in self.phases[:-1])]

    @property
    def steps(self) -> int:
        return self.starts[-1] + self.phases[-1].steps()

    def phase(self, step: int) -> int:
        """The place of the phase that a step belongs to, from 0 on."""
        return bisect_right(self.starts, step) - 1

    def tokens(self, steps: int) -> int:
        """Of so many steps."""
        last = self.phase(max(0, steps - 1))
        done = sum(phase.steps() * phase.step_tokens for phase in self.phases[:last])
        return done + (steps - self.starts[last]) * self.phases[last].step_tokens

    def steps_of(self, tokens: int | None) -> int:
        """Steps that so many tokens of the budget make, rounded up; None: all."""
        if tokens is None:
            return self.steps
        last = 0
        while last + 1 < len(self.phases) and tokens > self.tokens(self.starts[last + 1]):
            last += 1
        tokens -= self.tokens(self.starts[last])
        return self.starts[last] + self.phases[last].steps(tokens)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        first = last = self.phase(step)
        peak = self.phases[first].learning_rate
        while first > 0 and self.phases[first - 1].learning_rate == peak:
            first -= 1
        while last + 1 < len(self.phases) and self.phases[last + 1].learning_rate == peak:
            last += 1
        end = self.starts[last] + self.phases[last].steps()
        return replace(self.settings, learning_rate=peak).rate(step - self.starts[first], end - self.starts[first])
