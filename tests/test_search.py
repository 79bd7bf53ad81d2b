"""The search: against brute force, against the published 56B -> 47B, and what it says when nothing
fits."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WIDTH_AXES, make_space

from minipuzzle.core.budget import BUDGET_KEYS, Budget, Workload
from minipuzzle.core.errors import CorruptArtifact, Infeasible, InputError
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.search import grid
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.damage import drop_order
from minipuzzle.search.grid import search_architectures
from minipuzzle.search.infeasible import round_up
from minipuzzle.search.prices import IN_EIGHTHS, prices, timed
from minipuzzle.search.rank import diverse, rank, rank_correlation
from minipuzzle.search.space import resolve_space

PARENT = Architecture("M-M*-MM-*", vocab_size=101, hidden_size=48, ffn_size=96, mamba_num_heads=8, mamba_head_dim=16,
                      n_groups=4, state_size=8, num_attention_heads=4, num_key_value_heads=1, head_dim=3)
BIG = Architecture("M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-", vocab_size=131072, hidden_size=8192, ffn_size=32768,
                   mamba_num_heads=256, mamba_head_dim=64, n_groups=8, state_size=256, num_attention_heads=64,
                   num_key_value_heads=8, head_dim=128)
RELEASED_47B = {7, 29, 73, 79, 81, 83, 84, 85, 86, 87, 88, 89, 90, 91, 93, 95, 96, 97, 99, 101}
# arXiv:2504.03624, figure 11
CANDIDATE_2 = {7, 29, 73, 84, 95} | {77, 79, 81, 83, 86, 88, 90, 97, 99, 101} | {87, 89, 91, 93, 96}
FIG9 = Path(__file__).parent / "data" / "nemotron_h_56b_fig9_layer_mse.csv"


def budget(parent=PARENT, workload=None, **texts):
    return Budget.parse(texts, cost(parent, workload or Workload(device="h100")).to_json())


def between(parent, space, workload, percents):
    """Limits so far (0 to 100 %, or just below 0) from the smallest architecture of the space to
    the parent."""
    pattern = "".join(k * (parent.pattern.count(k) - drops[-1]) for k, drops in zip("M-*", space.drops.values(), strict=True))
    smallest = dataclasses.replace(parent, pattern=pattern, **{axis: space.widths[axis][0] for axis in WIDTH_AXES})
    least, most = cost(smallest, workload).to_json(), cost(parent, workload).to_json()
    limits = []
    for key, percent in percents.items():
        name = BUDGET_KEYS[key][0]
        limits.append((key, least[name] - 1 if percent < 0 else
                       least[name] + percent * (most[name] - least[name]) // 100))
    return Budget(tuple(limits), tuple((key, str(limit)) for key, limit in limits))


def layer_scores(pattern, values):
    return LayerScores(pd.DataFrame({"layer": range(len(pattern)), "kind": list(pattern), "mse": values,
                                     "mse_stderr": [2.0] * len(pattern)}))


def width_curves(space, parent, slope=1):
    """Whole numbers at every width of the space, so that sums of floats are exact whatever their
    order."""
    return WidthCurves(pd.DataFrame([
        {"axis": axis, "width": width, "mse": float(slope * (getattr(parent, axis) - width))}
        for axis in WIDTH_AXES for width in space.widths[axis]]))


def brute_force(parent, space, limits, workload, scores, curves):
    """[(damage, parameters, kept layers, widths)] of all feasible points in order, written
    plainly."""
    rows = []
    mse = scores.metric("mse")
    for number, point in enumerate(itertools.product(*space.drops.values(), *space.widths.values())):
        dropped = set()
        for kind, count in zip("M-*", point[:3], strict=True):
            dropped |= set(sorted(parent.layers_of(kind), key=lambda i: (mse[i], -i))[:count])
        kept = tuple(i for i in range(parent.num_layers) if i not in dropped)
        arch = dataclasses.replace(parent.keep(kept), **dict(zip(WIDTH_AXES, point[3:], strict=True)))
        priced = cost(arch, workload)
        if all(getattr(priced, BUDGET_KEYS[key][0]) <= limit for key, limit in limits.limits):
            damage = sum(mse[i] for i in dropped)
            if curves is not None:
                damage += sum(float(curves.damage(axis, "mse", [width], getattr(parent, axis))[0])
                              for axis, width in zip(WIDTH_AXES, point[3:], strict=True))
            rows.append((damage, -priced.parameters, number, kept, point[3:]))
    return [(damage, -params, kept, widths) for damage, params, _, kept, widths in sorted(rows)]


@st.composite
def problems(draw):
    """(parent, space, workload, scores, curves or None); few distinct scores, so that ties are
    common."""
    pattern = "".join(draw(st.lists(st.sampled_from("M-*"), min_size=2, max_size=8)))
    parent = dataclasses.replace(PARENT, pattern=pattern, conv_bias=draw(st.booleans()), use_bias=draw(st.booleans()),
                                 mlp_bias=draw(st.booleans()), attention_bias=draw(st.booleans()))
    spec = {"drop_mamba": [0, draw(st.integers(0, 3))], "drop_ffn": [0, draw(st.integers(0, 2))],
            "drop_attention": [0, 1], "hidden_size": [draw(st.integers(17, 47)), 48, 16],
            "ffn_size": [draw(st.integers(1, 96)), 96, 37], "mamba_num_heads": [4, 8], "mamba_head_dim": [5, 16, 6]}
    precisions = st.sampled_from(["bf16", "fp8", "nvfp4"])
    weights = st.sampled_from(["bf16", "fp8", "nvfp4", "int4"])
    workload = Workload(draw(weights), draw(precisions), draw(st.sampled_from(["fp32", "bf16"])),
                        tuple(draw(st.sets(st.sampled_from(["embedding", "lm_head", "ffn"])))),
                        draw(st.integers(2, 99)), draw(st.integers(1, 3)), draw(st.sampled_from(["ideal", "vllm"])),
                        draw(st.sampled_from(["h100", "rtx4090"])))
    scores = layer_scores(pattern, [float(draw(st.integers(0, 3))) for _ in pattern])
    space = resolve_space(spec, parent)
    return parent, space, workload, scores, width_curves(space, parent) if draw(st.booleans()) else None


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_equals_brute_force(problem, data):
    parent, space, workload, scores, curves = problem
    keys = data.draw(st.sets(st.sampled_from(sorted(BUDGET_KEYS)), min_size=1))
    limits = between(parent, space, workload, {key: data.draw(st.integers(-2, 100)) for key in keys})
    expected = brute_force(parent, space, limits, workload, scores, curves)
    if not expected:
        with pytest.raises(Infeasible):
            search_architectures(parent, space, limits, workload, scores, curves)
        return
    keep = data.draw(st.integers(1, len(expected) + 1))
    with mock.patch.object(grid, "CHUNK", data.draw(st.sampled_from([1, 5, 64, 2**20]))):  # points at once
        result = search_architectures(parent, space, limits, workload, scores, curves, keep=keep)
    assert (result.points, result.feasible) == (space.num_points, len(expected))
    assert len(result.candidates) == min(keep, len(expected)) >= 1
    found = [(c.predicted["damage"], c.cost.parameters, c.kept_layers,
              tuple(getattr(c.architecture, axis) for axis in WIDTH_AXES)) for c in result.candidates]
    assert found == expected[:keep]
    for c in result.candidates:
        dropped = parent.num_layers - len(c.kept_layers)
        assert c.cost == cost(c.architecture, workload)
        assert c.architecture.pattern == "".join(parent.pattern[i] for i in c.kept_layers)
        assert c.predicted["layers_stderr"] == pytest.approx(2.0 * dropped**0.5)
        assert c.predicted["widths_stderr"] is None  # these curves come without errors
        assert (c.predicted["widths"] is None) == (curves is None)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_grid_prices_are_the_exact_costs(problem):
    """Every budget key at every point, also those that no limit of another test touches."""
    parent, space, workload, _, _ = problem
    widths = list(itertools.product(*space.widths.values()))
    lines = {key: line for of in (prices, timed)
             for key, line in of(parent, workload, dict(zip(WIDTH_AXES, np.array(widths).T, strict=True))).items()}
    counts = [[parent.pattern.count(kind) - n for kind, n in zip("M-*", drops, strict=True)]
              for drops in itertools.product(*space.drops.values())]
    checked = 0
    for key, (name, _) in BUDGET_KEYS.items():
        grid = -(-lines[key].grid(np.array(counts)) // IN_EIGHTHS.get(key, 1))
        for (c, count), (w, width) in itertools.product(enumerate(counts), list(enumerate(widths))[::3]):
            pattern = "".join(kind * n for kind, n in zip("M-*", count, strict=True))
            arch = dataclasses.replace(parent, pattern=pattern, **dict(zip(WIDTH_AXES, width, strict=True)))
            assert grid[c, w] == getattr(cost(arch, workload), name), (key, arch)
            checked += 1
    assert checked == len(BUDGET_KEYS) * len(counts) * -(-len(widths) // 3) > 0


@settings(max_examples=20, deadline=None)
@given(problems(), st.integers(0, 100), st.integers(0, 40))
def test_more_budget_is_never_worse(problem, percent, more):
    parent, space, workload, scores, curves = problem
    tight, loose = (search_architectures(parent, space, between(parent, space, workload, {"memory": p}), workload,
                                         scores, curves) for p in (percent, percent + more))
    assert tight.feasible >= 1
    assert loose.feasible >= tight.feasible
    assert loose.candidates[0].predicted["damage"] <= tight.candidates[0].predicted["damage"]


# the published 56B -> 47B
# -----------------------------------------------------------------------------


def dropped_56b(mamba, ffn, attention):
    mse = LayerScores.read(FIG9).metric("mse")
    return {i for kind, n in (("M", mamba), ("-", ffn), ("*", attention)) for i in drop_order(BIG, kind, mse)[:n]}


def test_published_scores_give_the_published_layers():
    assert len(LayerScores.read(FIG9).table) == BIG.num_layers == 118
    assert dropped_56b(10, 5, 5) == CANDIDATE_2
    assert dropped_56b(9, 6, 5) == RELEASED_47B


def test_search_finds_the_released_47b():
    workload = Workload("nvfp4", "nvfp4", "fp32", context=1024**2)
    spec = {"drop_mamba": [6, 12], "drop_ffn": [3, 8], "drop_attention": [4, 6], "ffn_size": [24576, 32768, 1024]}
    space = resolve_space(spec, BIG)
    assert space.num_points == 7 * 6 * 3 * 9
    limits = budget(BIG, workload, memory="31.7GiB")
    scores = LayerScores.read(FIG9)
    result = search_architectures(BIG, space, limits, workload, scores)
    assert len(result.candidates) == result.feasible
    assert all(c.cost.memory_bytes <= 31.7 * 2**30 for c in result.candidates)
    hits = [c for c in result.candidates
            if set(range(118)) - set(c.kept_layers) == RELEASED_47B and c.architecture.ffn_size == 30720]
    assert len(hits) == 1
    assert hits[0].cost.parameters == 46791554816
    mse = scores.metric("mse")
    assert hits[0].predicted["damage"] == pytest.approx(mse[sorted(RELEASED_47B)].sum(), rel=1e-12)
    assert (hits[0].predicted["widths"], hits[0].predicted["layers_stderr"]) == (None, None)
    json.dumps([c.to_json() for c in result.candidates], allow_nan=False)


# behaviour
# --------------------------------------------------------------------------------------------


def test_without_scores_the_largest_come_first_and_the_middle_goes():
    space = resolve_space({"drop_mamba": [0, 2], "hidden_size": [16, 48, 16]}, PARENT)
    result = search_architectures(PARENT, space, budget(params="1x"), Workload(), keep=7)
    assert result.feasible == 9
    assert len(result.candidates) == 7
    sizes = [c.cost.parameters for c in result.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert all(set(c.predicted.values()) == {None} for c in result.candidates)
    assert [c.name for c in result.candidates] == [f"c000{i}" for i in range(1, 8)]
    assert drop_order(PARENT, "M", None) == [5, 6, 2, 0]  # of M-M*-MM-*, whose middle is layer 4


def test_only_curves_known():
    space = resolve_space({"hidden_size": [16, 48, 16], "drop_ffn": 1}, PARENT)
    result = search_architectures(PARENT, space, budget(params="1x"), Workload(), None, width_curves(space, PARENT))
    assert [(c.predicted["layers"], c.predicted["damage"]) for c in result.candidates] == [
        (None, 0.0), (None, 16.0), (None, 32.0)]


def test_ties_go_to_more_parameters_then_to_the_place_in_the_space():
    space = resolve_space({"drop_mamba": [0, 1], "mamba_num_heads": [4, 8, 4], "mamba_head_dim": [8, 16, 8]}, PARENT)
    results = [search_architectures(PARENT, space, budget(params="1x"), Workload(),
                                    layer_scores(PARENT.pattern, [0.0] * 9), keep=k) for k in (8, 5, 5)]
    assert {c.predicted["damage"] for c in results[0].candidates} == {0.0}
    sizes = [c.cost.parameters for c in results[0].candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 8
    assert results[1] == results[2]
    assert results[1].candidates == results[0].candidates[:5]


def test_ten_million_points():
    parent = dataclasses.replace(BIG, vocab_size=1000, hidden_size=256, ffn_size=1024, mamba_num_heads=32)
    spec = {"drop_mamba": [0, 20], "drop_ffn": [0, 20], "drop_attention": [0, 9], "hidden_size": [64, 256, 32],
            "ffn_size": [64, 1024, 64], "mamba_num_heads": [8, 32, 8], "mamba_head_dim": [16, 64, 16]}
    space = resolve_space(spec, parent)
    assert space.num_points == 21 * 21 * 10 * 7 * 16 * 4 * 4
    result = search_architectures(parent, space, budget(parent, memory="0.5x", params="0.55x"), Workload(),
                                  LayerScores.read(FIG9), width_curves(space, parent, 1e-4), keep=200)
    assert 200 < result.feasible < result.points == space.num_points
    damage = [c.predicted["damage"] for c in result.candidates]
    assert len(damage) == 200
    assert damage == sorted(damage)


# what cannot be done
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [
    {"memory": "10KiB"}, {"params": "0.01x"}, {"kv_cache": "1 B"}, {"flops_per_token": "10k", "memory": "1x"},
    {"memory": "1KiB", "params": "7", "active_params": "1k"}])
def test_infeasible_names_a_budget_that_is_feasible(texts):
    space = resolve_space({"drop_mamba": [0, 2], "drop_attention": [0, 1], "hidden_size": [16, 48, 16]}, PARENT)
    with pytest.raises(Infeasible) as error:
        search_architectures(PARENT, space, budget(**texts), Workload())
    message = str(error.value)
    assert "\n" not in message
    named = dict(re.findall(r"(\w+)=(\S+?)(?=[ ,])", message.split("at least")[1]))
    assert set(named) == {key for key, text in texts.items() if text != "1x"}
    again = search_architectures(PARENT, space, budget(**(texts | named)), Workload())
    assert again.feasible >= 1
    least = cost(search_architectures(PARENT, space, budget(params="1x"), Workload()).candidates[-1].architecture,
                 Workload()).to_json()
    for key, text in named.items():  # and it is the tightest, to four digits
        exact = least[BUDGET_KEYS[key][0]]
        assert exact <= dict(budget(**{key: text}).limits)[key] <= exact * 1.001 + 1


def test_infeasible_advice_helps_or_says_that_no_space_does():
    narrow = resolve_space({"drop_mamba": [0, 1]}, PARENT)
    with pytest.raises(Infeasible, match=r"widen the space, e.g. space.hidden_size down to 24 \(then memory "):
        search_architectures(PARENT, narrow, budget(memory="0.1x"), Workload())
    one_left = resolve_space({"drop_attention": [0, 9]}, PARENT)
    assert one_left.drops["drop_attention"] == (0, 1)
    with pytest.raises(Infeasible, match="shorter context"):
        search_architectures(PARENT, one_left, budget(kv_cache="0.1x"), Workload())


@given(st.sampled_from(sorted(BUDGET_KEYS)), st.integers(1, 10**14))
def test_round_up_reads_back_as_at_least_as_much(key, value):
    limit = dict(budget(**{key: round_up(key, value)}).limits)[key]
    assert value <= limit <= value * 1.0011 + 1


@pytest.mark.parametrize(("column", "change"), [
    ("kl", ""), ("kl", "none"), ("order", 9), ("order", "first"), ("mse_stderr", "none"), ("note", "a word")])
def test_a_column_that_is_not_asked_for_is_ignored(tmp_path, column, change):
    """Another's `order` too, which is not the one that iterative scoring writes."""
    rows = [{"layer": i, "kind": kind, "mse": i + 0.5} for i, kind in enumerate(PARENT.pattern)]
    space, limits = resolve_space({"drop_ffn": [0, 2]}, PARENT), budget(params="1x")
    found = []
    for extra in ({}, {column: change}):
        pd.DataFrame([row | extra for row in rows[:1]] + [row | dict.fromkeys(extra, 1) for row in rows[1:]]).to_csv(
            tmp_path / "given.csv", index=False)
        found.append(search_architectures(PARENT, space, limits, Workload(), LayerScores.read(tmp_path / "given.csv")))
    assert [c.kept_layers for c in found[0].candidates] == [c.kept_layers for c in found[1].candidates]
    assert len(found[1].candidates) == 3


