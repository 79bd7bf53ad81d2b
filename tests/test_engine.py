"""The engine: variants against written checkpoints in transformers, streaming, racing, iteration,
resuming, processes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_importance import by_hand, without
from tiny import (
    ARCH,
    PARENT_CONFIG,
    make_space,
    relative,
    tiny_model,
    tokens,
    trained_like,
    transformers_model,
    without_dt_limit,
    write_folder,
)

from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.partial import Partial
from minipuzzle.core.scores import LayerScores
from minipuzzle.evaluate.quality import measure_variants
from minipuzzle.importance import layers
from minipuzzle.importance.layers import Scored, score, score_iteratively
from minipuzzle.importance.racing import Race, looks, toss_ups, undecided
from minipuzzle.importance.widths import score_widths
from minipuzzle.models import walk as walking
from minipuzzle.models.logits import compare
from minipuzzle.models.passes import Pass
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model, Whole, layer_forwards, walk
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.damage import predict
from minipuzzle.search.space import resolve_space
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.rotate import find_rotation
from minipuzzle.verbs.score import score as score_verb
from minipuzzle.verbs.source import bundled_model

CPU = torch.device("cpu")
LAYERS = ARCH.num_layers
DROPS = {"M": (0, 2), "-": (0, 2), "*": (0, 1)}


def bf16_folder(folder: Path) -> Path:
    return write_folder(folder, weights={n: t.to(torch.bfloat16) for n, t in trained_like(ARCH).items()},
                        torch_dtype="bfloat16")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bf16 folder, its model, and cutters that rotate and that select."""
    folder = open_model(bf16_folder(tmp_path_factory.mktemp("parent") / "model"))
    model, ids = Model.load(folder), tokens(4, 40)
    names = folder.dtypes(tuple(range(LAYERS)))
    widths = score_widths(model, ids)
    return folder, model, {"rotate": Cutter(model, widths, find_rotation(model, ids), names),
                           "select": Cutter(model, widths, None, names)}


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_path_is_the_written_checkpoint_in_transformers(parent: Any, tmp_path_factory: pytest.TempPathFactory,
                                                          data: st.DataObject) -> None:
    from transformers import AutoModelForCausalLM

    folder, model, cutters = parent
    cutter = cutters[data.draw(st.sampled_from(("rotate", "select")))]
    dropped = data.draw(st.sets(st.integers(0, LAYERS - 1), max_size=5))
    kept = tuple(i for i in range(LAYERS) if i not in dropped)
    target = dataclasses.replace(
        ARCH.keep(kept), hidden_size=data.draw(st.sampled_from((16, 24, 32))),
        ffn_size=data.draw(st.sampled_from((12, 32, 48))), mamba_num_heads=data.draw(st.sampled_from((4, 8))),
        mamba_head_dim=data.draw(st.sampled_from((4, 8))))
    ids = tokens(3, 45, seed=len(dropped))
    every = tuple(range(LAYERS))
    (found,) = measure_variants(cutter, cutter.variant(ARCH, every), [cutter.variant(target, kept)], Pass(model, ids))

    there = tmp_path_factory.mktemp("written") / "model"
    names = folder.dtypes(kept)
    write_model(there, target.to_config(folder.config | PARENT_CONFIG), (
        (n, t.to(names[n])) for n, t in cutter.cut(target, kept).by_name().items()))
    theirs, full = (without_dt_limit(AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval())
                    for p in (there, folder.path))
    with torch.no_grad():
        q, p = (m(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (theirs, full))
    assert sum(t.numel() for t in theirs.parameters()) < sum(t.numel() for t in full.parameters()) or target == ARCH
    nll = -q.gather(-1, ids[:, 1:, None]).mean()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert found["loss"] == pytest.approx(float(nll), rel=1e-5)
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4, abs=1e-5)
    assert found["accuracy"] == pytest.approx(float((q.argmax(-1) == ids[:, 1:]).double().mean()))
    assert found["agreement"] == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).double().mean()))


