"""Retrieval: does a model find again what stood in its context? Built in, offline, for any tokenizer.

A sample is `context` random tokens. Spans of them come again at its end, in another order:

    k1 a b ... k2 c d ...... k3 e f ... | k2 c d  k3 e f  k1 a b

The first token of a span, its key, stands nowhere else before. After a key the model can know the
rest from the context alone. `copy`: spans of up to 16 tokens; `recall`: a key and one value.

    accuracy    share of the tokens after a key that are predicted right; by chance 1 / vocabulary
    kl          KL(parent || model) there, nats per token

The mean KL of texts hardly sees this, and few layers do it, attention most (arXiv:2510.19861).

Shapes: N samples, B of a batch, T tokens, K spans of S tokens, M models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from minipuzzle.core.partial import Arrays
from minipuzzle.models.logits import HeadRows, compare
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Parts, Source, Variant, Whole, heads_of, walk

TASKS = {"copy": 16, "recall": 2}  # tokens of a span, the key among them
SAMPLES = 8  # of each task
SPANS = 32  # of a sample, at most
LEAST = 16  # tokens of the shortest context
PARTS = (8, 4, 2, 1)  # distances are told up to T/8, T/4, T/2 and T
CLEAR = 2.0  # standard errors above chance: a parent below has nothing to lose
Retrieval = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """The same questions for every model of that vocabulary.

    ids_NT: the samples, first those of `copy`, then those of `recall`. spans: (K, S) of each task;
    they fill the end of the sample. distances_NK: tokens from a span's first place to its second.
    """

    vocab: int
    ids_NT: torch.Tensor
    spans: Mapping[str, tuple[int, int]]
    distances: Mapping[str, np.ndarray]

    @property
    def context(self) -> int:
        return self.ids_NT.shape[1]

    @cached_property
    def rows(self) -> dict[str, range]:
        """The samples of each task."""
        each = len(self.ids_NT) // len(self.spans)
        return {task: range(i * each, (i + 1) * each) for i, task in enumerate(self.spans)}


def make_probe(vocab: int, context: int, samples: int = SAMPLES, seed: int = 0) -> Probe:
    """`samples` of each task, a function of the arguments alone. A context of less than LEAST
    tokens gets as many."""
    context, gen = max(context, LEAST), torch.Generator().manual_seed(seed)
    parts, spans, distances = [], {}, {}
    for task, longest in TASKS.items():
        size = min(longest, context // 8)
        count = max(1, min(SPANS, context // (2 * size), vocab // 4))
        rows = [_sample(vocab, context, count, size, gen) for _ in range(samples)]
        spans[task] = count, size
        parts.append(torch.stack([ids for ids, _ in rows]))
        distances[task] = np.stack([distance for _, distance in rows])
    return Probe(vocab, torch.cat(parts), spans, distances)


def _sample(vocab: int, context: int, count: int, size: int, gen: torch.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """(ids [T], distances [K])."""
    tokens = torch.randperm(vocab, generator=gen)
    keys, others = tokens[:count], tokens[count:]
    begin = context - count * size
    ids = others[torch.randint(len(others), (context,), generator=gen)]
    places = torch.randperm(begin // size, generator=gen)[:count] * size  # in the order in which they come again
    for i, (key, place) in enumerate(zip(keys, places.tolist(), strict=True)):
        ids[place] = key
        ids[begin + i * size : begin + (i + 1) * size] = ids[place : place + size]
    return ids, (begin + size * torch.arange(count) - places).numpy()


def measure_variants(probe: Probe, parts: Parts, full: Variant, variants: Sequence[Variant], run: Pass
                     ) -> list[Retrieval]:
    """The retrieval of the full model and of each variant against it, in one pass over the probe's
    ids; those that do not fit into memory together are walked in groups."""
    group = run.variants() - 1
    groups = [list(variants[i : i + group]) for i in range(0, len(variants), group)] or [[]]

    def make(first: int, ids_BT: torch.Tensor) -> Arrays:
        found = []
        for some in groups:
            hidden = walk(parts, [full, *some], ids_BT)
            found.append(_values(probe, first, hidden, *heads_of(parts, [v.root for v in (full, *some)]),
                                 parts.source.arch.vocab_size, ids_BT))
        return {"values": np.concatenate([found[0], *(f[:, 1:] for f in found[1:])], 1)}

    return _summaries(probe, run.run(0, len(probe.ids_NT), run.size(min(len(variants), group) + 1), make))


def measure_models(probe: Probe, parent: Source, others: Sequence[Source], run: Pass) -> list[Retrieval]:
    """The same of whole models: of the parent, and of each other against it."""
    models = [Whole(source) for source in (parent, *others)]

    def make(first: int, ids_BT: torch.Tensor) -> Arrays:
        hidden = [walk(model, [model.variant()], ids_BT)[0] for model in models]
        return {"values": _values(probe, first, hidden, list(range(1, len(models))),
                                  lambda a, b: [model.source.head_rows(a, b) for model in models],
                                  parent.arch.vocab_size, ids_BT)}

    return _summaries(probe, run.run(0, len(probe.ids_NT), run.size(len(models)), make))


def _values(probe: Probe, first: int, hidden: Sequence[torch.Tensor], which: Sequence[int], head_rows: HeadRows,
            vocab: int, ids_BT: torch.Tensor) -> np.ndarray:
    """[accuracy or kl, M, B, span]; NaN where a sample has fewer spans than another."""
    out = np.full((2, len(hidden), len(ids_BT), max(count for count, _ in probe.spans.values())), np.nan)
    for task, rows in probe.rows.items():
        at = [i for i in range(len(ids_BT)) if first + i in rows]
        if not at:
            continue
        count, size = probe.spans[task]
        # each span as a sample of its own: its first token is given, the others are predicted
        own = [h[at, -count * size :].reshape(len(at) * count, size, -1) for h in hidden]
        ids = ids_BT[at, -count * size :].reshape(len(at) * count, size)
        parent, found, _ = compare(own[0], own[1:], which, head_rows, vocab, ids)
        for m, one in enumerate((parent, *found)):
            out[0, m, at, :count] = one.accuracy.view(-1, count).numpy(force=True)
            out[1, m, at, :count] = one.kl.view(-1, count).numpy(force=True)
    return out


def _summaries(probe: Probe, batches: Sequence[Arrays]) -> list[Retrieval]:
    values = np.concatenate([b["values"] for b in batches], 2)
    return [_summary(probe, values[:, m], values[0, 0]) for m in range(values.shape[1])]


def _summary(probe: Probe, values: np.ndarray, parents: np.ndarray) -> Retrieval:
    """`accuracy` and `kl`, the means of both tasks, and those of each, with standard errors over the
    samples; `lost`, the share of the parent's accuracy that is gone (null where that is no better
    than chance); `distances`, up to so many tokens, and the accuracy of each task there."""
    out: Retrieval = {"context": probe.context}
    samples = {task: np.nanmean(values[:, list(rows)], -1) for task, rows in probe.rows.items()}
    own = {task: np.nanmean(parents[list(rows)], -1) for task, rows in probe.rows.items()}
    for i, name in enumerate(("accuracy", "kl")):
        means = {task: float(found[i].mean()) for task, found in samples.items()}
        errors = {task: _stderr(found[i]) for task, found in samples.items()}
        out[name], out[f"{name}_stderr"] = float(np.mean([*means.values()])), _of_mean([*errors.values()])
        for task in means:
            out[f"{task}_{name}"], out[f"{task}_{name}_stderr"] = means[task], errors[task]
    whole, error = float(np.mean([*map(np.mean, own.values())])), _of_mean([*map(_stderr, own.values())])
    lost = [own[task] - found[0] for task, found in samples.items()]
    can = whole - 1 / probe.vocab > CLEAR * error
    out["lost"] = float(np.mean([*map(np.mean, lost)])) / whole if can else None
    out["lost_stderr"] = _of_mean([*map(_stderr, lost)]) / whole if can else None
    out["distances"] = _by_distance(probe, values[0])
    return out


def _by_distance(probe: Probe, accuracy: np.ndarray) -> list[dict[str, float | None]]:
    out, low = [], 0
    for part in PARTS:
        high = probe.context // part
        row: dict[str, float | None] = {"up_to": high}
        for task, rows in probe.rows.items():
            distances = probe.distances[task]
            inside = accuracy[list(rows)][:, : distances.shape[1]][(low < distances) & (distances <= high)]
            row[f"{task}_accuracy"] = float(inside.mean()) if len(inside) else None
        out.append(row)
        low = high
    return out


def _stderr(values: np.ndarray) -> float:
    """Of the mean of independent samples."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _of_mean(errors: Sequence[float]) -> float:
    """The standard error of a mean of independent numbers."""
    return float(np.sqrt(np.sum(np.square(errors))) / len(errors))
