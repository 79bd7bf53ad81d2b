"""What a process that trains holds, foretold: it decides what of a step is kept and what is made again.

    teacher      w P / N                        in its dtype
    weights, gradients, moments   (4 + 4 + m) S / N      float32 master and gradient; moments 8, or 2.1 at 8 bit
    written      12 S / N                       on a CPU: the copy of weights and moments that is being written
    copies       w V (D_P + D_S)                both heads, gathered from several processes; in one, weights in FP8
    activations  c T L D + T x what blocks keep          T tokens of a pass: the streams, and the insides of all
                                                blocks where they are not computed again
    loss         chunks of logits and the head's gradient, in float32
    workspace    T x what one block keeps       where blocks are computed again, then not while there is a loss:
                                                the larger of the two

P, S parameters of teacher and student, N processes in shards, L layers, D hidden, c bytes of the
stream. What blocks keep was read off benchmarks/simulate_memory.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from minipuzzle.distill.loop import pass_tokens
from minipuzzle.distill.loss import chunk_tokens
from minipuzzle.distill.precision import compute_dtype
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.families import kernels
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.ranks import Ranks

# bytes that a block keeps for each input of its writers and token, in bf16
_FUSED_SCAN, _PLAIN_SCAN, _OTHER = 40, 80, 12
SPARE = 0.9  # of the memory: the rest is for the context, collectives and fragmentation
SMALLER = (4, 16)  # parts of the usual chunk of the loss that are tried where it does not fit


def table(teacher: Architecture, student: Architecture, settings: TrainSettings, ranks: Ranks,
          tokens: int) -> dict[str, int]:
    """Bytes of one process at the peak of a step, by what they hold. `tokens`: of a pass, where the settings
    do not say."""
    width = compute_dtype(settings.precision, ranks.device).itemsize
    shards, tokens = settings.shards or ranks.size, settings.pass_tokens or tokens
    weights = 4 * _parameters(student)
    moments = 2.1 / 4 if settings.optimizer == "adamw8bit" else 2
    scan = _FUSED_SCAN if kernels.usable("scan", ranks.device) else _PLAIN_SCAN
    kinds = student.family.kinds
    inside = [kinds[k].writer_inputs(student.sizes(i)) * (scan if kinds[k].has_state else _OTHER) * width // 2
              for i, k in enumerate(student.pattern)]
    chunk = min(tokens, settings.loss_tokens or chunk_tokens(student.vocab_size, ranks.device))
    loss = 4 * student.vocab_size * (6 * chunk + 2 * student.hidden_size)
    streams, block = tokens * width * student.num_layers * student.hidden_size, tokens * max(inside)
    copies = width * (teacher.hidden_size + student.hidden_size) * student.vocab_size
    if ranks.size == 1:  # weights in FP8, and with their sides exchanged
        copies = weights // 2 if settings.precision == "fp8" else 0
    again = settings.activation_checkpointing
    if again:
        loss, block = (loss, 0) if loss >= block else (0, block)
    return {"teacher": width * _parameters(teacher) // shards,
            "weights": weights // shards,
            "gradients": weights // shards + (weights if settings.sync_last and ranks.size > 1 else 0),
            "moments": int(moments * weights / shards),
            "written": 3 * weights // shards * (ranks.device.type == "cpu"),
            "copies": copies,
            "activations": streams + (0 if again else tokens * sum(inside)),
            "loss": loss,
            "workspace": block if again else 0}


def forecast(teacher: Architecture, student: Architecture, settings: TrainSettings, ranks: Ranks, tokens: int) -> int:
    """Bytes of one process at the peak of a step: the sum of `table`."""
    return sum(table(teacher, student, settings, ranks, tokens).values())


@lru_cache(maxsize=64)
def _parameters(arch: Architecture) -> int:
    return sum(math.prod(shape) for shape in arch.shapes().values())


def fitted(settings: TrainSettings, teacher: Architecture, students: Sequence[Architecture], ranks: Ranks,
           memory_bytes: int, sequence_length: int) -> TrainSettings:
    """The settings with what is left open decided: the fewest processes of whole machines that hold the weights
    between them; blocks computed again, fewer sequences in a pass, and a smaller chunk of the loss, in this
    order, where it does not fit; gradients added up over processes once a step where a whole one fits.
    `sequence_length`: of the longest sequence."""
    tokens = max(pass_tokens(ranks.device), sequence_length)

    def fits(asked: TrainSettings) -> bool:
        return all(forecast(teacher, s, asked, ranks, tokens) <= SPARE * memory_bytes for s in students)

    local, made = ranks.local_size, settings
    groups = [local * k for k in range(1, ranks.size // local + 1) if ranks.size % (local * k) == 0]
    for shards in groups or [ranks.size]:
        shared = replace(settings, shards=shards)
        for made in _choices(shared, teacher.vocab_size, ranks.device, tokens, sequence_length):
            if fits(made):
                sync = replace(made, sync_last=True)
                return sync if ranks.size > 1 and fits(sync) else made
    return made


def _choices(settings: TrainSettings, vocab_size: int, device: torch.device, tokens: int,
             sequence_length: int) -> Iterator[TrainSettings]:
    """From the fastest to what takes the least memory."""
    asked = settings.activation_checkpointing
    made = replace(settings, activation_checkpointing=bool(asked))
    yield made
    if asked is None:
        made = replace(made, activation_checkpointing=True)
        yield made
    while tokens >= 2 * sequence_length:
        tokens //= 2
        made = replace(made, pass_tokens=tokens)
        yield made
    for part in SMALLER:
        made = replace(made, loss_tokens=max(64, chunk_tokens(vocab_size, device) // part))
        yield made
