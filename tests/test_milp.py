"""The integer programs: against brute force, against the grid, and what they say when they
cannot."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WIDTH_AXES

from minipuzzle.core.budget import BUDGET_KEYS, Budget, Workload
from minipuzzle.core.errors import Infeasible, InputError
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.grid import search_architectures
from minipuzzle.search.milp import num_architectures, solve_architectures
from minipuzzle.search.space import resolve_space

PARENT = Architecture("M-M*-M-*", vocab_size=101, hidden_size=48, ffn_size=96, mamba_num_heads=8, mamba_head_dim=16,
                      n_groups=4, state_size=8, num_attention_heads=4, num_key_value_heads=1, head_dim=3)
FIG9 = Path(__file__).parent / "data" / "nemotron_h_56b_fig9_layer_mse.csv"


def ffn_sizes(arch):
    return tuple(arch.sizes(i)["ffn_size"] for i in arch.layers_of("-"))


def layer_scores(pattern, values):
    return LayerScores(pd.DataFrame({"layer": range(len(pattern)), "kind": list(pattern), "mse": values,
                                     "mse_stderr": [2.0] * len(pattern)}))


def limits_between(parent, space, workload, percents):
    """Limits so far (in percent; below 0: just too little) from the smallest of the space to the
    parent."""
    pattern = "".join(k * (parent.pattern.count(k) - drops[-1]) for k, drops in zip("M-*", space.drops.values(), strict=True))
    smallest = dataclasses.replace(parent, pattern=pattern, **{axis: space.widths[axis][0] for axis in WIDTH_AXES})
    least, most = cost(smallest, workload).to_json(), cost(parent, workload).to_json()
    limits = tuple((key, least[BUDGET_KEYS[key][0]] - 1 if percent < 0 else least[BUDGET_KEYS[key][0]] + percent * (
        most[BUDGET_KEYS[key][0]] - least[BUDGET_KEYS[key][0]]) // 100) for key, percent in percents.items())
    return Budget(limits, tuple((key, str(limit)) for key, limit in limits))


@st.composite
def problems(draw):
    """(parent, space, workload, scores, curves or None, per_layer); whole numbers, so that sums are
    exact."""
    pattern = "".join(draw(st.lists(st.sampled_from("M-*"), min_size=2, max_size=6)))
    parent = dataclasses.replace(PARENT, pattern=pattern, mlp_bias=draw(st.booleans()))
    drops = st.sampled_from([[0, 3], [0, 2, 2], [1, 1], 0, [0, 6]])
    wanted = {"drop_mamba": draw(drops), "drop_ffn": draw(drops), "drop_attention": [0, 1],
              "hidden_size": [draw(st.sampled_from([32, 48])), 48, 16],
              "ffn_size": [draw(st.sampled_from([24, 60, 96])), 96, draw(st.sampled_from([36, 25]))],
              "mamba_num_heads": [draw(st.sampled_from([4, 8])), 8]}
    try:
        space = resolve_space(wanted, parent)
    except InputError:  # a layer must go and there is none
        space = resolve_space(wanted | {"drop_mamba": [0, 1], "drop_ffn": [0, 1]}, parent)
    precisions = st.sampled_from(["bf16", "nvfp4"])
    weights = st.sampled_from(["bf16", "nvfp4", "int4"])
    workload = Workload(draw(weights), draw(precisions), "fp32", (), draw(st.integers(1, 99)), draw(st.integers(1, 3)))
    scores = layer_scores(pattern, [float(draw(st.integers(-1, 9))) for _ in pattern])
    slope, per_layer = draw(st.integers(-1, 3)), draw(st.booleans())
    curves = WidthCurves(pd.DataFrame([{"axis": axis, "width": width, "mse": float(slope * (getattr(parent, axis) - width))}
                                       for axis in WIDTH_AXES for width in space.widths[axis]]))
    return parent, space, workload, scores, curves if per_layer or draw(st.booleans()) else None, per_layer


def brute_force(parent, space, limits, workload, scores, curves, per_layer):
    """[(damage, -parameters, kept layers, architecture)] of every feasible choice of layers and
    widths."""
    mse, rows = scores.metric("mse"), []
    ffn_layers = parent.layers_of("-")
    matter = {i: max(mse[i], 0) for i in ffn_layers}
    if not any(matter.values()):
        matter = dict.fromkeys(ffn_layers, 1)
    total = sum(matter.values())

    def curve(axis, width):
        whole = getattr(parent, axis)
        return 0.0 if curves is None else float(curves.damage(axis, "mse", [width], whole)[0])

    for kept in itertools.product([True, False], repeat=parent.num_layers):
        layers = tuple(i for i, stays in enumerate(kept) if stays)
        gone = [sum(not kept[i] for i in parent.layers_of(kind)) for kind in "M-*"]
        if any(n not in drops for n, drops in zip(gone, space.drops.values(), strict=True)):
            continue
        narrow = [i for i in ffn_layers if kept[i]]
        own = list(itertools.product(space.widths["ffn_size"], repeat=len(narrow))) if per_layer else [
            (width,) * len(narrow) for width in space.widths["ffn_size"]]
        for (n, widths), hidden, heads in itertools.product(enumerate(own), space.widths["hidden_size"], space.widths["mamba_num_heads"]):
            uniform = space.widths["ffn_size"][n] if not per_layer else space.widths["ffn_size"][-1]
            arch = dataclasses.replace(parent.keep(layers), hidden_size=hidden, mamba_num_heads=heads,
                                       ffn_size=widths if per_layer and narrow else uniform)
            priced = cost(arch, workload)
            if any(getattr(priced, BUDGET_KEYS[key][0]) > limit for key, limit in limits.limits):
                continue
            damage = sum(mse[i] for i, stays in enumerate(kept) if not stays)
            damage += curve("hidden_size", hidden) + curve("mamba_num_heads", heads)
            if not per_layer:
                damage += curve("ffn_size", uniform)
            else:
                damage += sum(curve("ffn_size", width) * matter[i] / total
                              for i, width in zip(narrow, widths, strict=True))
            rows.append((damage, -priced.parameters, layers, arch))
    return sorted(rows, key=lambda row: row[:3])


@settings(max_examples=200, deadline=None)
@given(problems(), st.data())
def test_equals_brute_force(problem, data):
    parent, space, workload, scores, curves, per_layer = problem
    keys = data.draw(st.sets(st.sampled_from(sorted(BUDGET_KEYS)), min_size=1, max_size=3))
    limits = limits_between(parent, space, workload, {key: data.draw(st.integers(-2, 100)) for key in keys})
    expected = brute_force(parent, space, limits, workload, scores, curves, per_layer)
    if not expected:
        with pytest.raises(Infeasible):
            solve_architectures(parent, space, limits, workload, scores, curves, per_layer=per_layer)
        return
    keep = data.draw(st.integers(1, 12))
    found = solve_architectures(parent, space, limits, workload, scores, curves, keep=keep, per_layer=per_layer).candidates
    assert [c.name for c in found] == [f"c{i + 1:04d}" for i in range(len(found))]
    assert len(found) == min(keep, len(expected))
    np.testing.assert_allclose([c.predicted["damage"] for c in found], [row[0] for row in expected[:keep]], rtol=1e-9,
                               atol=1e-9)
    def key(kept_layers, arch):
        own = ffn_sizes(arch) if "-" in arch.pattern or per_layer else arch.ffn_size  # of no FFN layer
        return kept_layers, own, arch.hidden_size, arch.mamba_num_heads

    table = {key(row[2], row[3]): row for row in expected}
    assert len(table) == len(expected)
    assert len({key(c.kept_layers, c.architecture) for c in found}) == len(found)
    for c in found:
        damage, _, _, arch = table[key(c.kept_layers, c.architecture)]
        assert c.predicted["damage"] == pytest.approx(damage)
        assert (c.cost, c.architecture.pattern) == (cost(arch, workload), arch.pattern)
        assert not limits.exceeded(c.cost.to_json())
        assert c.predicted["layers_stderr"] == pytest.approx(2 * (parent.num_layers - len(c.kept_layers)) ** 0.5)
        assert (c.predicted["widths"] is None) == (curves is None)
    # ties go to more parameters, but for what two layers' places may weigh
    best = [-row[1] for row in expected if row[0] <= expected[0][0] + 1e-9]
    assert found[0].cost.parameters >= max(best) - 2e-3 * cost(parent, workload).parameters


@settings(max_examples=15, deadline=None)
@given(problems())
def test_uniform_is_never_worse_than_the_grid_and_as_good_at_its_best(problem):
    parent, space, workload, scores, curves, _ = problem
    limits = limits_between(parent, space, workload, {"memory": 60})
    grid = search_architectures(parent, space, limits, workload, scores, curves)
    solved = solve_architectures(parent, space, limits, workload, scores, curves, keep=5)
    assert solved.candidates[0].predicted["damage"] == pytest.approx(grid.candidates[0].predicted["damage"])
    for mine, theirs in zip(solved.candidates, grid.candidates, strict=False):
        assert mine.predicted["damage"] <= theirs.predicted["damage"] + 1e-9


# the 56B
# ----------------------------------------------------------------------------------------------


BIG = Architecture("M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-", vocab_size=131072, hidden_size=8192, ffn_size=32768,
                   mamba_num_heads=256, mamba_head_dim=64, n_groups=8, state_size=256, num_attention_heads=64,
                   num_key_value_heads=8, head_dim=128)
SERVED = Workload("nvfp4", "nvfp4", "fp32", context=1024**2)
WIDTHS = list(range(24576, 32769, 1024))


def search_56b(keep, per_layer, limit="31.7GiB", **spec):
    space = resolve_space({"drop_mamba": [0, 20], "drop_ffn": [0, 20], "drop_attention": [0, 9],
                           "ffn_size": [24576, 32768, 1024]} | spec, BIG)
    limits = Budget.parse({"memory": limit}, cost(BIG, SERVED).to_json())
    curves = WidthCurves(pd.DataFrame({"axis": "ffn_size", "width": WIDTHS,
                                       "mse": [0.6 * (1 - width / 32768) ** 1.3 for width in WIDTHS]}))
    return solve_architectures(BIG, space, limits, SERVED, LayerScores.read(FIG9), curves, keep=keep, per_layer=per_layer)


def test_the_56b_with_a_width_for_each_layer():
    uniform, own = search_56b(3, False), search_56b(3, True)
    for solved in (uniform, own):
        assert all(c.cost.memory_bytes <= 31.7 * 2**30 for c in solved.candidates)
        damage = [c.predicted["damage"] for c in solved.candidates]
        assert damage == sorted(damage)
        assert len({(c.kept_layers, ffn_sizes(c.architecture)) for c in solved.candidates}) == 3
    assert own.candidates[0].predicted["damage"] < 0.95 * uniform.candidates[0].predicted["damage"]
    first = own.candidates[0].architecture
    widths = dict(zip(first.layers_of("-"), ffn_sizes(first), strict=True))
    assert len(set(widths.values())) >= 3
    mse = LayerScores.read(FIG9).metric("mse")
    kept = [i for i in own.candidates[0].kept_layers if BIG.pattern[i] == "-"]
    by_score = [widths[place] for _, place in sorted(zip(mse[kept], widths, strict=True), key=lambda pair: pair[0])]
    assert by_score == sorted(by_score)  # who matters more is wider


def test_the_released_47b_is_a_solution_of_its_counts():
    released = {7, 29, 73, 79, 81, 83, 84, 85, 86, 87, 88, 89, 90, 91, 93, 95, 96, 97, 99, 101}
    solved = search_56b(2, False, drop_mamba=9, drop_ffn=6, drop_attention=5, ffn_size=30720)
    first, second = ({*range(118)} - {*c.kept_layers} for c in solved.candidates)
    assert first == released  # FFN 85 and 96 are both among the six, so that their tie does not matter
    assert len(second - first) == 1
    assert solved.candidates[0].cost.parameters == 46791554816


def least_damage_56b(limit):
    """The optimum with a width for each layer, by dynamic programming over (FFN layers dropped,
    neurons kept)."""
    mse, kinds = LayerScores.read(FIG9).metric("mse"), np.array(list(BIG.pattern))
    share, curve = mse / mse[kinds == "-"].sum(), [0.6 * (1 - width / 32768) ** 1.3 for width in WIDTHS]
    least = np.full((22, 54 * 32 + 33), np.inf)  # neurons in units of 1024; a row and 32 columns of room
    least[0, 0] = 0
    for layer in np.flatnonzero(kinds == "-"):
        options = [np.roll(least, 1, axis=0) + mse[layer]]
        options += [np.roll(least, width // 1024, axis=1) + share[layer] * curve[i] for i, width in enumerate(WIDTHS)]
        least = np.min(options, axis=0)
        least[21] = np.inf
    best = np.inf
    sums = {kind: np.concatenate([[0], np.cumsum(np.sort(mse[kinds == kind]))]) for kind in "M*"}
    for mamba, ffn, attention in itertools.product(range(21), range(21), range(10)):
        arch = dataclasses.replace(BIG, pattern="M" * (54 - mamba) + "-" * (54 - ffn) + "*" * (10 - attention))
        at_32, at_0 = (cost(dataclasses.replace(arch, ffn_size=width * 1024), SERVED).memory_bytes for width in (32, 16))
        layers, fits = 54 - ffn, -1
        if layers:  # memory is a line in the neurons
            each = (at_32 - at_0) / (16 * layers)
            fits = math.floor((limit - at_32) / each + 32 * layers + 1e-9)
        if fits >= 24 * layers:
            damage = least[ffn, : min(fits, 54 * 32) + 1].min() + sums["M"][mamba] + sums["*"][attention]
            best = min(best, damage)
    return best


@pytest.mark.parametrize("gib", [26, 29, 31.7, 36])
def test_the_56b_against_dynamic_programming(gib):
    found = search_56b(1, True, int(gib * 2**30)).candidates[0]
    assert found.predicted["damage"] == pytest.approx(least_damage_56b(int(gib * 2**30)), rel=1e-6)


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_byte_too_much_is_too_much(per_layer):
    """1 byte of 31.7 GiB."""
    best = search_56b(1, per_layer).candidates[0]
    exactly = search_56b(1, per_layer, best.cost.memory_bytes).candidates[0]
    assert (exactly.kept_layers, exactly.cost) == (best.kept_layers, best.cost)
    less = search_56b(1, per_layer, best.cost.memory_bytes - 1)
    assert less.candidates[0].cost.memory_bytes < best.cost.memory_bytes
    assert less.candidates[0].predicted["damage"] > best.predicted["damage"]
    if per_layer:
        assert less.candidates[0].predicted["damage"] == pytest.approx(least_damage_56b(best.cost.memory_bytes - 1), rel=1e-6)


# behaviour
# --------------------------------------------------------------------------------------------


def whole(parent=PARENT, **texts):
    return Budget.parse(texts, cost(parent, Workload()).to_json())


def test_of_equals_the_later_goes_and_the_number_of_architectures():
    space = resolve_space({"drop_mamba": 1, "drop_ffn": [0, 1], "ffn_size": [48, 96, 48]}, PARENT)
    solved = solve_architectures(PARENT, space, whole(params="1x"), Workload(), layer_scores(PARENT.pattern, [1.0] * 8),
                                 keep=3)
    assert [sorted({*range(8)} - {*c.kept_layers}) for c in solved.candidates] == [[5], [2], [0]]
    assert {c.architecture.ffn_size for c in solved.candidates} == {96}  # no curves: more parameters first
    assert solved.points == num_architectures(PARENT, space, False) == 3 * (1 + 3) * 2
    assert num_architectures(PARENT, space, True) == 3 * (2**3 + 3 * 2**2)


def test_a_cache_that_is_rounded_as_a_whole_loses_nothing():
    """3 layers of 3.375 bytes take 11, 2 take 7: more than two thirds of 11."""
    parent = dataclasses.replace(PARENT, pattern="M***")
    workload = Workload("bf16", "nvfp4", "fp32", (), 1, 1)
    space, scores = resolve_space({"drop_attention": [0, 1]}, parent), layer_scores("M***", [1.0] * 4)
    limits = limits_between(parent, space, workload, {"kv_cache": 0, "memory": 0})
    assert cost(dataclasses.replace(parent, pattern="**"), workload).kv_cache_bytes == dict(limits.limits)["kv_cache"] == 7
    solved = solve_architectures(parent, space, limits, workload, scores, keep=9)
    assert [c.kept_layers for c in solved.candidates] == [(0, 1, 2), (0, 1, 3), (0, 2, 3)]


def test_wrong_requests():
    space, scores = resolve_space({"ffn_size": [48, 96]}, PARENT), layer_scores(PARENT.pattern, [1.0] * 8)
    with pytest.raises(InputError, match="needs scores"):
        solve_architectures(PARENT, space, whole(params="1x"), Workload(), None)
    with pytest.raises(InputError, match="needs width curves"):
        solve_architectures(PARENT, space, whole(params="1x"), Workload(), scores, per_layer=True)
    with pytest.raises(InputError, match="at least 1"):
        solve_architectures(PARENT, space, whole(params="1x"), Workload(), scores, keep=0)
    with pytest.raises(Infeasible, match="Raise the budget to at least params="):
        solve_architectures(PARENT, space, whole(params="10"), Workload(), scores)


def test_widths_too_many_for_the_tables_are_refused_at_once():
    with pytest.raises(InputError, match="24577 widths for 54 layers"):
        search_56b(1, True, ffn_size=[8192, 32768, 1])
