"""One student in training: its optimizer, its part of each step, its state and its metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from minipuzzle.core.errors import InputError
from minipuzzle.core.files import write_atomic
from minipuzzle.core.rundir import changes
from minipuzzle.data.blocks import Blocks
from minipuzzle.distill import state
from minipuzzle.distill.loss import NO_LABEL, Target, cosine_loss, distillation_loss, next_tokens
from minipuzzle.distill.optimizer import make_optimizer, moments, set_rate
from minipuzzle.distill.precision import compute_dtype, use_fp8
from minipuzzle.distill.settings import Schedule
from minipuzzle.distill.sharding import shard, whole
from minipuzzle.families.kernels import usable
from minipuzzle.models.module import Block, HybridLM
from minipuzzle.models.ranks import Ranks

MAX_SKIPPED = 10  # steps with a non-finite loss or gradient before the run is given up
Row = dict[str, Any]


class Diverged(InputError):
    """A training whose loss is no longer a finite number."""


@dataclass
class Pupil:
    """A student with its folder. `layers`: the teacher's layer of each of its own, for the cosine
    on streams.
    `evaluate`: a look at held-out blocks, with `kl` or `loss`, and lists that the metrics leave
    out. `looks`: what each found, by its step; the state keeps them under its hash. `diverged`:
    why its training was given up."""

    student: HybridLM
    folder: Path
    layers: Sequence[int] = ()
    evaluate: Callable[[HybridLM], dict[str, Any]] | None = None
    skipped: int = 0
    step: int = 0
    best: Row = field(default_factory=dict)
    looks: dict[str, Row] = field(default_factory=dict)
    diverged: Diverged | None = None


@dataclass(frozen=True)
class Batch:
    """A process's part of a step, and the places of the whole step: with a KL, with a next
    token."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    labels_BT: torch.Tensor
    numbers: list[int]
    kl_count: int
    lm_count: int

    @classmethod
    def make(cls, blocks: Blocks, numbers: list[int], ranks: Ranks) -> Batch:
        """Each process reads its own blocks; the places are counted together."""
        own = ranks.share(numbers)
        read = [blocks.block(n) for n in own]
        ids = torch.from_numpy(np.stack(read))
        mask = torch.from_numpy(np.stack([blocks.mask(n, block) for n, block in zip(own, read, strict=True)]))
        labels = next_tokens(ids)
        counts = ranks.add(torch.stack([mask.sum(), (mask & (labels != NO_LABEL)).sum()])).clamp(min=1).tolist()
        return cls(ids.to(ranks.device), mask.to(ranks.device), labels.to(ranks.device), own, *counts)

    def split(self, count: int) -> list[Batch]:
        """Parts of `count` sequences."""
        return [Batch(self.ids_BT[i : i + count], self.mask_BT[i : i + count], self.labels_BT[i : i + count],
                      self.numbers[i : i + count], self.kl_count, self.lm_count)
                for i in range(0, len(self.ids_BT), count)]