@pytest.mark.parametrize(("line", "match"), [("0,,1", "layer 0 has no kind"), ("0,M,", "1 values of mse are not finite"),
                                             ("0,M,high", "1 values of mse are not finite")])
def test_a_damaged_score_file(tmp_path, line, match):
    text = "\n".join(["layer,kind,mse", line, *(f"{i},{kind},1" for i, kind in enumerate(PARENT.pattern) if i)])
    (tmp_path / "given.csv").write_text(text)
    with pytest.raises(CorruptArtifact, match=match):
        search_architectures(PARENT, resolve_space({}, PARENT), budget(params="1x"), Workload(),
                             LayerScores.read(tmp_path / "given.csv"))


def test_wrong_requests():
    space, limits = resolve_space({"hidden_size": [16, 48]}, PARENT), budget(params="1x")
    good = layer_scores(PARENT.pattern, [1.0] * 9)
    with pytest.raises(InputError, match="another model"):
        search_architectures(PARENT, space, limits, Workload(), layer_scores("M-M", [1.0] * 3))
    with pytest.raises(InputError, match="no column 'kl'"):
        search_architectures(PARENT, space, limits, Workload(), good, metric="kl")
    with pytest.raises(CorruptArtifact, match="1 values of mse are not finite"):
        search_architectures(PARENT, space, limits, Workload(), layer_scores(PARENT.pattern, [np.nan] + [1.0] * 8))
    curves = width_curves(space, PARENT)
    for table, match in ((curves.table.drop(columns="mse"), "no column 'mse'"),
                         (curves.table[curves.table["axis"] != "hidden_size"], "nothing about hidden_size")):
        with pytest.raises(InputError, match=match):
            search_architectures(PARENT, space, limits, Workload(), good, WidthCurves(table))
    with pytest.raises(InputError, match="lower context or batch"):
        search_architectures(PARENT, space, limits, Workload(context=10**17))
    with pytest.raises(InputError, match="larger steps"):
        search_architectures(BIG, resolve_space({"hidden_size": [1, "1x", 1], "ffn_size": [1, "1x", 1],
                                                 "drop_mamba": [0, 9]}, BIG), limits, Workload())
    with pytest.raises(InputError, match="at least 1"):
        search_architectures(PARENT, space, limits, Workload(), keep=0)


