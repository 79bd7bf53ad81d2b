"""Retrieval: random tokens that come again, counted by hand, and the layers that find them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS, neither_gate_nor_page
from tiny import ARCH, reference_logits, tiny_model, trained_like

from minipuzzle import Recipe, prune, search_architectures
from minipuzzle.core.errors import InputError
from minipuzzle.core.scores import LayerScores
from minipuzzle.evaluate.retrieval import make_probe, measure_models, measure_variants
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Model, Whole
from minipuzzle.models.weights import open_model
from minipuzzle.pages.html import render_html
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.report import facts
from minipuzzle.report.report import Report
from minipuzzle.search.keep import carriers, keep_retrieval
from minipuzzle.search.space import resolve_space
from minipuzzle.verbs.evaluate import evaluate
from minipuzzle.verbs.run import Run


def by_hand(ids: list[int], key: int, count: int, size: int) -> tuple[list[int], int]:
    """(places of the predicted tokens of a span that comes again, its distance)."""
    begin = len(ids) - count * size + key * size
    first = ids.index(ids[begin])
    assert ids[first : first + size] == ids[begin : begin + size]
    return [begin + i for i in range(1, size)], begin - first


@pytest.mark.parametrize("context", [16, 64, 200])
def test_a_probe_says_nothing_new_after_a_key(context: int) -> None:
    """Every key stands once before, with the same tokens after it; distances reach the context."""
    probe = make_probe(97, context, samples=5, seed=3)
    assert torch.equal(probe.ids_NT, make_probe(97, context, samples=5, seed=3).ids_NT)
    assert not torch.equal(probe.ids_NT, make_probe(97, context, samples=5, seed=4).ids_NT)
    assert probe.ids_NT.shape == (10, context)
    for task, rows in probe.rows.items():
        count, size = probe.spans[task]
        for row, distances in zip(rows, probe.distances[task], strict=True):
            ids = probe.ids_NT[row].tolist()
            assert all(ids[: -count * size].count(ids[len(ids) - count * size + k * size]) == 1 for k in range(count))
            assert [by_hand(ids, k, count, size)[1] for k in range(count)] == distances.tolist()
    assert max(d.max() for d in probe.distances.values()) > 0.75 * context


def test_accuracy_and_kl_are_those_of_the_tokens_after_a_key() -> None:
    weights = trained_like(ARCH)
    model, without = tiny_model(), frozenset({3})
    probe = make_probe(ARCH.vocab_size, 32, samples=3)
    whole = Whole(model)
    full, ablated = measure_variants(probe, whole, whole.variant(), [whole.variant(without)], Pass(model, probe.ids_NT))
    kept = tuple(i for i in range(ARCH.num_layers) if i not in without)
    fewer = {n.replace(f"layers.{old}.", f"layers.{new}."): w for new, old in enumerate(kept)
             for n, w in weights.items() if f"layers.{old}." in n}
    fewer |= {n: w for n, w in weights.items() if ".layers." not in n}
    p, q = (reference_logits(arch, w, probe.ids_NT).log_softmax(-1) for arch, w in (
        (ARCH, weights), (ARCH.keep(kept), fewer)))
    for task, rows in probe.rows.items():
        count, size = probe.spans[task]
        right, kls = [], []
        for row in rows:
            ids = probe.ids_NT[row].tolist()
            places = [place for k in range(count) for place in by_hand(ids, k, count, size)[0]]
            right.append(np.mean([int(q[row, place - 1].argmax()) == ids[place] for place in places]))
            kls.append(np.mean([float((p[row, place - 1].exp() * (p[row, place - 1] - q[row, place - 1])).sum())
                                for place in places]))
        assert ablated[f"{task}_accuracy"] == pytest.approx(np.mean(right), abs=1e-9)
        assert ablated[f"{task}_kl"] == pytest.approx(np.mean(kls), rel=1e-4)
        assert ablated[f"{task}_kl_stderr"] == pytest.approx(np.std(kls, ddof=1) / 3**0.5, rel=1e-3)
    assert full["kl"] == 0 < ablated["kl"]
    assert full["lost"] is None  # random weights are no better than chance
    again = measure_models(probe, model, [tiny_model()], Pass(model, probe.ids_NT))
    assert again[0] == full == again[1]


COPIER = Path(__file__).parent / "data" / "copier"  # tests/data/train_copier.py made it


@pytest.fixture(scope="module")
def copier(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained copying model, with a tokenizer of as many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("copier") / "copier"
    shutil.copytree(COPIER, folder)
    words = ["<|end|>", *dict.fromkeys(WORDS.split())][:64]
    words += [f"unused{i}" for i in range(64 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "model_max_length": 1024}))
    return folder


@pytest.fixture(scope="module")
def run(copier: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Half of its attention layers may go; one of them carries retrieval."""
    asked = recipe.with_overrides(budget={"memory": "0.95x"}, settings={
        "space.drop_attention": [0, 1], "space.drop_mamba": 0, "space.hidden_size": [24, 32, 8],
        "search.keep_retrieval": True, "search.measure": 8, "calibration.retrieval_context": 32,
        "distillation.tokens": 0})
    with neither_gate_nor_page():
        return prune(copier, asked, tmp_path_factory.mktemp("run") / "run", reporter=Reporter())