class Trainer:
    """A pupil with its optimizer, from the state in its folder on."""

    def __init__(self, pupil: Pupil, schedule: Schedule, ranks: Ranks) -> None:
        settings = schedule.settings
        self.pupil, self.settings, self.schedule, self.ranks = pupil, settings, schedule, ranks
        self.layers = tuple(pupil.layers) if settings.hidden_loss_weight else ()
        if settings.hidden_loss_weight and len(self.layers) != pupil.student.arch.num_layers:
            raise InputError(f"distillation.hidden_loss_weight: the teacher's layers of {len(self.layers)} of the "
                              f"student's {pupil.student.arch.num_layers} are known; it needs all")
        student = pupil.student
        for block in student.blocks:
            assert isinstance(block, Block)
            block.recompute = bool(settings.activation_checkpointing)
            block.compiled = settings.compile and _compiles(block, ranks.device)
        self.products = use_fp8(student, ranks.device, ranks.size == 1) if settings.precision == "fp8" else []
        dtype = None if settings.precision == "fp32" else compute_dtype(settings.precision, ranks.device)
        student.compute_in(dtype)
        if ranks.size > 1 and not isinstance(student, FSDPModule):
            shard(student, ranks, dtype, shards=settings.shards)
        self.parameters = student.parameters_by_name()
        self.optimizer = make_optimizer(self.parameters.values(), settings, ranks.device)
        pupil.folder.mkdir(parents=True, exist_ok=True)
        self.writer = state.Writer(pupil.folder, ranks)
        self.adam_steps = 0
        self._load()
        if ranks.main:
            _trim_metrics(self.metrics, pupil.step)

    @property
    def metrics(self) -> Path:
        return self.pupil.folder / "metrics.jsonl"

    def begin(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        for product in self.products:
            product.forget()

    def backward(self, part: Batch, target: Target | None, teacher_streams: dict[int, torch.Tensor],
                 last: bool = True) -> None:
        """Add the gradient of a part of the batch, and its sums of kl, lm and cosine terms. `last`: of
        the step."""
        s, student = self.settings, self.pupil.student
        if isinstance(student, FSDPModule):
            student.set_requires_gradient_sync(last or not s.sync_last)
        # sharded gradients are means over processes, and the counts are of the whole batch
        share = self.ranks.size
        streams = dict.fromkeys(range(len(self.layers)), part.ids_BT)
        hidden = student(part.ids_BT, streams).flatten(0, 1)
        where = part.mask_BT.flatten()
        labels = part.labels_BT.flatten()
        if not bool(where.all()):
            hidden, labels = hidden[where], labels[where]
            target = None if target is None else target[where]
        loss, sums = student.lm_head(hidden, lambda h, head: distillation_loss(
            h, head, target, labels, temperature=s.temperature, kl_scale=s.kl_weight / part.kl_count * share,
            lm_scale=s.lm_loss_weight / part.lm_count * share, chunk=s.loss_tokens))
        found = [*sums.double().cpu(), torch.zeros(())]
        if self.layers:
            cosine = cosine_loss(list(streams.values()), [teacher_streams[i] for i in self.layers], part.mask_BT)
            loss = loss + s.hidden_loss_weight / part.kl_count * share * cosine
            found[2] = cosine.detach().double().cpu()
        loss.backward()
        self.sums += torch.stack(found) / torch.tensor([part.kl_count, part.lm_count, part.kl_count])

    def end(self) -> Row:
        """Take the step, or skip it; its row of the metrics.

        Raises:
            Diverged: too many were skipped.
        """
        s, pupil = self.settings, self.pupil
        if self.ranks.size > 1:
            sums = self.sums.to(self.ranks.device)
            dist.all_reduce(sums)
            self.sums = sums.cpu()
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), s.clip)))
        weights = torch.tensor([s.kl_weight, s.lm_loss_weight, s.hidden_loss_weight], dtype=torch.float64)
        value, rate = float(self.sums @ weights), self.schedule.rate(pupil.step)
        set_rate(self.optimizer, rate)
        if math.isfinite(value) and math.isfinite(norm):
            self.optimizer.step()
            self.adam_steps += 1
        else:
            pupil.skipped += 1
            if pupil.skipped > MAX_SKIPPED:
                pupil.diverged = Diverged(
                    f"distillation: {pupil.skipped} steps with a non-finite loss or gradient, the last at step "
                    f"{pupil.step}; lower distillation.learning_rate ({s.learning_rate})")
                raise pupil.diverged
        pupil.step += 1
        kl, lm, hidden = (_number(float(x)) for x in self.sums)
        row = {"step": pupil.step, "phase": self.schedule.phase(pupil.step - 1) + 1,
               "tokens": self.schedule.tokens(pupil.step), "lr": rate, "loss": lm,
               "grad_norm": _number(norm)}
        row |= {"kl": kl} if s.kl_weight else {}
        row |= {"hidden": hidden} if s.hidden_loss_weight else {}
        row |= {"objective": _number(value)} if (s.kl_weight and s.lm_loss_weight) or s.hidden_loss_weight else {}
        return row

    def evaluate(self, row: Row) -> None:
        """Add what the pupil's look finds to the row, if it has one; keep the weights if they are
        the best so far."""
        if self.pupil.evaluate is None:
            return
        found = self.pupil.evaluate(self.pupil.student)
        self.pupil.looks[str(self.pupil.step)] = {
            k: [_number(x) for x in v] if isinstance(v, list) else _number(v) for k, v in found.items()}
        row |= {f"eval_{k}": _number(v) for k, v in found.items() if not isinstance(v, list)}
        best = self.pupil.best
        # several processes measure no KL, and one that goes on from them compares losses
        grade = next((k for k in ("kl", "loss") if k in found and k in (best or found)), "")
        if found.get(grade, math.nan) < best.get(grade, math.inf):
            self.pupil.best = {"step": self.pupil.step} | {k: found[k] for k in ("kl", "loss") if k in found}
            self.writer.begin("best", self._weights(), self.pupil.best)

    def write(self, row: Row) -> None:
        if self.ranks.main:
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")

    # state
    # -----------------------------------------------------------------------------------------

    def _weights(self) -> state.Tensors:
        return {f"model.{name}": p.detach() for name, p in self.parameters.items()}

    def _moments(self, keep: bool = False) -> state.Tensors:
        """Adam's moments, zero where there are none yet; with `keep` the optimizer's own from here on."""
        found: state.Tensors = {}
        for name, p in self.parameters.items():
            found |= moments(self.optimizer, name, p, keep)
        return found

    def save(self) -> None:
        """Begin to write the state; it counts once `writer` has committed it."""
        p = self.pupil
        about = {"step": p.step, "skipped": p.skipped, "best": p.best, "looks": p.looks,
                 "adam_steps": self.adam_steps, "settings": self.settings.resumable()}
        self.writer.begin("state", self._weights() | self._moments(), about)

    def _load(self) -> None:
        found = state.find_resumable(self.pupil.folder)
        if found is None:
            return
        path, about = found
        if different := changes(about["settings"], self.settings.resumable()):
            raise InputError(f"{path} was trained with other settings ({'; '.join(different)}); go on with those, or "
                              "delete it to train again from the start")
        state.load(path, self._weights() | self._moments(keep=about["adam_steps"] > 0), self.ranks)
        self.pupil.step, self.pupil.skipped, self.pupil.best = about["step"], about["skipped"], about["best"]
        self.pupil.looks = dict(about.get("looks", {}))  # a state of an earlier version has none
        self.adam_steps = about["adam_steps"]
        if self.adam_steps:
            for p in self.parameters.values():
                self.optimizer.state[p]["step"] = torch.tensor(float(self.adam_steps))


def _compiles(block: Block, device: torch.device) -> bool:
    """Whether torch.compile takes a layer: of grouped products it knows those in bf16 alone, and it
    must not look into mamba-ssm's kernels."""
    kind = block.arch.family.kinds[block.kind]
    return not kind.routed and not (kind.has_state and usable("scan", device))


def _number(value: float) -> float | None:
    """NaN is not JSON."""
    return value if math.isfinite(value) else None


def _trim_metrics(path: Path, step: int) -> None:
    """Drop rows after the saved state, and what a kill left half written: those steps will be made
    again."""
    if path.is_file():
        lines = path.read_text(errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            write_atomic(path, "".join(line + "\n" for line in kept))


def parse_row(line: str) -> Row:
    """A row of the metrics. ValueError, LookupError or TypeError: it is none."""
    row: Row = dict(json.loads(line))
    if not all(value is None or type(value) in (int, float) for value in row.values()):
        raise ValueError("a row holds numbers alone")
    return row | {"step": int(row["step"]), "tokens": int(row["tokens"]),
                  "tokens_per_second": float(row["tokens_per_second"])}


def _step_of(line: str) -> float:
    """The step of a row of the metrics; infinity if it is none."""
    try:
        return float(parse_row(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf
