"""Predicted damage: what is known about every layer and width of a space, added up.

    damage = layers + sum over axes of curve(axis, width), and what cuts do together (together.py)
    additive:   layers = sum_i score(i)                over the dropped layers i
    quadratic:  layers = sum_i score(i) + sum_{i != j} interaction(i, j)
                exact for one layer, second order for sets

For kl the interaction is half the covariance of the changes of the logits under the parent's
probabilities, for mse the mean product of the errors (importance/layers.py). rank.py says how well
it predicts what was measured.
Suffixes: L layers, N samples, C combinations of layer counts, W combinations of widths, A axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np

from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.scores import LAYER_METRICS, LayerScores, WidthCurves
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.space import Space
from minipuzzle.search.together import Together, read_together


@dataclass(frozen=True)
class Damage:
    """The predicted damage of each layer [L] and of each value of each axis; None where nothing was
    scored."""

    orders: tuple[list[int], ...]  # of each kind, in the order in which layers go
    values_L: np.ndarray | None = None
    stderr_L: np.ndarray | None = None
    axes: tuple[np.ndarray, ...] | None = None
    axes_stderr: tuple[np.ndarray, ...] | None = None
    pairs_LL: np.ndarray | None = None  # interactions, with a zero diagonal
    values_NL: np.ndarray | None = None  # values_L sample by sample, NaN where a race did not look
    pairs_NLL: np.ndarray | None = None
    together: Together | None = None
    axis_names: tuple[str, ...] = ()

    def widths(self, index_WA: np.ndarray) -> np.ndarray | None:
        """[W] damage by the widths at these indices of the axes."""
        if self.together is None or self.axes is None:
            return _look_up(self.axes, index_WA, lambda damage_AW: damage_AW.sum(0))
        alone = self._alone(index_WA)
        return np.asarray(sum(alone.values()) + self.together.widths(alone))

    def widths_stderr(self, index_WA: np.ndarray) -> np.ndarray | None:
        """[W] its standard error, with the axes' errors independent; NaN where it was not
        measured."""
        return _look_up(self.axes_stderr, index_WA, lambda errors_AW: np.sqrt((errors_AW**2).sum(0)))

    def interplay(self, layers_C: np.ndarray, index_WA: np.ndarray
                  ) -> tuple[np.ndarray, np.ndarray] | None:
        """[C, n], [n, W]: their product is what layers and widths add together, beside `layers`
        and `widths`; None where it was not measured."""
        if self.together is None or self.axes is None:
            return None
        return self.together.with_layers(layers_C, self._alone(index_WA))

    def _alone(self, index_WA: np.ndarray) -> dict[str, np.ndarray]:
        assert self.axes is not None
        return {name: values[index_WA[:, i]]
                for i, (name, values) in enumerate(zip(self.axis_names, self.axes, strict=True))}

    def layers(self, space: Space) -> np.ndarray | None:
        """[C] damage by the layers that go, the lowest-scored of each kind first."""
        if self.values_L is None:
            return None
        sums = _dropped_sums(self.values_L, self.orders, space)
        if self.pairs_LL is not None:
            sums = sums + _dropped_pairs(self.pairs_LL, self.orders, space)
        return sums if self.together is None else sums * self.together.ratios(space)

    def layers_stderr(self, space: Space) -> np.ndarray | None:
        """[C] its standard error; NaN where it was not measured. Layers share their samples, so
        their errors are correlated; without the samples (a CSV from elsewhere) they count as
        independent."""
        if self.stderr_L is None:
            return None
        if self.values_NL is None:
            found = np.asarray(np.sqrt(_dropped_sums(self.stderr_L**2, self.orders, space)))
        else:
            found = self._stderr(lambda values_L: _dropped_sums(values_L, self.orders, space),
                                 lambda pairs_LL: _dropped_pairs(pairs_LL, self.orders, space))
        return found if self.together is None else found * self.together.ratios(space)

    def _stderr(self, singles: Callable[[np.ndarray], np.ndarray], pairs: Callable[[np.ndarray], np.ndarray]
                ) -> np.ndarray:
        """Of an estimate that is linear in means over samples.

        A mean is a sum of 1/n of each of its n samples, so the estimate is a sum over samples too,
        and its variance is the sum of their variances. In a race the later samples know fewer
        layers: the samples of one look contribute alike, and the variance of one contribution is
        taken over all samples up to that look, which know these layers too.
        """
        assert self.values_NL is not None
        known_NL, variance = ~np.isnan(self.values_NL), np.zeros(())
        counts_L, begin = known_NL.sum(0), 0
        for end in (*(np.flatnonzero((known_NL[1:] != known_NL[:-1]).any(-1)) + 1), len(known_NL)):
            adds_NL = np.where(known_NL[begin], self.values_NL[:end] / np.maximum(counts_L, 1), 0.0)
            adds_NL = adds_NL - adds_NL.mean(0)
            adds_NLL = self._pairs_add(begin, end)
            squares = sum((singles(adds_NL[n]) + (0.0 if adds_NLL is None else pairs(adds_NLL[n]))) ** 2
                          for n in range(end))
            variance = variance + (end - begin) * squares / (end - 1 if end > 1 else np.nan)
            begin = end
        return np.asarray(np.sqrt(variance))

    def _pairs_add(self, begin: int, end: int) -> np.ndarray | None:
        """[end, L, L] what each sample adds to the interactions known at sample `begin`, centred."""
        if self.pairs_NLL is None:
            return None
        known_NLL = ~np.isnan(self.pairs_NLL)
        adds_NLL = np.where(known_NLL[begin], self.pairs_NLL[:end] / np.maximum(known_NLL.sum(0), 1), 0.0)
        return np.asarray(adds_NLL - adds_NLL.mean(0))


def _look_up(axes: tuple[np.ndarray, ...] | None, index_WA: np.ndarray,
             add_up: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | None:
    return None if axes is None else np.asarray(add_up(
        np.stack([values[index_WA[:, i]] for i, values in enumerate(axes)])))


def predict(parent: Architecture, space: Space, scores: LayerScores | None, curves: WidthCurves | None,
            metric: str, damage: str = "auto") -> Damage:
    """Look up what is known about every layer and width of the space. `damage`: additive,
    quadratic, or auto: what each removal added where layers were scored iteratively, else quadratic
    where interactions were measured; and corrected by what combinations were measured to do.

    Raises:
        InputError: scores of another model, no such metric, an axis that was not measured.
        CorruptArtifact: values that are not finite.
    """
    if scores is None and damage == "quadratic":
        raise InputError("search.damage quadratic needs interactions, which 'minipuzzle score' "
                         "measures; give --scores, or use search.damage additive")
    known = Damage(()) if scores is None else _of_layers(parent, scores, metric, damage)
    order_L = None if scores is None else scores.order
    keep = frozenset() if scores is None else scores.keep
    orders = tuple(drop_order(parent, kind, known.values_L, order_L, keep) for kind in parent.drops.values())
    axes = axes_stderr = None
    if curves is not None:
        if metric not in curves.table.columns:
            have = [c for c in curves.table.columns if c in LAYER_METRICS]
            raise InputError(f"width curves have no column {metric!r}; they have {', '.join(have) or 'no metric'}")
        axes = tuple(_curve(parent, curves, axis, metric, values) for axis, values in space.widths.items())
        if f"{metric}_stderr" in curves.table.columns:
            axes_stderr = tuple(curves.damage(axis, f"{metric}_stderr", np.array(values), _whole(parent, axis, values))
                                for axis, values in space.widths.items())
    found = replace(known, orders=orders, axes=axes, axes_stderr=axes_stderr,
                    axis_names=tuple(space.widths))
    if damage != "auto" or curves is None or known.values_L is None:
        return found

    def sums(some: Space) -> np.ndarray:
        out = found.layers(some)
        assert out is not None
        return out

    def alone(axis: str, width: int) -> float:
        whole = _whole(parent, axis, (width,))
        return float(curves.damage(axis, metric, np.array([width]), whole)[0])

    return replace(found, together=read_together(parent, curves, metric, orders, sums, alone))


def _of_layers(parent: Architecture, scores: LayerScores, metric: str, damage: str) -> Damage:
    source = scores.source or "given"
    if scores.pattern != parent.pattern:
        raise InputError(f"scores {source} are of another model: {len(scores.pattern)} layers {scores.pattern}, "
                         f"the parent has {parent.num_layers} {parent.pattern}")
    values_L, stderr_L = scores.metric(metric), scores.stderr(metric)
    _check_finite(values_L, f"scores {source}", metric)
    values_NL, added_L = _samples(scores, metric, 1), scores.added(metric)
    pairs_LL = pairs_NLL = None
    if damage == "auto" and added_L is not None:
        gone, added_NL = np.isfinite(added_L), _samples(scores, f"added_{metric}", 1)
        values_L = np.where(gone, added_L, values_L)
        values_NL = None if values_NL is None or added_NL is None else np.where(gone, added_NL, values_NL)
    elif damage != "additive":
        pairs_LL = _interactions(scores, metric, damage == "quadratic")
        if pairs_LL is not None:
            pairs_NLL = _samples(scores, f"pairs_{metric}", 2)
            values_NL = None if pairs_NLL is None else values_NL
            pairs_NLL = None if pairs_NLL is None else pairs_NLL * (1 - np.eye(len(pairs_LL)))
    return Damage((), values_L, stderr_L, pairs_LL=pairs_LL, values_NL=values_NL, pairs_NLL=pairs_NLL)


def _samples(scores: LayerScores, name: str, sides: int) -> np.ndarray | None:
    """[samples, layers] or [samples, layers, layers]; None where they did not come with the scores.

    Raises:
        CorruptArtifact: of another number of layers.
    """
    found = scores.samples.get(name)
    if found is not None and (found.shape[1:] != (len(scores.table),) * sides or not len(found)):
        raise CorruptArtifact(f"samples {name} of {scores.source} are {found.shape}, layers.csv has "
                              f"{len(scores.table)} layers; score again")
    return None if found is None else np.asarray(found, float)


def _interactions(scores: LayerScores, metric: str, asked: bool) -> np.ndarray | None:
    """[L, L] with a zero diagonal, or None where they were not measured and not `asked` for."""
    if metric not in scores.interactions:
        if asked:
            raise InputError(f"search.damage quadratic needs interactions of the metric {metric!r}; use kl or mse, "
                             "which 'minipuzzle score' measures, or search.damage additive")
        return None
    pairs_LL = np.array(scores.interactions[metric], float)
    if pairs_LL.shape != (len(scores.table),) * 2:
        raise CorruptArtifact(f"interactions of {scores.source} are {pairs_LL.shape}, layers.csv has "
                              f"{len(scores.table)} layers; score again")
    _check_finite(pairs_LL, "interactions", metric)
    np.fill_diagonal(pairs_LL, 0.0)
    return pairs_LL


def drop_order(parent: Architecture, kind: str, values_L: np.ndarray | None,
               order_L: np.ndarray | None = None, keep: AbstractSet[int] = frozenset()) -> list[int]:
    """Layers of a kind (the first of each run that goes together) in the order in which they go: by
    `order_L` where iterative scoring found one, then lowest score first. Of equals the later goes
    first (in the published scores of the 56B FFN 85 and 96 tie at the cut, and 96 went). Without
    scores those nearest to the middle of the stack go first: in every published profile the first
    and last layers matter most. Those in `keep` come last: the space does not reach them.
    """
    layers = np.array(parent.layers_of(kind), int)
    keys = np.abs(2 * layers - (parent.num_layers - 1)) if values_L is None else values_L[layers]
    first = np.zeros(len(layers)) if order_L is None else np.nan_to_num(order_L[layers], nan=np.inf)
    kept = np.isin(layers, [*keep])
    return [int(i) for i in layers[np.lexsort((-layers, keys, first, kept))]]


def _dropped_sums(values_L: np.ndarray, orders: tuple[list[int], ...], space: Space) -> np.ndarray:
    """[C] sum of the values of the layers that go."""
    sums = [np.concatenate([[0.0], np.cumsum(values_L[order])])[list(drops)]
            for order, drops in zip(orders, space.drops.values(), strict=True)]
    return np.ravel(functools.reduce(np.add.outer, sums))


def _dropped_pairs(pairs_LL: np.ndarray, orders: tuple[list[int], ...], space: Space) -> np.ndarray:
    """[C] sum of the interactions of all pairs of layers that go, each counted twice."""
    out: np.ndarray | float = 0.0
    kinds = list(zip(orders, space.drops.values(), strict=True))
    for a, (order, drops) in enumerate(kinds):
        for b, (other, more) in list(enumerate(kinds))[a:]:
            sums = np.zeros((len(order) + 1, len(other) + 1))
            sums[1:, 1:] = pairs_LL[np.ix_(order, other)].cumsum(0).cumsum(1)
            found = sums[list(drops), list(drops)] if a == b else 2 * sums[np.ix_(drops, more)]
            shape = [len(drops) if k == a else len(more) if k == b else 1 for k in range(len(kinds))]
            out = out + found.reshape(shape)
    return np.ravel(np.broadcast_to(out, [len(drops) for drops in space.drops.values()]))


def _curve(parent: Architecture, curves: WidthCurves, axis: str, metric: str, widths: tuple[int, ...]) -> np.ndarray:
    """Damage at each width of an axis."""
    whole = _whole(parent, axis, widths)
    if widths != (whole,) and axis not in set(curves.table["axis"]):
        raise InputError(f"width curves have nothing about {axis}, which the space cuts to {widths[0]}; "
                         "measure it, or leave the axis at the parent's width")
    damage = curves.damage(axis, metric, np.array(widths), whole)
    _check_finite(damage, f"width curve {axis}", metric)
    return damage


def _whole(parent: Architecture, axis: str, widths: tuple[int, ...]) -> int:
    """The parent's own width."""
    return int(parent.widest()[axis] or widths[-1])


def _check_finite(values: np.ndarray, what: str, metric: str) -> None:
    if not np.isfinite(values).all():
        raise CorruptArtifact(f"{what}: {int((~np.isfinite(values)).sum())} values of {metric} are not finite numbers; "
                              "score again")
