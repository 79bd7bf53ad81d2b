"""Layer importance by ablation: leave one layer out, run the rest, compare with the full model.

    mse     mean over tokens and channels of (h - h_without)^2, h the input of the LM head, after the final norm
            (MiniPuzzle, Nemotron-H arXiv:2504.03624, section 3)
    nmse    mse / mean of h^2                                     (Nemotron Elastic, arXiv:2511.16664, on logits)
    kl      KL(full || without) of the logits per token, nats     (Group-Aware SSM Pruning, arXiv:2504.11409)
    loss_delta  change of the next-token loss, nats per token
    cosine  1 - cos(before, after) of the block: the cheap proxy, for comparison only

and for pairs of layers, with e_i = h - h_without_i and d_i the change of the logits,

    G_ij = mean e_i e_j,    K_ij = 1/2 Cov_p(d_i, d_j):    x'Gx and x'Kx predict the damage of leaving out the set x

One-shot, or iterative (Nemotron Nano 2, arXiv:2508.14444): the least important layer goes, and the
others are scored again without it. One walk over the layers per batch of samples gives all scores,
per sample, hence with standard errors; the width scores come from the full model's stream in it.

Shapes: L layers, N samples, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from minipuzzle.core.errors import InputError
from minipuzzle.core.partial import Arrays
from minipuzzle.core.scores import COLUMNS, LayerScores, WidthScores
from minipuzzle.importance.racing import FIRST_LOOK, Race, looks, means, typical, undecided
from minipuzzle.importance.widths import gather_widths, width_scores
from minipuzzle.models.logits import compare
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Parts, Prefix, Source, Variant, Whole, heads_of, layer_forwards, walk
from minipuzzle.models.weights import check_finite

METRICS = ("mse", "nmse", "kl", "loss_delta", "cosine")
MEMO_BYTES = 2**31


@dataclass(frozen=True)
class Scored:
    """What a pass found. `samples` were spent of `available`; `forwards` layers were applied,
    counted in samples."""

    layers: LayerScores
    widths: WidthScores
    samples: int
    available: int
    forwards: int


def score(run: Pass, race: Race | None = None) -> Scored:
    """Score all layers and widths, one-shot. With a `race`, layers whose place is certain are not
    ablated further."""
    if race:
        _refuse_units(run)
    arch, total = run.source.arch, len(run.ids_NT)
    active = list(range(arch.num_layers))
    size = min(run.size(arch.num_layers + 1), FIRST_LOOK if race else total)
    parts: list[Arrays] = []
    spent = forwards = 0
    ends = looks(total) if race else [total]
    for end in ends:
        stop = min(total, -(-end // size) * size)
        if stop <= spent:
            continue
        chosen = tuple(active)
        found = run.run(spent, stop, size, partial(_ablate, run.source, chosen, run.variants() - 1))
        forwards += (stop - spent) * sum(layer_forwards(_variants(Whole(run.source), group))
                                         for group in _groups(chosen, run.variants() - 1))
        parts += found
        spent = stop
        if race and stop < total:
            values = np.concatenate([p["values"] for p in parts], -1)[METRICS.index(race.metric)]
            active = sorted({i for pair in undecided(values, arch.pattern, race, len(ends)) for i in pair})
            if not active:
                break
    run.progress(total)
    values = np.concatenate([p["values"] for p in parts], -1)
    pairs, samples = _interactions(parts, values)
    samples |= {metric: row.T for metric, row in zip(METRICS, values, strict=True)}
    return Scored(
        replace(layer_table(arch.pattern, values), interactions=pairs, samples=samples),
        width_scores(arch, parts, spent), spent, total, forwards)


def _interactions(parts: Sequence[Arrays], values: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """("mse", "kl" -> [L, L], "pairs_mse", "pairs_kl" -> [N, L, L]): G and K, and what each sample
    says of them. In a race a pair is of the samples on which both were ablated, moved to all as the
    layers are. Empty where there were more variants than memory to walk them together."""
    pairs = {metric: np.concatenate([p[f"gram_{metric}"] for p in parts]) for metric in ("mse", "kl")}
    if any(np.isnan(of_samples).all(0).any() for of_samples in pairs.values()):
        return {}, {}
    found = {metric: means(of_samples.reshape(len(of_samples), -1).T, typical(values[METRICS.index(metric)]))
             .reshape(of_samples.shape[1:]) for metric, of_samples in pairs.items()}
    return found, {f"pairs_{metric}": of_samples for metric, of_samples in pairs.items()}


def score_iteratively(run: Pass, race: Race, memo_bytes: int = MEMO_BYTES) -> Scored:
    """Score one-shot, then find the order in which layers go: the one whose removal, on top of
    those that went before, does least by `race.metric`; of each kind as many as `race.drops` says,
    and never the last of all layers.

    The table gets `order` (1 first) and `added_METRIC`, the damage that each removal added. A walk
    starts at the layer that went last, with the streams that came to it, if those of all variants
    fit into `memo_bytes`.
    """
    _refuse_units(run)
    scored, arch = score(run), run.source.arch
    whole, size = Whole(run.source), run.size(arch.num_layers + 1)
    total, seq = run.ids_NT.shape
    memos: dict[int, dict[int, dict[Prefix, torch.Tensor]]] = {}
    memo_bytes = min(memo_bytes, run.memory_bytes or memo_bytes)
    fits = 2 * total * seq * arch.hidden_size * arch.num_layers * (arch.num_layers + 1) <= memo_bytes
    together = run.variants() - 1
    order, added_NL = np.full(arch.num_layers, np.nan), np.full((total, arch.num_layers), np.nan)
    gone: list[int] = []
    before_N, forwards = np.zeros(total), scored.forwards
    wanted = sum(most for _, most in race.drops.values())
    while len(gone) < min(wanted, arch.num_layers - 1):
        left = [i for i, kind in enumerate(arch.pattern) if i not in gone
                and sum(arch.pattern[j] == kind for j in gone) < race.drops.get(kind, (0, 0))[1]]
        walks = [[whole.variant(), *_variants(whole, group, frozenset(gone))[1:]] for group in _groups(left, together)]

        def make(first: int, ids_BT: torch.Tensor, walks: list[list[Variant]] = walks) -> Arrays:
            memo = memos.setdefault(first, {}) if fits else None
            found = []
            for variants in walks:
                full, *without = walk(whole, variants, ids_BT, memo=memo)
                found.append(damage(whole, full, without, [None] * len(variants), ids_BT)[0])
            return {"values": np.concatenate(found, 1)}

        part = replace(run, partial=run.partial.part(f"without-{'-'.join(map(str, gone))}"),
                       progress=lambda done: run.progress(total * (len(gone) + done / total) / wanted))
        found = np.concatenate([p["values"] for p in part.run(0, total, size, make)], -1)
        found_VN = found[METRICS.index(race.metric)]
        means_V = found_VN.mean(-1)
        best = min(range(len(left)), key=lambda v: (means_V[v], -left[v]))
        order[left[best]], added_NL[:, left[best]] = len(gone) + 1, found_VN[best] - before_N
        before_N = found_VN[best]
        forwards += total * sum(layer_forwards(variants, gone[-1] if fits and gone else 0) for variants in walks)
        gone.append(left[best])
    name = f"added_{race.metric}"
    table = scored.layers.table.assign(order=order, **{name: added_NL.mean(0)})
    layers = replace(scored.layers, table=table, samples=scored.layers.samples | {name: added_NL})
    return replace(scored, layers=layers, forwards=forwards)


def _refuse_units(run: Pass) -> None:
    """Both count layers of a kind, not what goes together with them."""
    if run.source.family.units:
        raise InputError(f"a {run.source.arch.model_type} model has layers that go together: set scores.racing and "
                          "scores.iterative to false")


def _variants(whole: Whole, chosen: Sequence[int], removed: frozenset[int] = frozenset()) -> list[Variant]:
    return [whole.variant(removed), *(whole.variant(removed | {i}) for i in chosen)]


def _groups(chosen: Sequence[int], together: int) -> list[list[int]]:
    return [list(chosen[i : i + together]) for i in range(0, len(chosen), together)]


def _ablate(source: Source, chosen: Sequence[int], together: int, first: int, ids_BT: torch.Tensor) -> Arrays:
    """values [metric, L, B], NaN for layers that were not chosen; sums over samples of the rest.

    More than `together` ablations go in several walks: then pairs of them are not compared, and G
    and K are NaN.
    """
    arch, bsz = source.arch, len(ids_BT)
    sums: dict[str, torch.Tensor] = {}
    values = np.full((len(METRICS), arch.num_layers, bsz), np.nan)
    cosine: dict[int, torch.Tensor] = {}

    def watch(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        cosine[layer] = 1 - F.cosine_similarity(_wide(before), _wide(after), dim=-1).double().mean(-1)

    whole = Whole(source)
    groups = _groups(chosen, together)
    for place, group in enumerate(groups):
        looks_in = (gather_widths(sums), watch) if place == 0 else (None, None)
        full, *without = walk(whole, _variants(whole, group), ids_BT, *looks_in)
        values[:4, group], gram_mse, gram_kl = damage(whole, full, without, [None] * (len(group) + 1), ids_BT,
                                                      gram=len(groups) == 1)
    values[4] = torch.stack([cosine[i] for i in range(arch.num_layers)]).numpy(force=True)
    out = {name: tensor.numpy(force=True) for name, tensor in sums.items()} | {"values": values}
    for name, gram in (("gram_mse", gram_mse), ("gram_kl", gram_kl)):
        out[name] = np.full((bsz, arch.num_layers, arch.num_layers), np.nan)
        if len(groups) == 1:
            out[name][np.ix_(range(bsz), chosen, chosen)] = gram
    return out


def damage(parts: Parts, full: torch.Tensor, variants: Sequence[torch.Tensor], roots: Sequence[Hashable],
           ids_BT: torch.Tensor, expand: Callable[[torch.Tensor], torch.Tensor] = lambda x: x, gram: bool = False
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mse, nmse, kl, loss_delta [4, variants, B]; with `gram` each sample's G and K, [B, variants,
    variants]).

    `roots`: of the full model and of each variant; `expand` brings a variant's [..., k] to the
    parent's [..., D].
    """
    errors = torch.stack([_wide(expand(v)) - _wide(full) for v in variants])
    mse = errors.double().square().mean((-1, -2))
    scale = full.double().square().mean((-1, -2))
    base, others, gram_kl = compare(full, variants, *heads_of(parts, roots), parts.source.arch.vocab_size, ids_BT, gram)
    check_finite(parts.source.family.head_name, base.loss)
    values = torch.stack([mse, mse / scale, torch.stack([o.kl for o in others]),
                          torch.stack([o.loss - base.loss for o in others])]).numpy(force=True)
    if gram_kl is None:
        return values, np.zeros(0), np.zeros(0)
    flat = errors.flatten(2).transpose(0, 1)
    gram_mse = (flat @ flat.mT).double() / full[0].numel()
    return values, gram_mse.numpy(force=True), gram_kl.numpy(force=True)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 or better: a difference of bf16 numbers is not one."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_table(pattern: str, values: np.ndarray, **more: Sequence[float]) -> LayerScores:
    """LayerScores from values [metric, L, N]; NaN where a layer was not measured."""
    table = pd.DataFrame({"layer": range(len(pattern)), "kind": list(pattern)})
    for i, metric in enumerate(METRICS):
        table[metric] = means(values[i])
        table[f"{metric}_stderr"] = [float(standard_error(row[~np.isnan(row)])) for row in values[i]]
    table["samples"] = (~np.isnan(values[0])).sum(-1)
    for name, column in more.items():
        table[name] = column
    return LayerScores(table[[*COLUMNS, "nmse_stderr", "loss_delta_stderr", "cosine_stderr", *more]])


def standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the last axis; NaN for a single sample."""
    count = values.shape[-1]
    if count < 2:
        return np.full(values.shape[:-1], np.nan)
    return np.asarray(values.std(-1, ddof=1) / np.sqrt(count))


def score_layers(source: Source, ids_NT: torch.Tensor,
                 progress: Callable[[float], None] = lambda done: None) -> LayerScores:
    """Score every layer on N samples of T tokens. `progress` hears the number of samples done."""
    return score(Pass(source, ids_NT, progress=progress)).layers