# the space
# --------------------------------------------------------------------------------------------


def test_space_resolves_against_the_parent():
    own = resolve_space({}, BIG)
    assert own == make_space((0,), (0,), (0,), (8192,), (32768,), (256,), (64,))
    assert resolve_space(dict.fromkeys(own.to_json()), BIG) == own
    space = resolve_space({
        "drop_mamba": [0, "0.1x", 2],         # 54 layers: 5.4 is floored, and 5 is in though 2 does not reach it
        "drop_ffn": 3, "drop_attention": [8, 99],  # 10 layers, of which one stays
        "hidden_size": ["0.5x", "1x", "0.25x"], "ffn_size": ["0.9x", "1x", 2048],
        "mamba_num_heads": ["0.51x", "1x", "0.25x"], "mamba_head_dim": ["0.6x", "1x"]}, BIG)
    assert space == make_space((0, 2, 4, 5), (3,), (8, 9), (4096, 6144, 8192), (29504, 31552, 32768),
                          (128, 192, 256), (40, 48, 56, 64))
    assert space.num_points == 4 * 2 * 3 * 3 * 3 * 4
    assert json.loads(json.dumps(space.to_json()))["drop_attention"] == [8, 9]
    assert resolve_space({"hidden_size": [17, 40, "1x"]}, PARENT).widths["hidden_size"] == (17, 40)  # exactly as asked
    assert resolve_space({"drop_attention": [0, 1]}, dataclasses.replace(PARENT, pattern="M-")).drops["drop_attention"] == (0,)
    assert resolve_space({"ffn_size": [8, 96]}, dataclasses.replace(PARENT, pattern="MM*")).widths["ffn_size"] == (96,)
    no_attention = dataclasses.replace(PARENT, pattern="M-M")
    assert resolve_space({"drop_mamba": [0, 9], "drop_ffn": [0, 9]}, no_attention).drops == {
        "drop_mamba": (0, 1), "drop_ffn": (0, 1), "drop_attention": (0,)}


