"""Distillation: students learn their parent's logits.

    loss = KL(teacher || student), summed over the vocabulary, mean over tokens, nats; other terms
    only if asked for

(Nemotron-H arXiv:2504.03624, section 3; Minitron arXiv:2407.14679, table 8: KL alone is best.)
AdamW, linear warm-up, cosine. The data of a step is a function of (seed, step), the state is
written whole or not at all, while training goes on: stopping and resuming changes nothing, and may
change the number of processes. A run may pause at a token count and go
on from its own state: the tournament and the long run of its winner are one cosine. Several
students can be trained in lock-step: the teacher reads each batch once for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from minipuzzle.core.errors import InputError
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.data.blocks import Blocks
from minipuzzle.distill.loss import Target
from minipuzzle.distill.precision import check_training
from minipuzzle.distill.settings import Schedule, TrainSettings
from minipuzzle.distill.sharding import shard
from minipuzzle.distill.teacher import CachedTeacher, LiveTeacher, Teacher
from minipuzzle.distill.trainer import Batch, Diverged, Pupil, Row, Trainer
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Model

SAVE_EVERY_S, SAVE_SHARE = 120.0, 20  # seconds from a state to the next; at least so many times what it took
# Tokens of one forward and backward pass: a step adds up the gradients of as many as its batch
# needs.
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}


def pass_tokens(device: torch.device) -> int:
    """Tokens of one forward and backward pass; a sequence longer than that is one."""
    return PASS_TOKENS.get(device.type, PASS_TOKENS["cpu"])


@dataclass(frozen=True)
class Trained:
    """What a run did: tokens seen in all, seconds of this call, steps skipped, the step of the best
    evaluation."""

    tokens: int
    seconds: float
    skipped: int
    best_step: int | None = None


def distill_model(student: HybridLM, teacher: Model | Teacher | None, blocks: Blocks | Sequence[Blocks],
                  settings: TrainSettings, folder: Path, stop_at_tokens: int | None = None,
                  evaluate: Callable[[HybridLM], dict[str, float]] | None = None, evaluate_every: int = 0,
                  progress: Callable[[int, Row], None] = lambda tokens, row: None, layers: Sequence[int] = (),
                  ranks: Ranks | None = None, track: Callable[[Row], None] = lambda row: None) -> Trained:
    """Train `student` in place up to `stop_at_tokens` of the budget; continue from `folder` if it
    holds a state.

    `folder` gets the state, the best weights, and metrics.jsonl. `evaluate(student)` looks before
    the first step, every `evaluate_every` steps and at the end, and adds `eval_*` fields to the
    metrics of those steps; the weights with the least `kl` (or `loss`) of them are kept as `best`.
    `blocks`: of each phase of the settings, in their order; one where they name no phases.
    `progress` hears (tokens done, the metrics of the step), `track` the metrics. Under several
    `ranks` each takes its part of every batch, and student and teacher are sharded.

    Raises:
        InputError: settings that do not go together. Diverged: too many steps with a non-finite
        loss.
        CorruptArtifact: the state in `folder` cannot be read.
        Interrupted: raised by `progress`; the state has been saved.
    """
    return distill_together([Pupil(student, folder, layers, evaluate)], teacher, blocks, settings, stop_at_tokens,
                            evaluate_every, progress, ranks, track)[0]


def distill_together(pupils: Sequence[Pupil], teacher: Model | Teacher | None,
                     blocks: Blocks | Sequence[Blocks], settings: TrainSettings,
                     stop_at_tokens: int | None = None, evaluate_every: int = 0,
                     progress: Callable[[int, Row], None] = lambda tokens, row: None,
                     ranks: Ranks | None = None, track: Callable[[Row], None] = lambda row: None) -> list[Trained]:
    """`distill_model` for several students on the same batches: each learns what it would learn
    alone. `progress` hears the metrics of the one with the least training loss.

    One that diverges is left where it is, and says so (`Pupil.diverged`); the others go on.

    Raises:
        Diverged: all of them did. The rest as `distill_model`.
    """
    ranks = ranks or Ranks(pupils[0].student.head.device)
    check_training(settings.precision, settings.optimizer, settings.compile, ranks.device)
    data = [blocks] if isinstance(blocks, Blocks) else list(blocks)
    schedule = settings.schedule(data[0].sequence_length)
    assert [b.sequence_length for b in data] == [p.sequence_length for p in schedule.phases]
    for number, phase in enumerate(schedule.phases, 1):
        if phase.batch % ranks.size:
            which = f" of phase {number}" if settings.phases else ""
            raise InputError(f"a step{which} has {phase.batch} sequences (distillation.batch_tokens / "
                             f"sequence_length), which {ranks.size} processes cannot share evenly; change one of them")
    source = _teacher(teacher, settings, ranks)
    trainers = [Trainer(pupil, schedule, ranks) for pupil in pupils]
    try:
        return _train(trainers, source, data, stop_at_tokens, evaluate_every, progress, ranks, track)
    finally:
        for trainer in trainers:
            trainer.writer.close()


def _train(trainers: list[Trainer], source: Teacher | None, data: Sequence[Blocks],
           stop_at_tokens: int | None, evaluate_every: int, progress: Callable[[int, Row], None], ranks: Ranks,
           track: Callable[[Row], None]) -> list[Trained]:
    pupils, schedule, settings = [t.pupil for t in trainers], trainers[0].schedule, trainers[0].settings
    last, most = schedule.steps_of(stop_at_tokens), settings.pass_tokens or pass_tokens(ranks.device)
    begins = first_places(schedule, data)
    first = min(pupil.step for pupil in pupils)
    begin = time.perf_counter()
    for trainer in trainers:
        if trainer.pupil.step == 0:
            trainer.evaluate({})
    for step in range(first, last):
        active = [t for t in trainers if t.pupil.step == step]
        if not active:
            continue
        at = schedule.phase(step)
        phase, own = schedule.phases[at], data[at]
        place = begins[at] + (step - schedule.starts[at]) * phase.batch
        batch = Batch.make(own, own.numbers(settings.seed, place, phase.batch), ranks)
        for trainer in active:
            trainer.begin()
        layers = sorted({layer for t in active for layer in t.layers})
        parts = batch.split(max(1, most // phase.sequence_length))
        for part in parts:
            target: Target | None = None
            streams: dict[int, torch.Tensor] = {}
            if source is not None:
                target, streams = source.look(part.ids_BT, part.numbers, layers)
            for trainer in active:
                trainer.backward(part, target, streams, part is parts[-1])
            if isinstance(source, LiveTeacher):
                source.release()
        tokens = schedule.tokens(step + 1)
        speed = (tokens - schedule.tokens(first)) / (time.perf_counter() - begin)
        rows: list[Row] = []
        for trainer in list(active):
            try:
                row = trainer.end() | {"tokens_per_second": speed}
            except Diverged:
                if all(pupil.diverged for pupil in pupils):
                    raise
                active.remove(trainer)
                continue
            if step + 1 == last or (evaluate_every and (step + 1) % evaluate_every == 0):
                trainer.evaluate(row)
            trainer.write(row)
            track(row)
            rows.append(row)
        stop: Interrupted | None = None
        try:
            progress(tokens, min(rows, key=training_loss, default={}))
        except Interrupted as error:
            stop = error
        pending = any(t.writer.pending for t in trainers)
        due = not pending and any(t.writer.due(SAVE_EVERY_S, SAVE_SHARE) for t in active)
        signum, save, busy = _agree(ranks, stop.exit_code - 128 if stop else 0, step + 1 == last or due,
                                    any(t.writer.busy for t in trainers))
        if pending and not busy:
            for trainer in trainers:
                trainer.writer.commit()
        if save or signum:
            for trainer in active:
                trainer.save()
        if signum or step + 1 == last:
            for trainer in trainers:
                trainer.writer.commit()
        if signum:
            raise stop or Interrupted(signum)
    seconds = time.perf_counter() - begin
    return [Trained(schedule.tokens(max(last, p.step)), seconds, p.skipped, p.best.get("step")) for p in pupils]


def first_places(schedule: Schedule, data: Sequence[Blocks]) -> list[int]:
    """Where each phase begins in the training order of its blocks: one that reads the same blocks as
    an earlier phase goes on where that ended."""
    read: dict[tuple[str, int], int] = {}
    out = []
    for phase, blocks in zip(schedule.phases, data, strict=True):
        which = blocks.corpus_hash, blocks.sequence_length
        out.append(read.get(which, 0))
        read[which] = out[-1] + phase.steps() * phase.batch
    return out


def _agree(ranks: Ranks, signum: int, save: bool, busy: bool) -> tuple[int, bool, bool]:
    """What all processes do now: stop if one was told to, save when the main one's clock says so;
    and whether one is still writing."""
    if ranks.size == 1:
        return signum, save, busy
    votes = torch.tensor([signum, int(save and ranks.main), int(busy)], device=ranks.device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return int(votes[0]), bool(votes[1]), bool(votes[2])


def _teacher(teacher: Model | Teacher | None, settings: TrainSettings, ranks: Ranks) -> Teacher | None:
    if isinstance(teacher, Model):
        model: Model | HybridLM = teacher
        if ranks.size > 1:
            model = HybridLM(teacher.family, teacher.arch, teacher.by_name()).requires_grad_(False)
            shard(model, ranks)
        teacher = LiveTeacher(model, settings.top_k)
    if teacher is None and settings.kl_weight:
        raise InputError("without a teacher there is no KL: the LM loss alone is left")
    if settings.hidden_loss_weight and (teacher is None or isinstance(teacher, CachedTeacher)):
        raise InputError("distillation.hidden_loss_weight needs the teacher in memory; a cache holds its logits only")
    return teacher


def training_loss(row: Row) -> float:
    """What the step minimised, from its metrics: the KL, or the next-token loss where there is no
    teacher; infinite where it was not finite."""
    value = row["kl"] if "kl" in row else row["loss"]
    return math.inf if value is None else float(value)
