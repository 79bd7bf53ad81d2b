"""What a process that trains holds, foretold: it decides what of a step is kept and what is made again.

    held         (w P + (4 + 4 + m) S) / N      teacher in its dtype, float32 master and gradient, moments
    streams      c T L D                        T tokens of a pass
    inside       T x what blocks keep           of all blocks; of one, in the backward pass, where each is computed
                                                again (activation checkpointing): then not while there is a loss
    loss         chunks of logits and the head's gradient, in float32

P, S parameters of teacher and student, N processes in shards, L layers, D hidden, c bytes of the
stream. The numbers of `inside` were read off benchmarks/simulate_memory.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from minipuzzle.distill.loss import chunk_tokens
from minipuzzle.distill.precision import compute_dtype
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.families import kernels
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.ranks import Ranks

# bytes that a block keeps for each input of its writers and token, in bf16
_FUSED_SCAN, _PLAIN_SCAN, _OTHER = 40, 80, 12
SPARE = 0.9  # of the memory: the rest is for the context, collectives and fragmentation


def forecast(teacher: Architecture, student: Architecture, settings: TrainSettings, ranks: Ranks,
             pass_tokens: int) -> int:
    """Bytes of one process at the peak of a step."""
    width = compute_dtype(settings.precision, ranks.device).itemsize
    shards = settings.shards or ranks.size
    sizes = _parameters(student)
    moments = 2.1 if settings.optimizer == "adamw8bit" else 8
    held = (width * _parameters(teacher) + (8 + moments) * sizes) / shards
    if settings.precision == "fp8" and ranks.size == 1:  # weights in FP8, and with their sides exchanged
        held += 2 * sizes
    if settings.sync_last and ranks.size > 1:
        held += 4 * sizes
    if ranks.size > 1:  # both heads, in the dtype of the products
        held += width * (teacher.hidden_size + student.hidden_size) * student.vocab_size
    scan = _FUSED_SCAN if kernels.usable("scan", ranks.device) else _PLAIN_SCAN
    kinds = student.family.kinds
    inside = [kinds[k].writer_inputs(student.sizes(i)) * (scan if kinds[k].has_state else _OTHER) * width // 2
              for i, k in enumerate(student.pattern)]
    chunk = 4 * student.vocab_size * min(pass_tokens, chunk_tokens(student.vocab_size, ranks.device))
    loss = 6 * chunk + 8 * student.vocab_size * student.hidden_size
    again = settings.activation_checkpointing
    last = max(pass_tokens * max(inside), loss) if again else pass_tokens * sum(inside) + loss
    return int(held) + pass_tokens * width * student.num_layers * student.hidden_size + last


def _parameters(arch: Architecture) -> int:
    return sum(math.prod(shape) for shape in arch.shapes().values())


def fitted(settings: TrainSettings, teacher: Architecture, students: Sequence[Architecture], ranks: Ranks,
           pass_tokens: int, memory_bytes: int) -> TrainSettings:
    """The settings with what is left open decided: the fewest processes of whole machines that hold the weights
    between them, blocks computed again where their insides do not fit, gradients added up over processes once a
    step where a whole one fits."""
    def fits(asked: TrainSettings) -> bool:
        return all(forecast(teacher, s, asked, ranks, pass_tokens) <= SPARE * memory_bytes for s in students)

    open_choice = settings.activation_checkpointing is None
    local = ranks.local_size
    groups = [local * k for k in range(1, ranks.size // local + 1) if ranks.size % (local * k) == 0]
    made = replace(settings, activation_checkpointing=bool(settings.activation_checkpointing))
    for shards in groups or [ranks.size]:
        for again in (False, True) if open_choice else (made.activation_checkpointing,):
            made = replace(made, activation_checkpointing=again, shards=shards)
            if fits(made):
                sync = replace(made, sync_last=True)
                return sync if ranks.size > 1 and fits(sync) else made
    return made