def test_the_layer_that_a_trained_model_copies_by_is_found_and_kept(run: Run) -> None:
    parent = run.report["retrieval"]["parent"]
    assert parent["copy_accuracy"] > 0.8 > 0.1 > run.report["retrieval"]["parent"]["kl"] == 0
    table = pd.read_csv(run.path / "scores" / "layers.csv")
    lost, error = table["retrieval_lost"].to_numpy(), table["retrieval_lost_stderr"].to_numpy()
    assert table["kind"].tolist() == list("M*M*")
    assert lost[3] > 0.75 > 0.25 > lost[1] + 2 * error[1]  # of two attention layers one does it
    kl, kl_error = table["retrieval_kl"], table["retrieval_kl_stderr"]
    assert kl[3] - kl[1] > 5 * np.hypot(kl_error[3], kl_error[1])
    document = json.loads((run.path / "candidates.json").read_text())["candidates"]
    assert any(1 not in c["kept_layers"] for c in document)
    assert all(3 in c["kept_layers"] for c in document)
    measured = [c["measured"]["retrieval"] for c in document if c["measured"]]
    assert len(measured) >= 2
    assert all(0 <= m["accuracy"] <= 1 and m["kl"] > 0 and m["lost"] is not None for m in measured)
    assert "measured_retrieval_copy_accuracy" in run.candidates.columns


def test_the_report_shows_what_is_found_again_and_by_which_layers(run: Run) -> None:
    page = render_html(run.report)
    rows = facts.retrieval_rows(Report.read(run.report))
    assert [row["model"] for row in rows] == ["parent", "pruned, not trained", "result"]
    assert "What is found again in the context" in page
    assert rows[0]["copy, right"] in page
    note = facts.retrieval_note(Report.read(run.report))
    assert "3 (attention) " in note
    assert note.endswith("The search kept 3 (search.keep_retrieval).")


def test_keep_retrieval_changes_what_may_go(run: Run) -> None:
    """On from a long context, off where the scores do not tell; an error where they must."""
    scores = LayerScores.read(run.path / "scores")
    parent = replace(ARCH, pattern="M*M*", vocab_size=64)
    space = resolve_space({"drop_attention": [0, 1], "drop_mamba": [0, 2]}, parent)
    assert carriers(parent, scores) == [3]  # the Mamba layers have no KV cache
    for keep, context, kept in (("auto", 2**15 - 1, set()), ("auto", 2**15, {3}), (True, 1, {3}), (False, 2**20, set())):
        found = keep_retrieval(keep, context, parent, space, scores)[1]
        assert found is not None
        assert found.keep == kept
    both = replace(scores, table=scores.table.assign(retrieval_lost=1.0, retrieval_lost_stderr=0.0))
    assert keep_retrieval(True, 1, parent, space, both)[0].drops == {**space.drops, "drop_attention": (0,)}
    unknown = LayerScores(pd.DataFrame({"layer": range(4), "kind": list("M*M*"), "kl": 1.0}))
    assert keep_retrieval("auto", 2**20, parent, space, unknown) == (space, unknown)
    with pytest.raises(InputError, match="needs the column retrieval_lost"):
        keep_retrieval(True, 1, parent, space, unknown)
    must = resolve_space({"drop_attention": [1, 1]}, parent)
    with pytest.raises(InputError, match=r"drops at least 1 of 2 layers, and .* keeps 2 of them"):
        keep_retrieval(True, 1, parent, must, both)


def test_the_search_keeps_these_layers(run: Run) -> None:
    scores = LayerScores.read(run.path / "scores")
    cheap = replace(scores, table=scores.table.assign(kl=[3.0, 2.0, 3.0, 1.0]))  # by KL it would go first
    found = {}
    for keep in (True, False):
        recipe = Recipe().with_overrides(budget={"kv_cache": "0.5x"}, settings={
            "search.keep_retrieval": keep, "space.drop_attention": [0, 1]})
        found[keep] = search_architectures(replace(ARCH, pattern="M*M*", vocab_size=64), cheap,
                                           recipe=recipe, budget="kv_cache=0.5x")[0].kept_layers
    assert all((3 in kept) == keep and (1 in kept) != keep for keep, kept in found.items()), found


def test_evaluate_tells_what_is_found_again(run: Run, copier: Path, recipe: Recipe) -> None:
    found = evaluate(run.model_path, copier, recipe, reporter=Reporter())["retrieval"]
    assert found["accuracy"] == pytest.approx(
        measure_models_of(run.model_path, copier, recipe.calibration.probe_context)["accuracy"], abs=1e-9)
    assert found["kl"] > 0


def measure_models_of(model: Path, teacher: Path, context: int) -> dict[str, Any]:
    parent, other = (Model.load(open_model(folder)) for folder in (teacher, model))
    probe = make_probe(64, context)
    return measure_models(probe, parent, [other], Pass(parent, probe.ids_NT))[1]
