"""Importance: scores against removing the layer and running what is left, and against hooks on
transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCH, relative, tiny_model, tokens, trained_like

from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.scores import COLUMNS, LayerScores, WidthScores
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.importance.curves import measure_curves
from minipuzzle.importance.layers import score, score_layers, standard_error
from minipuzzle.importance.widths import score_widths
from minipuzzle.models.forward import block
from minipuzzle.models.passes import Pass
from minipuzzle.models.selection import Selection, choose, select, top
from minipuzzle.models.walk import Model, Whole, final_hidden, walk
from minipuzzle.models.weights import open_model
from minipuzzle.surgery.cut import Cutter
from minipuzzle.verbs.source import bundled_model

METRICS = ("mse", "nmse", "kl", "loss_delta", "cosine")


def without(model: Model, layer: int) -> Model:
    """A model that never had this layer."""
    kept = tuple(i for i in range(model.arch.num_layers) if i != layer)
    return Model(model.family, model.arch.keep(kept), model.top, tuple(model.layers[i] for i in kept))


def ablations(model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Final activations of the full model and without each layer, from one walk."""
    whole = Whole(model)
    return walk(whole, [whole.variant(), *(whole.variant({i}) for i in range(model.arch.num_layers))], ids)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_hand(full: torch.Tensor, other: torch.Tensor, head: torch.Tensor, other_head: torch.Tensor,
            ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Per sample, in float64 and numpy: mse, nmse, kl, loss_delta from the inputs of the LM
    head."""
    h, e = full.double().numpy(), other.double().numpy()
    out = {}
    if h.shape == e.shape:
        out["mse"] = ((h - e) ** 2).mean((1, 2))
        out["nmse"] = out["mse"] / (h**2).mean((1, 2))
    p, q = log_softmax(h @ head.double().numpy().T)[:, :-1], log_softmax(e @ other_head.double().numpy().T)[:, :-1]
    out["kl"] = (np.exp(p) * (p - q)).sum(-1).mean(-1)
    places = ids[:, 1:, None].numpy()
    out["loss_delta"] = (np.take_along_axis(p, places, -1) - np.take_along_axis(q, places, -1)).mean((1, 2))
    return out


def cosines(model: Model, ids: torch.Tensor) -> np.ndarray:
    """[layer, sample] of 1 - cos(stream before, stream after), by hand."""
    x = model.top["backbone.embeddings.weight"][ids]
    rows = []
    for i, kind in enumerate(model.arch.pattern):
        y = x + block(model.arch, kind, model.layers[i], x)
        a, b = x.double().numpy(), y.double().numpy()
        rows.append(1 - ((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))).mean(-1))
        x = y
    return np.stack(rows)


@pytest.mark.parametrize("which", ["tiny", "bundled"])
def test_ablation_is_removing_the_layer(which: str) -> None:
    model = tiny_model() if which == "tiny" else Model.load(open_model(bundled_model()))
    ids = tokens(3, 45, vocab=model.arch.vocab_size)
    full, *missing = ablations(model, ids)
    assert relative(full, final_hidden(model, ids)) < 1e-6
    assert len(missing) == model.arch.num_layers >= 9
    table = score_layers(model, ids).table
    cosine = cosines(model, ids)
    for i in range(model.arch.num_layers):
        small = final_hidden(without(model, i), ids)
        assert relative(missing[i], small) < 1e-5
        expected = by_hand(full, small, model.head, model.head, ids) | {"cosine": cosine[i]}
        for metric in METRICS:
            values = expected[metric]
            assert table.loc[i, metric] == pytest.approx(values.mean(), rel=1e-4, abs=1e-6), (i, metric)
            assert table.loc[i, f"{metric}_stderr"] == pytest.approx(values.std(ddof=1) / 3**0.5, rel=1e-3, abs=1e-6)
        assert relative(missing[i], full) > 1e-3  # every layer does something
    assert list(table["kind"]) == list(model.arch.pattern)
    assert list(table["layer"]) == list(range(model.arch.num_layers))
    assert (table["samples"] == 3).all()


def test_ablation_is_deleting_the_layer_in_transformers() -> None:
    weights, ids = trained_like(ARCH), tokens(2, 45)
    full, *missing = ablations(tiny_model(), ids)
    for i in range(ARCH.num_layers):
        theirs = tiny.transformers_model(ARCH, weights)
        del theirs.model.layers[i]
        theirs.config.layers_block_type = [t for j, t in enumerate(theirs.config.layers_block_type) if j != i]
        assert len(theirs.model.layers) == ARCH.num_layers - 1
        with torch.no_grad():
            hidden = theirs.model(ids, use_cache=False).last_hidden_state
        assert relative(missing[i], hidden) < 1e-5
        assert relative(full, hidden) > 1e-2


def test_scores_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), tokens(5, 20)
    heard: list[float] = []
    together = score(Pass(model, ids))
    wide = score_widths(model, ids)
    spans = {"ffn_size": (24, 36)}
    cutter = Cutter(model, wide)
    curve = measure_curves(cutter, spans, Pass(model, ids))
    monkeypatch.setattr(Pass, "size", lambda self, variants: 2)
    apart = score(Pass(model, ids, progress=heard.append))
    pd.testing.assert_frame_equal(apart.layers.table, together.layers.table, rtol=1e-4, atol=1e-7)
    assert heard == [2, 4, 5, 5]
    for metric in ("mse", "kl"):
        np.testing.assert_allclose(apart.layers.interactions[metric], together.layers.interactions[metric], rtol=1e-3, atol=1e-7)
        assert apart.layers.interactions[metric].shape == (ARCH.num_layers,) * 2
    split = apart.widths
    np.testing.assert_allclose(split.hidden, wide.hidden, rtol=1e-5)
    assert split.samples == 5
    pd.testing.assert_frame_equal(measure_curves(cutter, spans, Pass(model, ids)).table, curve.table, rtol=1e-4, atol=1e-7)


def test_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3, 11))
    np.testing.assert_allclose(standard_error(values), values.std(-1, ddof=1) / np.sqrt(11))
    assert np.isnan(standard_error(values[..., :1])).all()
    assert standard_error(values[..., :1]).shape == (4, 3)


def test_layer_scores_in_a_file(tmp_path: Path) -> None:
    scores = score_layers(tiny_model(), tokens(3, 20))
    scores.write(tmp_path / "layers.csv")
    assert (tmp_path / "layers.csv").read_text().splitlines()[0].startswith(",".join(COLUMNS))
    again = LayerScores.read(tmp_path / "layers.csv")
    pd.testing.assert_frame_equal(again.table, scores.table, check_exact=False, rtol=1e-7)
    assert again.pattern == ARCH.pattern
    np.testing.assert_allclose(again.stderr("kl"), scores.table["kl_stderr"])
    with pytest.raises(InputError, match="no column 'agreement'"):
        again.metric("agreement")


# widths
# ----------------------------------------------------------------------------------------------------------


def test_width_scores_against_hooks_on_transformers() -> None:
    ids = tokens(4, 30)
    theirs = tiny.transformers_model(ARCH, trained_like(ARCH))
    caught: dict[tuple[int, str], list[np.ndarray]] = {}
    for i, layer in enumerate(theirs.model.layers):
        layer.norm.register_forward_hook(
            lambda m, args, out, i=i: caught.setdefault((i, "norm"), []).append(out.detach().double().numpy()))
        if ARCH.pattern[i] == "-":
            layer.mixer.down_proj.register_forward_pre_hook(
                lambda m, args, i=i: caught.setdefault((i, "ffn"), []).append(args[0].detach().double().numpy()))
        if ARCH.pattern[i] == "M":
            layer.mixer.in_proj.register_forward_hook(
                lambda m, args, out, i=i: caught.setdefault((i, "in"), []).append(out.detach().double().numpy()))
    with torch.no_grad():
        for sample in ids:  # one by one
            theirs(sample[None], use_cache=False)

    def score(arrays: list[np.ndarray]) -> np.ndarray:
        assert len(arrays) == 4
        return np.sqrt(sum(np.abs(a[0]).mean(0) ** 2 for a in arrays))

    mine = score_widths(tiny_model(), ids)
    np.testing.assert_allclose(mine.hidden, sum(score(caught[i, "norm"]) for i in range(ARCH.num_layers)), rtol=1e-4)
    assert set(mine.layers["ffn"]) == set(ARCH.layers_of("-"))
    assert set(mine.layers["mamba"]) == set(ARCH.layers_of("M"))
    for i in ARCH.layers_of("-"):
        np.testing.assert_allclose(mine.layers["ffn"][i], score(caught[i, "ffn"]), rtol=1e-3, atol=1e-6)
    for i in ARCH.layers_of("M"):
        inner = ARCH.mamba_inner
        rows = [a[..., inner : 2 * inner] for a in caught[i, "in"]]  # [z | x | B | C | dt]
        np.testing.assert_allclose(mine.layers["mamba"][i], score(rows).reshape(8, 8), rtol=1e-4)


def test_width_scores_in_a_file(tmp_path: Path) -> None:
    scores = score_widths(tiny_model(), tokens(3, 20))
    scores.write(tmp_path / "widths.safetensors")
    again = WidthScores.read(tmp_path / "widths.safetensors")
    assert again.samples == 3
    assert len(again.arrays()) == 1 + ARCH.pattern.count("-") + ARCH.pattern.count("M")
    assert again.arrays().keys() == scores.arrays().keys()
    for name, array in scores.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
    (tmp_path / "widths.safetensors").write_bytes((tmp_path / "widths.safetensors").read_bytes()[:-9])
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        WidthScores.read(tmp_path / "widths.safetensors")


@st.composite
def mamba_scores(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    groups, per, dim = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    values = st.integers(0, 3).map(float) if draw(st.booleans()) else st.floats(0, 10)  # whole numbers tie
    rows = draw(st.lists(st.lists(values, min_size=dim, max_size=dim), min_size=groups * per, max_size=groups * per))
    return np.array(rows), groups, groups * draw(st.integers(1, per)), draw(st.integers(1, dim))


@settings(max_examples=200)
@given(mamba_scores())
def test_heads_never_leave_their_group(case: tuple[np.ndarray, int, int, int]) -> None:
    scores, groups, num_heads, head_dim = case
    heads, channels = choose(scores, (num_heads, head_dim), (groups, 1))
    per = len(scores) // groups
    assert len(set(heads)) == len(heads) == num_heads
    assert len(set(channels)) == len(channels) == head_dim
    assert (np.diff(heads) > 0).all()
    assert (np.diff(channels) > 0).all()
    # place i of the kept heads is read as group i // kept-per-group: it must be the group the head
    # came from
    assert [h // per for h in heads] == [i // (num_heads // groups) for i in range(num_heads)]
    # plain: sort by (score, index), channels first over all heads, then heads over the kept
    # channels
    column = np.linalg.norm(scores, axis=0)
    assert set(channels) == set(sorted(range(scores.shape[1]), key=lambda c: (-column[c], c))[:head_dim])
    row = np.linalg.norm(scores[:, np.sort(channels)], axis=1)
    for group in range(groups):
        inside = sorted(range(group * per, (group + 1) * per), key=lambda h: (-row[h], h))[: num_heads // groups]
        assert set(heads[heads // per == group]) == set(inside)


def test_head_scores_are_nested() -> None:
    """Head 1 is the larger over all channels, head 0 over the channel that is kept."""
    scores = np.array([[5.0, 0.0, 0.0], [3.0, 4.9, 0.0], [9.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert scores[1] @ scores[1] > scores[0] @ scores[0]
    heads, channels = choose(scores, (2, 1), (2, 1))
    assert channels.tolist() == [0]
    assert heads.tolist() == [0, 2]
    assert choose(scores, (2, 3), (2, 1))[0].tolist() == [1, 2]


def test_ties_go_to_the_lower_index() -> None:
    assert top(np.array([1.0, 2.0, 2.0, 1.0, 2.0]), 2).tolist() == [1, 2]
    assert top(np.zeros(6), 4).tolist() == [0, 1, 2, 3]
    assert top(np.array([0.0, 3.0, 1.0]), 3).tolist() == [0, 1, 2]
    heads, channels = choose(np.ones((8, 4)), (4, 2), (2, 1))
    assert heads.tolist() == [0, 1, 4, 5]
    assert channels.tolist() == [0, 1]


# curves and quality
# ----------------------------------------------------------------------------------------------


def test_curves_are_slices_measured_by_hand() -> None:
    model, ids = tiny_model(), tokens(4, 25)
    scores = score_widths(model, ids)
    asked = {"hidden_size": (16, 24, 32), "ffn_size": (12, 48), "mamba_num_heads": (4,), "mamba_head_dim": (4, 8)}
    heard: list[float] = []
    cutter = Cutter(model, scores)
    table = measure_curves(cutter, asked, Pass(model, ids, progress=heard.append)).table
    assert list(zip(table["axis"], table["width"], strict=True)) == [
        ("hidden_size", 16), ("hidden_size", 24), ("ffn_size", 12), ("mamba_num_heads", 4), ("mamba_head_dim", 4)]
    assert heard == [4]
    full = final_hidden(model, ids)
    for row in table.to_dict("records"):
        target = dataclasses.replace(ARCH, **{row["axis"]: row["width"]})
        selection = select(ARCH, target, tuple(range(ARCH.num_layers)), scores)
        small = model.slice(target, selection)
        hidden = final_hidden(small, ids)
        expected = by_hand(full, hidden, model.head, small.head, ids)
        if "hidden_size" in selection.stream:  # what was cut counts as zero
            h, e = full.double().numpy(), np.zeros(full.shape)
            e[..., selection.stream["hidden_size"]] = hidden.numpy()
            expected["mse"] = ((h - e) ** 2).mean((1, 2))
            expected["nmse"] = expected["mse"] / (h**2).mean((1, 2))
        assert set(expected) == {"mse", "nmse", "kl", "loss_delta"}
        for metric, values in expected.items():
            assert row[metric] == pytest.approx(values.mean(), rel=1e-4, abs=1e-6), (row["axis"], metric)
            assert row[f"{metric}_stderr"] == pytest.approx(values.std(ddof=1) / 2, rel=1e-3, abs=1e-6)
        assert row["kl"] > 1e-3


def test_held_out_activations_are_kept_once_in_the_parents_dtype() -> None:
    """A bf16 parent's in bf16, as they are counted in the plan, whatever the batches."""
    ids = tokens(6, 25)
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_model(dtype=dtype)
        kept = Reference(model, ids).hidden
        assert (kept.dtype, kept.device.type, kept.nbytes) == (dtype, "cpu", 6 * 25 * ARCH.hidden_size * dtype.itemsize)
        near = 1e-5 if dtype == torch.float32 else 0.02
        assert relative(kept.float(), final_hidden(model, ids).float()) < near
        parts = torch.cat([Reference(model, part).hidden for part in ids.split(2)])
        assert relative(kept.float(), parts.float()) < near


def test_measured_quality_is_that_of_plain_numpy() -> None:
    model, ids = tiny_model(), tokens(6, 25)
    kept = (0, 1, 2, 3, 5, 6, 7)
    small = model.slice(ARCH.keep(kept), Selection(kept))
    found = measure(small, Reference(model, ids))
    full, hidden = final_hidden(model, ids), final_hidden(small, ids)
    p = log_softmax((full @ model.head.T).double().numpy())[:, :-1]
    q = log_softmax((hidden @ small.head.T).double().numpy())[:, :-1]
    nll = -np.take_along_axis(q, ids[:, 1:, None].numpy(), -1)[..., 0].mean(-1)
    kl = (np.exp(p) * (p - q)).sum(-1).mean(-1)
    assert found["loss"] == pytest.approx(nll.mean(), rel=1e-5)
    assert found["loss_stderr"] == pytest.approx(nll.std(ddof=1) / 6**0.5, rel=1e-4)
    assert found["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl_stderr"] == pytest.approx(kl.std(ddof=1) / 6**0.5, rel=1e-3)
    assert found["accuracy"] == pytest.approx((q.argmax(-1) == ids[:, 1:].numpy()).mean())
    assert found["agreement"] == pytest.approx((q.argmax(-1) == p.argmax(-1)).mean())
    assert 0 < found["agreement"] < 1
    same = measure(model, Reference(model, ids))
    assert same["kl"] == pytest.approx(0, abs=1e-7)
    assert same["agreement"] == 1
