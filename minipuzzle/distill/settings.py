"""What a run of training is: its budget, its losses, its schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

CHANGES_NOTHING = ("activation_checkpointing", "sync_last", "shards")


@dataclass(frozen=True)
class TrainSettings:
    """`tokens` is the whole budget and the length of the cosine; `batch_tokens` are the tokens of a
    step. What changes no number: `activation_checkpointing` (None: where it is needed); `sync_last`:
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
    sync_last: bool = False
    shards: int | None = None
    warmup: float = 0.05
    final_rate: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def batch(self, sequence_length: int) -> int:
        return max(1, self.batch_tokens // sequence_length)

    def steps(self, sequence_length: int, tokens: int | None = None) -> int:
        """Steps that `tokens` (or the whole budget) make, rounded up."""
        return math.ceil((self.tokens if tokens is None else tokens) / (self.batch(sequence_length) * sequence_length))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at a step: linear warm-up, then a cosine to `final_rate` of the peak."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        along = (step - warm) / max(1, steps - warm)
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * along)))

    def resumable(self) -> dict[str, Any]:
        """What must be the same when a run goes on: all that changes its numbers."""
        plain = {"optimizer": "adamw", "compile": False}  # states of earlier versions do not say
        return {k: v for k, v in asdict(self).items() if k not in CHANGES_NOTHING and plain.get(k) != v}