@given(st.sampled_from(WIDTH_AXES), st.integers(1, 100), st.integers(1, 100), st.integers(1, 100))
def test_relative_ranges_are_valid_widths_and_hold_the_parent(axis, low, step, whole):
    parent = dataclasses.replace(PARENT, hidden_size=whole * 31, ffn_size=whole * 77, mamba_num_heads=whole * 4,
                                 mamba_head_dim=whole)
    values = resolve_space({axis: [f"{low / 100}x", "1x", f"{step / 100}x"]}, parent).widths[axis]
    assert values[-1] == getattr(parent, axis)
    assert values[0] >= 1
    assert all(value % 4 == 0 for value in values if axis == "mamba_num_heads")


@pytest.mark.parametrize(("spec", "match"), [
    ({"width": 3}, "unknown axis width"),
    ({"hidden_size": [16, 49]}, "49 is above the parent's 48"),
    ({"hidden_size": [0, 48]}, "0 is below the least, 1"),
    ({"hidden_size": [40, 32]}, "low 40 is above high 32"),
    ({"hidden_size": [16, 48, 0]}, "step 0 must be at least 1"),
    ({"hidden_size": [16]}, r"write a number, \[low, high\]"),
    ({"hidden_size": [16, 32, 8, 8]}, r"write a number, \[low, high\]"),
    ({"hidden_size": "1.5x"}, "72 is above the parent's 48"),
    ({"hidden_size": "half"}, "'half' is neither an integer"),
    ({"hidden_size": 16.5}, "16.5 is neither an integer"),
    ({"hidden_size": True}, "True is neither an integer"),
    ({"mamba_num_heads": [4, 8, 2]}, "6 is not a multiple of n_groups 4"),
    ({"mamba_num_heads": 2}, "2 is below the least, 4"),
    ({"drop_mamba": [-1, 2]}, "-1 is below the least, 0"),
    ({"drop_mamba": [5, 9]}, "cannot drop 5, at most 4 of the parent's 4 mamba"),
    ({"drop_attention": 2}, "cannot drop 2, at most 1 of the parent's 2 attention layers may go")])