def test_shared_beginnings_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), tokens(2, 20)
    whole = Whole(model)
    variants = [whole.variant(), *(whole.variant({i}) for i in range(LAYERS)), whole.variant({3, 7}), whole.variant({3, 7})]
    alone = [walk(whole, [p], ids)[0] for p in variants]
    calls = Counter[str]()
    block = walking.block
    monkeypatch.setattr(walking, "block", lambda arch, kind, *rest: (calls.update(kind), block(arch, kind, *rest))[1])
    together = walk(whole, variants, ids)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    # L(L+1)/2 for the ablations and the full model; without 3 and 7 differs from without 3 in the
    # last layer alone
    assert calls.total() == layer_forwards(variants) == LAYERS * (LAYERS + 1) // 2 + 1
    assert layer_forwards(variants, 8) == LAYERS + 1  # all but the variant without layer 8, and the one twice


@pytest.mark.parametrize("rotates", ["rotate", "select"])
def test_streamed_is_resident_bit_for_bit(parent: Any, rotates: str) -> None:
    folder, model, cutters = parent
    streamed, ids = StreamedModel.open(folder, CPU), tokens(5, 30)
    for memory in (1, 2**26):
        a, b = (score(Pass(s, ids, memory_bytes=memory)) for s in (model, streamed))
        pd.testing.assert_frame_equal(a.layers.table, b.layers.table, check_exact=True)
        np.testing.assert_array_equal(a.widths.hidden, b.widths.hidden)
        # too little memory for all variants: they go one after the other, and pairs are not
        # compared
        assert a.layers.interactions.keys() == b.layers.interactions.keys() == (set() if memory == 1 else {"mse", "kl"})
        for metric, pairs in a.layers.interactions.items():
            np.testing.assert_array_equal(pairs, b.layers.interactions[metric])
        expected = score(Pass(model, ids)).layers.table
        pd.testing.assert_frame_equal(a.layers.table, expected, rtol=1e-4, atol=1e-6)
    scored = score(Pass(model, ids, memory_bytes=1)).layers
    scored.write(folder.path.parent / "layers.csv")
    assert LayerScores.read(folder.path.parent / "layers.csv").interactions == {}
    resident = cutters[rotates]
    other = Cutter(streamed, resident.scores, resident.rotation, resident.dtypes)
    target, kept = dataclasses.replace(ARCH.keep((0, 1, 2, 5, 8)), hidden_size=24, ffn_size=32), (0, 1, 2, 5, 8)
    results = [walk(c, [c.variant(target, kept)], ids)[0] for c in (resident, other)]
    assert torch.equal(*results)
    assert results[0].shape == (5, 30, 24)
    for name, tensor in resident.cut(target, kept).by_name().items():
        assert torch.equal(tensor, other.cut(target, kept).by_name()[name])


def test_nan_in_a_streamed_weight_is_named(tmp_path: Path) -> None:
    for name in ("backbone.layers.5.mixer.in_proj.weight", "lm_head.weight"):
        weights = trained_like(ARCH)
        weights[name][3, 5] = torch.nan
        folder = open_model(write_folder(tmp_path / name, weights=weights))
        with pytest.raises(CorruptArtifact, match=name):
            score(Pass(StreamedModel.open(folder, CPU), tokens(2, 10)))


