"""Measured quality on held-out blocks: of one model, or of hundreds of candidates in one walk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.core.partial import Arrays
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.logits import TokenMetrics, compare
from minipuzzle.models.module import HybridLM
from minipuzzle.models.passes import Pass
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import (
    Model,
    Parts,
    Source,
    Variant,
    Whole,
    batches,
    final_hidden,
    floats_per_sample,
    heads_of,
    walk,
)

# (activations that enter the head, head) -> what is measured of them
Use = Callable[[torch.Tensor, torch.Tensor], np.ndarray]
_VALUES = ("loss", "kl", "accuracy", "agreement")
Quality = dict[str, Any]  # numbers by name, and lists of them by block


class Reference:
    """The parent's final activations on the evaluation blocks, computed once for all models that
    are measured one by one. They lie on the host in the parent's dtype; a GPU holds those of a batch. `stream_bytes`:
    memory for the streams of a parent that is read from disk, by default what is fastest.

    Several `ranks` share the blocks, equally many each, since a model in shards is read by all at
    once: what comes again does not count. `progress` hears the blocks done: once through for the
    reference, from there on for each model. `by_block`: what is measured holds the `losses` of the
    blocks too.
    """

    by_block = False

    def __init__(self, source: Source, ids_NT: torch.Tensor, stream_bytes: int | None = None,
                 ranks: Ranks | None = None, progress: Callable[[int], None] = lambda done: None) -> None:
        self.progress = progress
        self.ranks, self.arch, self.count = ranks or Ranks(source.device), source.arch, len(ids_NT)
        size = self.ranks.size
        own = range(self.ranks.rank, -(-self.count // size) * size, size)
        self.ids = ids_NT.to(source.device)[[i % self.count for i in own]]
        self.head = source.head_rows(0, source.arch.vocab_size)
        whole, run = Whole(source), Pass(source, self.ids, memory_bytes=stream_bytes)
        done = 0
        for ids in torch.split(self.ids, run.size(1)):
            found = walk(whole, [whole.variant()], ids)[0]
            if not done:  # the plan counts one copy (Plan.reference_bytes)
                self.hidden = torch.empty(len(self.ids), *found.shape[1:], dtype=found.dtype)
            self.hidden[done : done + len(ids)] = found
            done += len(ids)
            progress(done)

    def quality(self) -> Quality:
        """The parent's own, as `measure` gives it."""
        own = self.compare(self.arch, self._known)
        return {name: value for name, value in own.items() if not name.startswith("loss_minus")}

    def _known(self, first: int, ids: torch.Tensor, use: Use) -> Any:
        return use(self.hidden[first : first + len(ids)].to(ids.device), self.head)

    def measure(self, source: Source, stream_bytes: int | None = None) -> Quality:
        """`measure` of a model that need not be in memory."""
        other = Reference(source, self.ids, stream_bytes)
        return self.compare(source.arch, other._known)

    def compare(self, arch: Architecture, look: Callable[[int, torch.Tensor, Use], Any]) -> Quality:
        """`look(first sample, ids, use)` calls `use` with what enters the head, and the head."""
        parts: list[np.ndarray] = []
        done = 0
        for ids in batches(self.ids, floats_per_sample(arch, self.ids.shape[1])):
            known = self.hidden[done : done + len(ids)].to(ids.device)

            def use(other: torch.Tensor, head: torch.Tensor, known: torch.Tensor = known,
                    ids: torch.Tensor = ids) -> np.ndarray:
                parent, found, _ = compare(known, [other], [1], lambda a, b: [self.head[a:b], head[a:b]],
                                           len(head), ids)
                return _values([*found, parent])

            parts.append(look(done, ids, use))
            done += len(ids)
            self.progress(len(self.ids) + done)
        values = np.concatenate(parts, -1)
        if self.ranks.size > 1:
            every = self.ranks.gather(values)
            values = np.stack([every[i % self.ranks.size][..., i // self.ranks.size] for i in range(self.count)], -1)
        return summary(values[:, 0], values[0, 1], self.by_block)


@torch.no_grad()
def measure(model: Model | HybridLM, reference: Reference) -> Quality:
    """loss and kl to the reference (nats per token), accuracy, agreement, and the loss minus the
    reference's, each with its stderr. All processes measure a model in shards
    at once."""
    if isinstance(model, HybridLM):
        return reference.compare(model.arch, lambda first, ids, use: model.lm_head(model(ids), use))
    return reference.compare(model.arch, lambda first, ids, use: use(final_hidden(model, ids), model.head))


def check_finite(quality: Mapping[str, float], name: object, model: Source, ids_NT: torch.Tensor) -> None:
    """Raise CorruptArtifact if a loss or KL of the model called `name` is not finite, with the
    layer where that begins."""
    if all(math.isfinite(quality[key]) for key in ("loss", "kl") if key in quality):
        return
    try:
        Reference(model, ids_NT)
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{name}: {error}") from None
    raise CorruptArtifact(f"{name}: its loss or KL is not finite, though its layers' outputs are; the weights of "
                          "its head, or of the teacher's, are damaged or far too large")


def measure_variants(parts: Parts, full: Variant, variants: Sequence[Variant], run: Pass,
                     by_block: bool = False, teacher: Source | None = None) -> list[Quality]:
    """`measure` of every variant against the full model, or against a `teacher`, in one pass. Parts
    are cut and rounded as surgery writes them, so each result is that of the written checkpoint."""
    def make(first: int, ids_BT: torch.Tensor) -> Arrays:
        which, rows = heads_of(parts, [p.root for p in (full, *variants)])
        if teacher is None:
            reference, *hidden = walk(parts, [full, *variants], ids_BT)
            heads = rows
        else:
            whole = Whole(teacher)
            [reference], hidden = walk(whole, [whole.variant()], ids_BT), walk(parts, variants, ids_BT)
            which, heads = [i + 1 for i in which], lambda a, b: [teacher.head_rows(a, b), *rows(a, b)]
        parent, found, _ = compare(reference, hidden, which, heads, parts.source.arch.vocab_size, ids_BT)
        return {"values": _values([*found, parent])}

    batches = run.run(0, len(run.ids_NT), run.size(len(variants) + 1), make)
    values = np.concatenate([b["values"] for b in batches], -1)
    return [summary(values[:, i], values[0, -1], by_block) for i in range(len(variants))]


def _values(found: Sequence[TokenMetrics]) -> np.ndarray:
    """[value, variant, sample]"""
    return np.stack([np.stack([getattr(m, name).numpy(force=True) for m in found]) for name in _VALUES])


def summary(values: np.ndarray, parent_losses: np.ndarray, by_block: bool = False) -> Quality:
    """Means over samples of [value, sample], with standard errors; and the loss minus the
    parent's. That difference is paired: its standard error is of the differences sample
    by sample, which cancels most of what makes a text easy or hard. `by_block`: also `losses` and
    `kls` of the samples."""
    rows = dict(zip(_VALUES, values, strict=True))
    rows["loss_minus_parent"] = rows["loss"] - parent_losses
    out: Quality = {"losses": rows["loss"].tolist(), "kls": rows["kl"].tolist()} if by_block else {}
    for name, row in rows.items():
        out[name] = float(row.mean())
        if len(row) > 1:
            out[f"{name}_stderr"] = float(row.std(ddof=1) / np.sqrt(len(row)))
    return out
