"""What cuts do together: the prediction is what was measured, at every point that was."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_space

from minipuzzle.core.budget import Budget, Workload
from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.damage import predict
from minipuzzle.search.grid import search_architectures
from minipuzzle.search.together import design

PARENT = Architecture("M-M*-MM-M-*M-M-*", vocab_size=101, hidden_size=48, ffn_size=96,
                      mamba_num_heads=8, mamba_head_dim=16, n_groups=4, state_size=8,
                      num_attention_heads=4, num_key_value_heads=1, head_dim=3)
SPACE = make_space((0, 1, 2, 3, 4), (0, 1, 2), (0, 1), (24, 32, 40, 48), (32, 64, 96), (4, 8), (16,))
RANDOM = np.random.default_rng(0)
SCORES = LayerScores(pd.DataFrame({"layer": range(PARENT.num_layers), "kind": list(PARENT.pattern),
                                   "mse": RANDOM.uniform(0.1, 1, PARENT.num_layers)}))


def alone(axis, width):
    whole = PARENT.sizes()[axis]
    return {"hidden_size": 3, "ffn_size": 1, "mamba_num_heads": 2}[axis] * (whole - width) / whole


def curves_of(answer, drop_row=None):
    """Curves and a table of combinations; `answer(drops, widths)` is what was measured."""
    rows = [{"axis": axis, "width": width, "mse": alone(axis, width)}
            for axis, values in SPACE.widths.items() for width in values
            if width != PARENT.sizes()[axis]]
    plan = design(PARENT, SPACE)
    orders = predict(PARENT, SPACE, SCORES, None, "mse").orders
    table = [row | {"mse": answer(point.drops, point.widths)}
             for point, (row, _, _) in zip(plan.points, plan.targets(PARENT, orders), strict=True)]
    if drop_row is not None:
        del table[drop_row]
    return WidthCurves(pd.DataFrame(rows), pd.DataFrame(table)), plan


def predicted_at(damage, drops, widths):
    """As the search adds it up."""
    widths = dict(widths)
    index = np.array([[values.index(widths.get(axis, PARENT.sizes()[axis]))
                       for axis, values in SPACE.widths.items()]])
    at = list(itertools.product(*SPACE.drops.values())).index(tuple(drops))
    layers_C = damage.layers(SPACE)
    total = layers_C[at] + damage.widths(index)[0]
    both = damage.interplay(layers_C, index)
    return total if both is None else total + float(both[0][at] @ both[1][:, 0])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_every_measured_combination_is_predicted_as_measured(seed):
    def answer(drops, widths):
        if len(widths) == 1 and not any(drops):
            return alone(*widths[0])
        noise = np.random.default_rng([seed, *drops, *(w for _, w in widths)]).uniform(0.5, 2)
        return noise * (sum(drops) + sum(alone(*w) for w in widths))

    curves, plan = curves_of(answer)
    if answer(plan.parts["layers"][0].drops, ()) >= answer(plan.parts["layers"][1].drops, ()):
        return  # the weaker strength does more: it is left out, and its pairs with it
    damage = predict(PARENT, SPACE, SCORES, curves, "mse")
    assert damage.together is not None
    assert len(plan.points) > 30
    for point in plan.points:
        found = predicted_at(damage, point.drops, point.widths)
        assert found == pytest.approx(answer(point.drops, point.widths), rel=1e-9), point


def test_cuts_that_only_add_up_are_predicted_as_before():
    sums = predict(PARENT, SPACE, SCORES, None, "mse")
    layers_C = dict(zip(itertools.product(*SPACE.drops.values()), sums.layers(SPACE), strict=True))
    curves, _ = curves_of(lambda drops, widths: layers_C[drops] + sum(alone(*w) for w in widths))
    with_it, without = (predict(PARENT, SPACE, SCORES, c, "mse")
                        for c in (curves, dataclasses.replace(curves, together=None)))
    assert with_it.together is not None
    for drops in layers_C:
        for widths in ((), (("hidden_size", 32), ("ffn_size", 64)), (("mamba_num_heads", 4),)):
            assert predicted_at(with_it, drops, widths) == pytest.approx(
                predicted_at(without, drops, widths))


def test_the_search_ranks_by_the_whole_of_it():
    def answer(drops, widths):
        return (sum(drops) + sum(alone(*w) for w in widths)) ** 1.5

    curves, _ = curves_of(answer)
    damage = predict(PARENT, SPACE, SCORES, curves, "mse")
    workload = Workload()
    budget = Budget.parse({"memory": "0.7x"}, cost(PARENT, workload).to_json())
    found = search_architectures(PARENT, SPACE, budget, workload, SCORES, curves, "mse", keep=50)
    whole = PARENT.sizes()
    for c in found.candidates:
        drops = tuple(len(PARENT.layers_of(unit)) - c.architecture.pattern.count(unit)
                      for unit in PARENT.drops.values())
        widths = [(axis, c.architecture.sizes()[axis]) for axis in SPACE.widths
                  if c.architecture.sizes()[axis] != whole[axis]]
        assert c.predicted["damage"] == pytest.approx(predicted_at(damage, drops, widths))
        parts = [c.predicted[part] for part in ("layers", "widths", "together")]
        assert c.predicted["damage"] == pytest.approx(sum(parts))
    order = [c.predicted["damage"] for c in found.candidates]
    assert order == sorted(order)
    assert any(c.predicted["together"] > 0.1 for c in found.candidates)


def test_combinations_of_other_layers_are_not_used():
    """Another metric lets other layers go first; what was measured is of those that it was
    measured for."""
    curves, _ = curves_of(lambda drops, widths: sum(drops) + 1.0)
    reversed_ = LayerScores(SCORES.table.assign(mse=1 / SCORES.table["mse"]))
    assert predict(PARENT, SPACE, SCORES, curves, "mse").together is not None
    assert predict(PARENT, SPACE, reversed_, curves, "mse").together is None
    assert predict(PARENT, SPACE, SCORES, curves, "mse", "additive").together is None


def test_a_table_that_lacks_a_row_is_damaged():
    curves, plan = curves_of(lambda drops, widths: sum(drops) + len(widths) + 1.0, drop_row=3)
    assert not plan.points[3].widths
    with pytest.raises(CorruptArtifact, match="lacks Point"):
        predict(PARENT, SPACE, SCORES, curves, "mse")


@pytest.mark.parametrize("drops", [((2,), (1,), (0,)), ((0, 2), (1,), (1,)), ((0,), (0,), (0,)), ((1, 2), (0, 1), (1,))])
def test_ranges_that_begin_above_none_or_are_one_number(drops):
    space = make_space(*drops, (32, 48), (96,), (4, 8), (16,))
    plan, orders = design(PARENT, space), predict(PARENT, space, SCORES, None, "mse").orders
    rows = [row | {"mse": sum(p.drops) + sum(alone(*w) for w in p.widths) + len(p.widths) * any(p.drops)}
            for p, (row, _, _) in zip(plan.points, plan.targets(PARENT, orders), strict=True)]
    singles = [{"axis": a, "width": w, "mse": alone(a, w)} for a, w in (("hidden_size", 32), ("mamba_num_heads", 4))]
    curves = WidthCurves(pd.DataFrame(singles), pd.DataFrame(rows))
    damage = predict(PARENT, space, SCORES, curves, "mse")
    assert damage.together is not None
    for at, counts in enumerate(itertools.product(*space.drops.values())):
        assert damage.layers(space)[at] == pytest.approx(sum(counts))


def test_written_and_read_it_is_the_same(tmp_path):
    curves, _ = curves_of(lambda drops, widths: sum(drops) + len(widths) + 1.0)
    curves.write(tmp_path / "width_curves.csv")
    again = WidthCurves.read(tmp_path / "width_curves.csv")
    assert again.together is not None
    a, b = (predict(PARENT, SPACE, SCORES, c, "mse") for c in (curves, again))
    assert np.array_equal(a.layers(SPACE), b.layers(SPACE))
    (tmp_path / "together.csv").write_text("mse\n1\n")
    with pytest.raises(CorruptArtifact, match="needs the columns dropped"):
        WidthCurves.read(tmp_path / "width_curves.csv")