@settings(max_examples=20)
@given(words=st.integers(3, 97), chunk=st.integers(1, 50), seed=st.integers(0, 9))
def test_compare_in_pieces_of_the_vocabulary(words: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    full, *hidden = (torch.randn(2, 9, 6, generator=generator, dtype=torch.float64) for _ in range(4))
    heads = [torch.randn(97, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    ids, which = tokens(2, 9, seed), [0, 1, 1]
    def rows(a: int, b: int) -> list[torch.Tensor]:
        return [h[a:b] for h in heads]

    base, found, gram = compare(full, hidden, which, rows, 97, ids, True, words, chunk)
    z = (full @ heads[0].T)[:, :-1]
    p = z.softmax(-1)
    expected = by_hand(full, hidden[1], heads[0], heads[1], ids)
    np.testing.assert_allclose(found[1].kl, expected["kl"], rtol=1e-10)
    np.testing.assert_allclose(found[1].loss - base.loss, expected["loss_delta"], rtol=1e-9, atol=1e-12)
    d = torch.stack([(h @ heads[w].T)[:, :-1] - z for h, w in zip(hidden, which, strict=True)])
    centred = d - (p * d).sum(-1, keepdim=True)
    assert gram is not None
    np.testing.assert_allclose(gram, 0.5 * torch.einsum("btv,ibtv,jbtv->bij", p, centred, centred) / 8, rtol=1e-9)
    best = (hidden[2] @ heads[1].T)[:, :-1].argmax(-1)
    np.testing.assert_allclose(found[2].agreement, (best == z.argmax(-1)).double().mean(-1))
    np.testing.assert_allclose(found[2].accuracy, (best == ids[:, 1:]).double().mean(-1))


def test_interactions_are_the_errors_products() -> None:
    model, ids = tiny_model(), tokens(3, 25)
    found = score(Pass(model, ids)).layers
    whole = Whole(model)
    full, *missing = (h.double() for h in walk(whole, [whole.variant(), *(whole.variant({i}) for i in range(LAYERS))], ids))
    errors = torch.stack([h - full for h in missing])
    gram = torch.einsum("ibtd,jbtd->ij", errors, errors) / full.numel()
    np.testing.assert_allclose(found.interactions["mse"], gram, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(np.diag(found.interactions["mse"]), found.table["mse"], rtol=1e-4)
    assert np.abs(gram.numpy() - np.diag(np.diag(gram))).max() > 0.01


@settings(max_examples=30)
@given(seed=st.integers(0, 1000))
def test_quadratic_damage_is_the_sum_over_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, pairs = rng.random(LAYERS), rng.normal(size=(LAYERS, LAYERS))
    pairs = pairs + pairs.T
    scores = LayerScores(pd.DataFrame({"layer": range(LAYERS), "kind": list(ARCH.pattern), "kl": values}), "given",
                         {"kl": pairs})
    space = make_space((0, 2, 3), (0, 1, 2), (0, 1), (32,), (48,), (8,), (8,))
    found = predict(ARCH, space, scores, None, "kl", "quadratic")
    damage = found.layers(space)
    additive = predict(ARCH, space, scores, None, "kl", "additive").layers(space)
    assert damage is not None
    assert additive is not None
    assert len(damage) == 18
    for c, drops in enumerate(itertools.product(*space.drops.values())):
        gone = [i for order, n in zip(found.orders, drops, strict=True) for i in order[:n]]
        expected = sum(values[i] for i in gone) + sum(pairs[i, j] for i in gone for j in gone if i != j)
        assert damage[c] == pytest.approx(expected, abs=1e-9)
        assert additive[c] == pytest.approx(sum(values[i] for i in gone))
    bare = dataclasses.replace(scores, interactions={})
    with pytest.raises(InputError, match="interactions"):
        predict(ARCH, space, bare, None, "kl", "quadratic")
    np.testing.assert_array_equal(predict(ARCH, space, bare, None, "kl", "auto").layers(space), additive)


# racing and iteration
# --------------------------------------------------------------------------------------------


def test_a_race_spends_less_and_chooses_the_same() -> None:
    model = Model.load(open_model(bundled_model()))
    ids = tokens(24, 32, vocab=2048)
    drops = {"M": (3, 3), "-": (2, 2), "*": (1, 1)}
    race = Race(drops, 0.95, "kl")
    slow, fast = score(Pass(model, ids)), score(Pass(model, ids), race)
    listed = toss_ups(slow.layers.samples["kl"].T, model.arch.pattern, race)
    assert fast.forwards < 0.8 * slow.forwards
    for kind, (count, _) in drops.items():
        chosen = [set(t[t["kind"] == kind].nsmallest(count, "kl")["layer"]) for t in (slow.layers.table, fast.layers.table)]
        unsure = {x for t in listed if t["kind"] == kind for x in (t["goes"], t["stays"])}
        assert chosen[0] - unsure == chosen[1] - unsure
    table = fast.layers.table
    assert table["samples"].min() == 8
    assert table["samples"].max() == fast.samples <= 24
    for metric in ("mse", "kl"):
        assert np.isfinite(table[metric]).all()
    assert np.isfinite(fast.layers.interactions["kl"]).all()
    # pairs are of all samples on which both were ablated, not of the first look alone
    last = np.flatnonzero(table["samples"] == fast.samples)
    assert fast.samples > 8
    assert len(last) >= 2
    expected = slow.layers.samples["pairs_kl"][: fast.samples].mean(0)
    np.testing.assert_allclose(fast.layers.interactions["kl"][np.ix_(last, last)], expected[np.ix_(last, last)], rtol=1e-3,
                               atol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), drop=st.integers(0, 5))
def test_only_pairs_on_two_sides_of_a_cut_matter(seed: int, drop: int) -> None:
    rng = np.random.default_rng(seed)
    means = rng.permutation(6).astype(float)
    values = means[:, None] + rng.normal(size=(6, 16)) * 1e-3
    assert undecided(values, "M" * 6, Race({"M": (0, 6)}), 3) == []
    noisy = means[:, None] + rng.normal(size=(6, 16)) * 100
    order = sorted(range(6), key=lambda i: (noisy[i].mean(), -i))
    found = undecided(noisy, "M" * 6, Race({"M": (drop, drop)}), 3)
    assert all(a in order[:drop] and b in order[drop:] for a, b in found)
    assert len(found) >= (1 if 0 < drop < 6 else 0)
    listed = toss_ups(noisy, "M" * 6, Race({"M": (drop, drop)}))
    assert [t["drop"] for t in listed] == ([drop] if listed else [])
    assert looks(100) == [8, 16, 32, 64, 100]


@pytest.mark.parametrize("memo", [0, 2**31])
def test_iterative_is_removing_the_least_one_after_the_other(memo: int) -> None:
    model, ids = tiny_model(), tokens(4, 25)
    found: Scored = score_iteratively(Pass(model, ids), Race(DROPS, metric="kl"), memo)
    gone: list[int] = []
    left, before, full = model, 0.0, walk(Whole(model), [Whole(model).variant()], ids)[0]
    names = list(range(LAYERS))
    for place in range(1, 6):
        damage = {}
        for at, layer in enumerate(names):
            kind = ARCH.pattern[layer]
            if sum(ARCH.pattern[i] == kind for i in gone) < DROPS[kind][1]:
                hidden = walk(Whole(small := without(left, at)), [Whole(small).variant()], ids)[0]
                damage[layer] = by_hand(full, hidden, model.head, model.head, ids)["kl"].mean()
        lowest = min(damage, key=lambda i: damage[i])
        row = found.layers.table.loc[lowest]
        assert row["order"] == place
        assert row["added_kl"] == pytest.approx(damage[lowest] - before, rel=1e-3, abs=1e-5)
        before = damage[lowest]
        left = without(left, names.index(lowest))
        names.remove(lowest)
        gone.append(lowest)
    assert found.layers.table["order"].notna().sum() == 5
    # what was measured of a set is what is predicted of it
    counts = [sum(ARCH.pattern[i] == kind for i in gone) for kind in "M-*"]
    spec = dict(zip(("drop_mamba", "drop_ffn", "drop_attention"), counts, strict=True))
    predicted = predict(ARCH, resolve_space(spec, ARCH), found.layers, None, "kl").layers(resolve_space(spec, ARCH))
    assert predicted == pytest.approx([before], rel=1e-3)
    # the search drops them in this order
    space = make_space((0, 1, 2), (0, 1, 2), (0, 1), (32,), (48,), (8,), (8,))
    orders = predict(ARCH, space, found.layers, None, "kl").orders
    assert [order[: DROPS[k][1]] for order, k in zip(orders, "M-*", strict=True)] == [
        [i for i in gone if ARCH.pattern[i] == k] for k in "M-*"]


def test_a_walk_starts_where_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), tokens(4, 25)
    race = Race(DROPS, metric="kl")
    lazy = score_iteratively(Pass(model, ids), race)
    calls = Counter[str]()
    block = walking.block
    monkeypatch.setattr(walking, "block", lambda arch, kind, weights, x, probe=None: (
        calls.update({kind: len(x)}), block(arch, kind, weights, x, probe))[1])
    score_iteratively(Pass(model, ids), race)
    assert calls.total() == lazy.forwards
    assert lazy.forwards < score_iteratively(Pass(model, ids), race, 0).forwards


def test_iterative_keeps_to_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory: few variants at a time and no memo; the same order."""
    model, ids, race = tiny_model(), tokens(4, 25), Race(DROPS, metric="kl")
    expected = score_iteratively(Pass(model, ids), race).layers.table
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(layers, "walk", lambda parts, variants, ids, *looks, memo=None: (
        seen.append((len(variants), memo is None)), walk(parts, variants, ids, *looks, memo=memo))[1])
    found = score_iteratively(Pass(model, ids, memory_bytes=1), race).layers.table
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-6)
    assert len(seen) > 50
    assert set(seen) == {(2, True)}  # the full model and one other


# stopping, and several processes
# ---------------------------------------------------------------------------------


def test_stopped_and_started_again_no_sample_counts_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), tokens(9, 20)
    monkeypatch.setattr(Pass, "size", lambda self, variants: 2)
    expected = score(Pass(model, ids)).layers.table

    def stop(done: float) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Pass(model, ids, Partial(tmp_path / "partial"), progress=stop))
    names = sorted(p.name for p in (tmp_path / "partial").iterdir())
    assert names == ["0-2.npz", "2-4.npz", "4-6.npz"]
    (tmp_path / "partial" / "2-4.npz").write_bytes(b"half of it")  # and a power cut
    (tmp_path / "partial" / "6-8.npz.1.tmp").write_bytes(b"half of it")
    seen: list[int] = []
    embed = Model.embed
    monkeypatch.setattr(Model, "embed", lambda self, x: (seen.append(len(x)), embed(self, x))[1])
    again = Pass(model, ids, Partial(tmp_path / "partial"))
    pd.testing.assert_frame_equal(score(again).layers.table, expected, check_exact=True)
    assert seen == [2, 2, 1]  # 2-4, 6-8, 8-9
    again.partial.forget()
    assert not (tmp_path / "partial").exists()


@pytest.mark.parametrize(("samples", "parts"), [(12, [4, 4, 4]), (7, [3, 3, 1]), (2, [1, 1]), (1, [1])])
def test_every_process_has_work(samples: int, parts: list[int]) -> None:
    """Few samples, or much memory: all would fit into one batch."""
    class Three(Ranks):
        def share(self, items: list[Any]) -> list[Any]:
            return items

        def gather(self, value: Any) -> list[Any]:
            return [value]

    made = Pass(tiny_model(), tokens(samples, 10), ranks=Three(CPU, 0, 3)).run(
        0, samples, 100, lambda first, ids: {"ids": ids.numpy()})
    assert [len(p["ids"]) for p in made] == parts
    np.testing.assert_array_equal(np.concatenate([p["ids"] for p in made]), tokens(samples, 10))


SMALL = ["--set", "calibration.samples=6", "--set", "calibration.sequence_length=32", "--set",
         "space.mamba_head_dim=1x", "--set", "space.hidden_size=[0.75x, 1x, 0.25x]"]


def score_alone(folder: Path, memory_bytes: int | None = None) -> Path:
    recipe = Recipe.load("default", data=str(folder.parent / "texts"), settings={
        key: yaml.safe_load(value) for key, _, value in (s.partition("=") for s in SMALL[1::2])})
    return score_verb(bundled_model(), recipe, folder, 0, "cpu", Reporter(), memory_bytes=memory_bytes)[0]


def score_together(folder: Path) -> Path:
    texts = folder.parent / "texts"
    texts.mkdir(exist_ok=True)
    for i in range(120):
        (texts / f"{i}.txt").write_text(f"def f{i}(x):\n    return [x + {i}, {i * 7}, 'abc']\n" * 12)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
               "minipuzzle", "score", str(bundled_model()), "--data", str(texts), "-o", str(folder), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder / "scores"


def test_two_processes_and_streaming_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = score_together(tmp_path / "together")
    alone = score_alone(tmp_path / "alone")
    opened: list[Path] = []
    stream = StreamedModel.open
    monkeypatch.setattr(StreamedModel, "open", lambda folder, *how: (opened.append(folder.path), stream(
        folder, *how))[1])
    streamed = score_alone(tmp_path / "streamed", 2**26)
    assert opened == [bundled_model()]
    for other in (together, streamed):
        for file in ("layers.csv", "width_curves.csv"):
            a, b = pd.read_csv(alone / file), pd.read_csv(other / file)
            pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-6)
            assert len(a) > 5
        a, b = (LayerScores.read(p / "layers.csv").interactions["kl"] for p in (alone, other))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    assert not (tmp_path / "together" / "partial").exists()


def test_a_weight_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often passes read it, and by whom; a NaN is found in the first."""
    from minipuzzle.models import weights as module

    folder = open_model(write_folder(tmp_path / "model"))
    checked: list[str] = []
    real = module._finite
    monkeypatch.setattr(module, "_finite", lambda file, stored, t: (checked.append(stored), real(file, stored, t))[1])
    for _ in range(2):  # a run opens it again once several processes train
        source = StreamedModel.open(folder, torch.device("cpu"))
        for _ in range(2):
            assert len(list(source.stream(range(ARCH.num_layers)))) == ARCH.num_layers
    Model.load(folder)
    assert len(checked) == len(set(checked)) == len(ARCH.shapes())


def test_the_next_layer_is_read_while_this_one_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the next one has been read this one is not done; in another thread, in every pass, and of a file that needs
    no cast too, where it is brought in page by page."""
    from minipuzzle.models import stream as module

    source = StreamedModel.open(open_model(write_folder(tmp_path / "model")), torch.device("cpu"))
    read = [threading.Event() for _ in range(ARCH.num_layers)]
    real, touched, by = StreamedModel._layer, module._touched, set()

    def layer(self: StreamedModel, number: int) -> Any:
        found = real(self, number)
        read[number].set()
        return found

    def touch(tensor: torch.Tensor) -> torch.Tensor:
        by.add(threading.get_ident())
        return touched(tensor)

    monkeypatch.setattr(StreamedModel, "_layer", layer)
    monkeypatch.setattr(module, "_touched", touch)
    for _ in range(2):
        for i, weights in enumerate(source.stream(range(ARCH.num_layers))):
            assert weights.keys() == set(ARCH.layer_weights(i))
            assert i + 1 == ARCH.num_layers or read[i + 1].wait(60)
            assert i + 2 >= ARCH.num_layers or not read[i + 2].is_set()  # two are held, not three
        for event in read:
            event.clear()
    assert threading.get_ident() not in by
    assert len(by) >= 1


def test_interactions_that_cannot_be_read(tmp_path: Path) -> None:
    scored = score(Pass(tiny_model(), tokens(2, 10))).layers
    scored.write(tmp_path / "layers.csv")
    again = LayerScores.read(tmp_path)
    np.testing.assert_array_equal(again.interactions["mse"], scored.interactions["mse"])
    save_file({k: torch.from_numpy(v[:2, :2]).contiguous() for k, v in load_numpy(tmp_path).items()},
              tmp_path / "interactions.safetensors")
    space = make_space((0, 1), (0,), (0,), (32,), (48,), (8,), (8,))
    with pytest.raises(CorruptArtifact, match="score again"):
        predict(ARCH, space, LayerScores.read(tmp_path), None, "kl")
    (tmp_path / "interactions.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptArtifact, match="interactions"):
        LayerScores.read(tmp_path)


def load_numpy(folder: Path) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in load_file(folder / "interactions.safetensors").items()}


def test_engine_agrees_with_the_plain_forward_pass() -> None:
    model, ids = tiny_model(), tokens(3, 33)
    from minipuzzle.models.walk import final_hidden

    assert relative(walk(Whole(model), [Whole(model).variant()], ids)[0], final_hidden(model, ids)) < 1e-6


def test_a_pass_answers_each_question_anew() -> None:
    model, ids = tiny_model(), tokens(3, 20)
    whole, run = Whole(model), Pass(model, ids)
    one, other = (measure_variants(whole, whole.variant(), [whole.variant({i})], run)[0] for i in (1, 4))
    assert one["kl"] != pytest.approx(other["kl"], rel=1e-3)
    assert other == measure_variants(whole, whole.variant(), [whole.variant({4})], Pass(model, ids))[0]


def test_all_metrics_are_those_of_hooks_on_transformers() -> None:
    weights, ids = trained_like(ARCH), tokens(3, 45)
    theirs = transformers_model(ARCH, weights)
    head = weights["lm_head.weight"]

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = theirs.model(ids, use_cache=False).last_hidden_state
        return out

    full, table = hidden(), score(Pass(tiny_model(), ids)).layers.table
    for i, layer in enumerate(theirs.model.layers):
        seen: list[torch.Tensor] = []

        def skip(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor, seen: list[torch.Tensor] = seen) -> Any:
            seen.extend((inputs[0], output))
            return inputs[0]

        hook = layer.register_forward_hook(skip)
        expected = by_hand(full, hidden(), head, head, ids)
        hook.remove()
        before, after = (x.double() for x in seen)
        expected["cosine"] = (1 - torch.cosine_similarity(before, after, dim=-1).mean(-1)).numpy()
        assert set(expected) == {"mse", "nmse", "kl", "loss_delta", "cosine"}
        for metric, values in expected.items():
            assert table.loc[i, metric] == pytest.approx(values.mean(), rel=1e-5, abs=1e-5), (i, metric)
