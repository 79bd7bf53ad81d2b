"""The trained small MoE hybrid of tests/data: that its experts matter, and that it is pruned end to end.

A router that is cut wrongly does not show on random weights; here it does.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from meta import counts
from test_prune import recipe_for
from tiny import relative
from transformers import AutoModelForCausalLM, AutoTokenizer

from minipuzzle import prune
from minipuzzle.core.scores import WidthScores
from minipuzzle.data.corpus import documents, is_held_out
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.importance.widths import score_widths
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.surgery.cut import Cutter
from minipuzzle.verbs.run import Run

FOLDER = Path(__file__).parent / "data" / "moe"
RECIPE = """
recipe: 1
budget: {memory: 0.5x, active_params: 0.7x}
workload: {context: 128}
calibration: {data: DATA, samples: 8, sequence_length: 128}
space:
  {drop_mamba: [0, 1], drop_moe: [0, 1], hidden_size: [48, 64, 16], num_experts: [8, 16, 4], moe_ffn_size: [24, 40, 16],
   shared_ffn_size: [32, 64, 32], mamba_num_heads: [4, 8, 2]}
search: {measure: 4, finalists: 2}
evaluation: {data: DATA, samples: 8}
distillation:
  {data: DATA, tournament_tokens: 4k, tokens: 16k, sequence_length: 128, batch_tokens: 1k, learning_rate: 2.0e-3}
"""


@pytest.fixture(scope="module")
def source_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 modules of the standard library: what the model was trained on, and what it was not."""
    folder = tmp_path_factory.mktemp("modules")
    held_out = [(name, text) for name, text in documents("stdlib") if is_held_out(name)]
    others = [(name, text) for name, text in documents("stdlib") if not is_held_out(name)]
    for number, (_, text) in enumerate([*held_out[:20], *others[:180]]):
        (folder / f"{number:03}.txt").write_text(text[:20_000])
    return folder


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    """[16, 128] tokens of modules that the model was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "\n".join(text[:4000] for name, text in documents("stdlib") if is_held_out(name))[:40_000]
    return torch.tensor(tokenizer(text)["input_ids"][: 16 * 128]).view(16, 128)


@pytest.fixture(scope="module")
def parent() -> Model:
    return Model.load(open_model(FOLDER))


def test_it_is_small_trained_and_the_same_in_transformers(parent: Model, held_out: torch.Tensor) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1_300_000
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(held_out, use_cache=False).logits
    assert relative(final_hidden(parent, held_out) @ parent.head.T, logits) < 1e-5
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
    frequency = torch.bincount(held_out.flatten()) / held_out.numel()
    assert loss < 0.5 * torch.special.entr(frequency).sum()  # of single tokens


def test_each_expert_of_each_layer_matters_and_the_scores_know_which_more(parent: Model, held_out: torch.Tensor) -> None:
    reference = Reference(parent, held_out)
    scores = score_widths(parent, held_out)
    target = dataclasses.replace(parent.arch, num_experts=parent.arch.num_experts * 3 // 4)
    kept = tuple(range(parent.arch.num_layers))

    def kl(sign: int) -> float:
        reap = {layer: sign * score for layer, score in scores.layers["moe_experts"].items()}
        cut = Cutter(parent, dataclasses.replace(scores, layers=scores.layers | {"moe_experts": reap}))
        return measure(cut.cut(target, kept), reference)["kl"]

    best, worst = kl(1), kl(-1)
    assert 0.01 < best < 0.7 * worst
    loads = list(scores.load["moe_experts"].values())
    assert len(loads) == parent.arch.pattern.count("E")
    each = parent.arch.experts_per_token / parent.arch.num_experts
    assert all(load.sum() == pytest.approx(parent.arch.experts_per_token) for load in loads)
    assert all(0.1 * each < load.min() and load.max() < 4 * each for load in loads)  # balanced, and no expert idle


@pytest.fixture(scope="module")
def finished(source_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prune(FOLDER, recipe_for(source_texts, RECIPE), tmp_path_factory.mktemp("runs") / "run")


def test_it_is_pruned_end_to_end_under_two_budgets(finished: Run, parent: Model) -> None:
    report = json.loads(finished.report_path.with_suffix(".json").read_text())
    document = json.loads((finished.path / "candidates.json").read_text())
    chosen = next(c for c in document["candidates"] if c["chosen"])
    budget, costs = document["budget"], document["parent"]["cost"]
    assert chosen["cost"]["memory_bytes"] <= budget["memory"]["limit"] <= costs["memory_bytes"] / 2
    assert chosen["cost"]["active_parameters"] <= budget["active_params"]["limit"] <= costs["active_parameters"] * 0.7
    result = report["result"]
    assert report["parent"]["loss"] < result["loss_distilled"] < result["loss_pruned"]

    folder = finished.model_path
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(200).view(1, 200)
    with torch.no_grad():
        logits = theirs(ids, use_cache=False).logits
    mine = Model.load(open_model(folder))
    assert relative(final_hidden(mine, ids) @ mine.head.T, logits) < 1e-4
    found = counts(theirs)
    assert (found["total"], found["active"]) == (chosen["cost"]["parameters"], chosen["cost"]["active_parameters"])
    config = json.loads((folder / "config.json").read_text())
    names = {"n_routed_experts": "num_experts", "num_experts_per_tok": "experts_per_token", "hidden_size": "hidden_size",
             "moe_intermediate_size": "moe_ffn_size", "moe_shared_expert_intermediate_size": "shared_ffn_size",
             "hybrid_override_pattern": "pattern"}
    assert {key: config[key] for key in names} == {key: chosen["architecture"][name] for key, name in names.items()}


def test_scores_of_experts_carry_their_errors_and_loads(finished: Run, parent: Model) -> None:
    scores = WidthScores.read(finished.path / "scores" / "widths.safetensors")
    layers = parent.arch.layers_of("E")
    for layer in layers:
        score, error = scores.layers["moe_experts"][layer], scores.stderr["moe_experts"][layer]
        assert score.shape == error.shape == (parent.arch.num_experts,)
        assert np.all(score > 0)
        assert np.all((error > 0) & (error < score))