def test_space_errors_have_the_numbers(spec, match):
    with pytest.raises(InputError, match=match):
        resolve_space(spec, PARENT)


def test_space_needs_one_ffn_width():
    with pytest.raises(InputError, match="same FFN width"):
        resolve_space({}, dataclasses.replace(PARENT, ffn_size=(96, 64, 96)))


# ranking
# ----------------------------------------------------------------------------------------------


def candidate(name, damage=None, kl=None, loss=None, hidden=48):
    arch = dataclasses.replace(PARENT, hidden_size=hidden)
    return Candidate(name, arch, tuple(range(9)), cost(arch, Workload()), {"damage": damage},
                     None if kl is None else {"kl": kl}, None if loss is None else {"loss": loss})


def test_rank_trusts_what_was_measured_last():
    expected = [candidate("a", 9, 9, 1.0), candidate("b", 0, 0, 2.0), candidate("n", 0, 0, float("nan")),
                candidate("d", 7, 0.1), candidate("c", 1, 0.2), candidate("g", 1, float("nan")),
                candidate("e", 0.5), candidate("h", 0.5), candidate("f", 3), candidate("i"), candidate("j")]
    for order in (expected[::-1], expected[5:] + expected[:5]):
        assert [c.name for c in rank(order)] == [c.name for c in expected]


