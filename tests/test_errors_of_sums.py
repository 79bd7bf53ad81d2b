"""Standard errors of predicted damage: layers share their samples, so that their errors go
together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from test_search import PARENT

from minipuzzle.core.scores import LayerScores
from minipuzzle.search.damage import Damage, predict
from minipuzzle.search.space import resolve_space

SPACE = resolve_space({"drop_mamba": [0, 3], "drop_ffn": [0, 2], "drop_attention": [0, 1]}, PARENT)
LAYERS = PARENT.num_layers


def measured(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(values [N, L], pairs [N, L, L]) of texts that are hard or easy for all layers alike."""
    rng = np.random.default_rng(seed)
    hard_N = rng.lognormal(0, 0.6, samples)
    values = hard_N[:, None] * np.linspace(1, 3, LAYERS) * rng.lognormal(0, 0.3, (samples, LAYERS))
    pairs = np.einsum("ni,nj->nij", values, values) ** 0.5 * 0.2 * hard_N[:, None, None]
    return values, pairs * (1 - np.eye(LAYERS))


def scores(values: np.ndarray, pairs: np.ndarray) -> LayerScores:
    known = ~np.isnan(values)
    table = pd.DataFrame({"layer": range(LAYERS), "kind": list(PARENT.pattern), "kl": np.nanmean(values, 0),
                          "kl_stderr": np.nanstd(values, 0, ddof=1) / known.sum(0) ** 0.5})
    return LayerScores(table, interactions={"kl": np.nanmean(pairs, 0)}, samples={"kl": values, "pairs_kl": pairs})


def damage(values: np.ndarray, pairs: np.ndarray, how: str) -> Damage:
    return predict(PARENT, SPACE, scores(values, pairs), None, "kl", how)


@pytest.mark.parametrize("how", ["additive", "quadratic"])
def test_errors_of_sums_are_those_of_a_bootstrap(how: str) -> None:
    values, pairs = measured(64, 0)
    found = damage(values, pairs, how)
    errors, rng = found.layers_stderr(SPACE), np.random.default_rng(1)
    again = []
    for _ in range(400):
        some = rng.integers(0, 64, 64)
        # the order in which layers go stays: it is the error of a sum, not of a choice
        resampled = dataclasses.replace(damage(values[some], pairs[some], how), orders=found.orders)
        again.append(resampled.layers(SPACE))
    expected = np.std(again, 0)
    assert errors is not None
    assert errors[0] == expected[0] == 0  # nothing goes
    np.testing.assert_allclose(errors[1:], expected[1:], rtol=0.15)
    alone = dataclasses.replace(found, values_NL=None).layers_stderr(SPACE)
    assert alone is not None
    assert errors[-1] > 1.5 * alone[-1]  # what it was when layers counted as independent


def test_errors_of_a_race() -> None:
    """Layers that are settled early have fewer samples: the error is that of the estimate over many
    races."""
    every, errors = [], []
    for seed in range(300):
        values, pairs = measured(64, 100 + seed)
        for first, layers in ((8, [0, 2]), (32, [4, 7])):
            values[first:, layers], pairs[first:, layers], pairs[first:, :, layers] = np.nan, np.nan, np.nan
        found = dataclasses.replace(damage(values, pairs, "quadratic"), orders=([0, 2, 4, 5], [1, 6], [3, 7]))
        every.append(found.layers(SPACE))
        errors.append(found.layers_stderr(SPACE))
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors), 0))[1:], np.std(every, 0)[1:], rtol=0.12)