def test_rank_correlation():
    pairs = [(1, 10), (2, 20), (3, 40), (4, 30)]
    some = [candidate(str(i), damage, kl) for i, (damage, kl) in enumerate(pairs)]
    unknown = [candidate("x"), candidate("y", None, 1.0), candidate("z", 1.0), candidate("n", 5.0, float("nan"))]
    assert rank_correlation(some + unknown) == pytest.approx(0.8)  # 1 - 6 (1 + 1) / (4 (16 - 1))
    assert rank_correlation(some[:2] + unknown) is None
    assert rank_correlation([candidate(str(i), 1.0, float(i)) for i in range(5)]) is None
    assert rank_correlation(some, "accuracy") is None


def test_diverse_caps_each_shape_and_keeps_the_best():
    twins = [candidate(f"t{i:02d}", float(i)) for i in range(40)]
    others = [candidate(f"o{i}", 100.0 + i, hidden=8 + i) for i in range(20)]
    chosen = diverse(others + twins, 16)
    assert [c.name for c in chosen] == ["t00", "t01"] + [f"o{i}" for i in range(14)]
    assert chosen[0] is rank(others + twins)[0]
    assert [c.name for c in diverse(twins, 16)] == [f"t{i:02d}" for i in range(16)]  # one shape fills up
    assert len(diverse(twins + others, 100)) == 60
    assert diverse(twins, 0) == []
    nulls = [candidate(f"n{i}", hidden=8 + i) for i in range(9)]
    assert diverse([*nulls, twins[3]], 3) == [twins[3], nulls[0], nulls[1]]


def test_standard_error_of_the_widths():
    """Interpolated like the curve, 0 at the parent's width, and added in squares over the axes."""
    parent = Architecture("M*-", vocab_size=8, hidden_size=32, ffn_size=64, mamba_num_heads=4, mamba_head_dim=4, n_groups=2,
                          state_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    space = resolve_space({"hidden_size": [16, 32, 8], "ffn_size": [32, 64, 32]}, parent)
    curves = WidthCurves(pd.DataFrame([{"axis": "hidden_size", "width": 16, "mse": 1.0, "mse_stderr": 0.4},
                                       {"axis": "ffn_size", "width": 32, "mse": 2.0, "mse_stderr": 0.3}]))
    scores = layer_scores(parent.pattern, [1.0, 1.0, 1.0])
    budget = Budget.parse({"memory": "1x"}, cost(parent, Workload()).to_json())
    found = search_architectures(parent, space, budget, Workload(), scores, curves).candidates
    errors = {(c.architecture.hidden_size, c.architecture.ffn_size): c.predicted["widths_stderr"] for c in found}
    expected = {(32, 64): 0.0, (24, 64): 0.2, (16, 64): 0.4, (32, 32): 0.3, (24, 32): 0.13**0.5, (16, 32): 0.5}
    assert errors == pytest.approx(expected)


def test_random_architectures_are_any_of_the_feasible():
    """Each within the budget is as likely as any other, whatever is priced at once; as many as
    asked for."""
    space = resolve_space({"drop_mamba": [0, 2], "drop_ffn": [0, 1], "hidden_size": [32, 48, 8], "ffn_size": [48, 96, 24]}, PARENT)
    workload, scores = Workload(), layer_scores(PARENT.pattern, [float(i) for i in range(9)])
    curves, limits = width_curves(space, PARENT), budget(params="0.7x")
    every = search_architectures(PARENT, space, limits, workload, scores, curves).candidates
    assert 20 < len(every) < space.num_points
    known = {(c.kept_layers, c.architecture): c for c in every}

    def draw(seed, count=8):
        return grid.random_architectures(PARENT, space, limits, workload, scores, curves, "mse", "auto", count, seed)

    seen = dict.fromkeys(known, 0)
    for seed in range(300):
        drawn = draw(seed)
        assert len({(c.kept_layers, c.architecture) for c in drawn}) == 8
        for c in drawn:
            seen[c.kept_layers, c.architecture] += 1
    expected = 300 * 8 / len(every)
    assert sum((n - expected) ** 2 / expected for n in seen.values()) < len(every) + 4 * (2 * len(every)) ** 0.5
    first = draw(0)
    assert [c.name for c in first] == [f"r{i}" for i in range(1, 9)]
    for c in first:
        same = known[c.kept_layers, c.architecture]
        assert (c.predicted, c.cost) == (same.predicted, same.cost)
    with mock.patch.object(grid, "CHUNK", 5):
        assert draw(0) == first
    assert {(c.kept_layers, c.architecture) for c in draw(1, 10**6)} == set(known)


# other orders
# -------------------------------------------------------------------------------------------


def quality(kl, accuracy=None, error=0.01):
    return {"kl": kl, "loss": 1 + kl} | ({} if accuracy is None else {
        "accuracy": accuracy, "accuracy_stderr": error})


def names(candidates, by):
    return "".join(c.name for c in rank(candidates, by))


def test_what_its_error_does_not_tell_apart_is_ordered_by_kl():
    measured = {"a": quality(0.1, 0.50), "b": quality(0.2, 0.60), "c": quality(0.15, 0.59), "d": quality(0.05, 0.58),
                "e": quality(0.3, None)}
    candidates = [dataclasses.replace(candidate("x"), name=name, measured=found) for name, found in measured.items()]
    assert names(candidates, "kl") == "dacbe"
    # 0.60 and 0.59 are equal at a standard error of 0.014, and 0.58 is not
    assert names(candidates, "accuracy") == "cbdae"
    exact = [dataclasses.replace(c, measured={**(c.measured or {}), "accuracy_stderr": 0.0}) for c in candidates]
    assert names(exact, "accuracy") == "bcdae"
    with pytest.raises(InputError, match="agreement: none of 5 measured candidates has it; they have kl, acc"):
        rank(candidates, "agreement")


def test_finalists_are_ordered_by_what_all_of_them_have():
    after = {"a": quality(0.3, 0.7), "b": quality(0.1, 0.6), "c": {"loss": None}}
    candidates = [dataclasses.replace(candidate("x"), name=name, measured=quality(0.1, 0.5), after_distillation=found)
                  for name, found in after.items()]
    unmeasured = dataclasses.replace(candidate("x"), name="z")
    assert names([unmeasured, *candidates], "accuracy") == "abcz"  # c diverged
    assert names([unmeasured, *candidates], "kl") == "bacz"
    tasks = [dataclasses.replace(c, measured={**(c.measured or {}), "tasks": {"score": score, "score_stderr": 0.01}})
             for c, score in zip(candidates, (0.1, 0.2, 0.3), strict=True)]
    assert names(tasks, "tasks") == "bac"  # of the finalists no task was measured: their loss decides
