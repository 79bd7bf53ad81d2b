"""A trained MoE hybrid (tests/data/moe) through the whole pipeline; experts on disk; scores against
their definitions."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import relative, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from minipuzzle import Recipe, prune
from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.scores import WidthScores
from minipuzzle.costs.cost import parameters_by_kind
from minipuzzle.families.experts import grouped_product
from minipuzzle.importance.widths import expert_load, score_widths
from minipuzzle.models.module import HybridLM
from minipuzzle.models.selection import select
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.search.space import resolve_space
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.rotate import find_rotation

TRAINED = Path(__file__).parent / "data" / "moe"
SMALL = {"search.measure": 4, "search.finalists": 1, "calibration.samples": 8, "calibration.sequence_length": 128,
         "evaluation.samples": 8, "distillation.tournament_tokens": "8k", "distillation.tokens": "16k",
         "distillation.sequence_length": 128, "space.hidden_size": ["0.75x", "1x", "0.25x"],
         "space.mamba_num_heads": "1x", "space.drop_mamba": 0, "space.shared_ffn_size": "1x", "space.drop_attention": 0}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with one MTP depth beside it (`*E`), as checkpoints are published."""
    folder = tmp_path_factory.mktemp("parent") / "moe"
    shutil.copytree(TRAINED, folder)
    weights = load_file(TRAINED / "model.safetensors")
    hidden = weights["backbone.norm_f.weight"]
    depth = {f"mtp.layers.{to}.{name.removeprefix(f'backbone.layers.{source}.')}": weight.clone()
             for to, source in ((0, 3), (1, 1)) for name, weight in weights.items()
             if name.startswith(f"backbone.layers.{source}.")}
    depth |= {f"mtp.layers.0.{name}.weight": hidden.clone() for name in ("enorm", "hnorm")}
    depth |= {"mtp.layers.1.final_layernorm.weight": hidden.clone(),
              "mtp.layers.0.eh_proj.weight": torch.ones(len(hidden), 2 * len(hidden), dtype=hidden.dtype)}
    save_file(weights | depth, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def run(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts = tmp_path_factory.mktemp("texts")
    for file in sorted(Path(os.__file__).parent.glob("*.py")):  # what it was trained on, a part
        (texts / f"{file.stem}.txt").write_bytes(file.read_bytes())
    recipe = Recipe.load("default", data=str(texts), budget={"memory": "0.8x", "active_params": "0.85x"}, settings=SMALL)
    return prune(parent, recipe, output_dir=tmp_path_factory.mktemp("moe") / "run")


def test_a_trained_hybrid_is_pruned_under_two_budgets_and_opens_in_transformers(run: Any) -> None:
    """Untouched, with this engine's logits; distillation recovers some of the loss."""
    from transformers import AutoModelForCausalLM

    report = json.loads((run.path / "report.json").read_text())
    parent, result = report["parent"], report["result"]
    cost = result["cost"]
    assert cost["memory_bytes"] <= report["budget"]["memory"]["limit"]
    assert cost["active_parameters"] <= report["budget"]["active_params"]["limit"]
    assert parent["loss"] < result["loss_distilled"] < result["loss_sliced"]
    assert result["recovery"] > 0.3
    opened, ids = open_model(run.model_path), tokens(2, 200, vocab=open_model(TRAINED).arch.vocab_size)
    theirs = AutoModelForCausalLM.from_pretrained(run.model_path, dtype=torch.float32).eval()
    model = Model.load(opened)
    with torch.no_grad():
        assert relative(final_hidden(model, ids) @ model.head.T, theirs(ids, use_cache=False).logits) < 1e-4
    loads, arch = report["expert_load"], opened.arch
    assert set(loads) == {"parent", "pruned", "distilled"}
    for load in loads["distilled"].values():
        assert len(load) == arch.num_experts
        assert sum(load) == pytest.approx(arch.experts_per_token, abs=1e-3)
    assert loads["pruned"] != loads["distilled"]



def test_mtp_layers_are_counted_left_out_and_told(run: Any, parent: Path) -> None:
    """Their parameters are those of the file; the result has no trace of them; report and card say it."""
    weights = {name: weight for name, weight in load_file(parent / "model.safetensors").items()
               if not name.endswith("e_score_correction_bias")}  # a buffer, no parameter
    apart = sum(weight.numel() for name, weight in weights.items() if name.startswith("mtp."))
    counts = parameters_by_kind(open_model(parent).arch)
    assert (counts["mtp"], counts["total"]) == (apart, sum(map(torch.numel, weights.values())) - apart)
    note = f"multi-token prediction (*E, {apart:,} parameters) is left out"
    assert any(warning.startswith(note) for warning in json.loads((run.path / "report.json").read_text())["warnings"])
    assert note in (run.model_path / "README.md").read_text().replace("\\", "")
    config = json.loads((run.model_path / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert not [key for key in config if key.startswith("mtp_")]
    assert not [name for name in load_file(run.model_path / "model.safetensors") if name.startswith("mtp.")]


def test_experts_lie_apart_on_disk_or_in_one_piece(tmp_path: Path) -> None:
    """As published checkpoints have them, as `save_pretrained` writes them, and as transformers
    holds them in memory: the same model."""
    weights = tiny.trained_like(tiny.MOE)
    folder = tiny.write_folder(tmp_path / "apart", tiny.MOE, weights, mlp_bias=True)
    theirs = tiny.transformers_model(tiny.MOE, weights)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "stacked").mkdir()
    (tmp_path / "stacked" / "config.json").write_text((folder / "config.json").read_text())
    save_file(theirs.state_dict(), tmp_path / "stacked" / "model.safetensors")
    for name, count in (("apart", 8), ("theirs", 8), ("stacked", 1)):
        opened = open_model(tmp_path / name)
        where = "backbone.layers.1.mixer.experts.{num_experts}.up_proj.weight"
        assert len(opened.files[where]) == count
        assert all(torch.equal(t, weights[n]) for n, t in Model.load(opened).by_name().items())
        slice_ = (slice(2, 5), slice(0, 3), slice(None))
        assert torch.equal(opened.part(where, slice_), weights[where][slice_])
    tensors = load_file(folder / "model.safetensors")
    gone = "backbone.layers.4.mixer.experts.3.down_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != gone}, folder / "model.safetensors")
    with pytest.raises(CorruptArtifact, match=r"lacks 1 weights, first .*layers\.4\.mixer\.experts\.3\.down"):
        open_model(folder)


def reached(arch: Any, weights: Any, layer: int, x: torch.Tensor) -> tuple[dict[Any, list[float]], dict[Any, list[Any]]]:
    """By hand: (sample, expert) -> w |E(x)| of each token that came, its activations."""
    w = tiny.layer_weights(weights, layer)
    up, down = (w[f"mixer.experts.{{num_experts}}.{n}_proj.weight"] for n in ("up", "down"))
    per, norms, inner = arch.num_experts // arch.router_groups, {}, {}
    for b, sample in enumerate(x):
        for token in sample:
            s = torch.sigmoid(w["mixer.gate.weight"] @ token)
            choice = s + w["mixer.gate.e_score_correction_bias"]
            group = max(range(arch.router_groups), key=lambda g: float(choice[g * per : g * per + per].topk(2)[0].sum()))
            chosen = (choice[group * per : group * per + per].topk(arch.experts_per_token)[1] + group * per).tolist()
            inside = w["mixer.fc1_latent_proj.weight"] @ token + w["mixer.fc1_latent_proj.bias"]
            for e in chosen:
                h = torch.relu(up[e] @ inside).square()
                weight = s[e] / s[chosen].sum() * arch.routed_scaling_factor
                norms.setdefault((b, e), []).append(float(weight * (down[e] @ h).norm()))
                inner.setdefault((b, e), []).append(h)
    return norms, inner


def test_experts_score_by_reap_and_their_neurons_on_the_tokens_that_came() -> None:
    arch, weights, ids = tiny.MOE, tiny.trained_like(tiny.MOE, dtype=torch.float64), tokens(3, 17)
    model, seen = Model.build(arch.family, arch, weights.items()), {}
    final_hidden(model, ids, lambda i, place, x: seen.setdefault((i, place), x))
    scores = score_widths(model, ids)
    for layer in arch.layers_of("E"):
        norms, inner = reached(arch, weights, layer, seen[layer, "hidden"])
        for e in range(arch.num_experts):
            each = [norms.get((b, e), []) for b in range(3)]
            count = sum(map(len, each))
            mean = sum(map(sum, each)) / max(count, 1)
            assert scores.layers["moe_experts"][layer][e] == pytest.approx(mean, rel=1e-9)
            assert scores.load["moe_experts"][layer][e] == pytest.approx(count / (3 * 17))
            error = sum((sum(n) - mean * len(n)) ** 2 for n in each) * 3 / 2
            assert scores.stderr["moe_experts"][layer][e] == pytest.approx(error**0.5 / max(count, 1), abs=1e-9)
            squares = sum(torch.stack(inner[b, e]).mean(0) ** 2 for b in range(3) if (b, e) in inner)
            assert np.allclose(scores.layers["moe_neurons"][layer][e], torch.as_tensor(squares) ** 0.5, rtol=1e-9)


def test_each_expert_keeps_its_own_neurons_and_each_group_its_best_experts() -> None:
    arch = tiny.MOE
    model = tiny.tiny_model(arch)
    scores = score_widths(model, tokens(4, 30))
    target = dataclasses.replace(arch, num_experts=6, moe_ffn_size=16)
    small = model.slice(target, select(arch, target, tuple(range(6)), scores))
    for layer in arch.layers_of("E"):
        by, neurons = scores.layers["moe_experts"][layer], scores.layers["moe_neurons"][layer]
        experts = [e for g in (0, 4) for e in sorted(np.argsort(-by[g : g + 4])[:3] + g)]
        old, new = model.layers[layer], small.layers[layer]
        for name in ("mixer.gate.weight", "mixer.gate.e_score_correction_bias"):
            assert torch.equal(new[name], old[name][experts])
        for at, e in enumerate(experts):
            own = sorted(np.argsort(-neurons[e])[:16])
            for name, dim in (("up", 0), ("down", 1)):
                name = f"mixer.experts.{{num_experts}}.{name}_proj.weight"
                assert torch.equal(new[name][at], old[name][e].index_select(dim, torch.tensor(own)))


def test_a_rotation_of_the_stream_changes_nothing_until_it_is_cut() -> None:
    for latent in (0, 16):
        arch = dataclasses.replace(tiny.MOE, moe_latent_size=latent)
        model, ids = tiny.tiny_model(arch, dtype=torch.float64), tokens(4, 40)
        cutter = Cutter(model, score_widths(model, ids), find_rotation(model, ids))
        every = tuple(range(arch.num_layers))
        cut = cutter.cut(dataclasses.replace(arch, hidden_size=24), every)
        assert {n: tuple(t.shape) for n, t in cut.by_name().items()} == dataclasses.replace(arch, hidden_size=24).shapes()
        basis = torch.from_numpy(cutter.rotation.basis)
        wide = model.by_name()
        for layer in arch.layers_of("E"):  # what reads and what writes, in the rotated basis
            prefix = arch.family.layer_prefix(layer)
            folded = basis.T @ torch.diag(wide[f"{prefix}norm.weight"])
            for name in arch.family.kinds["E"].reads(arch.sizes())["norm.weight"]:
                want = (wide[prefix + name] @ folded.T)[..., :24]
                assert relative(cut.by_name()[prefix + name], want) < 1e-12
        assert len(arch.family.kinds["E"].reads(arch.sizes())["norm.weight"]) == 3


def test_ranges_that_a_router_cannot_choose_from() -> None:
    """Relative ones are clipped, numbers are an error; so are widths that a grouped product
    refuses."""
    parent = dataclasses.replace(tiny.MOE, num_experts=8, router_groups=1, experts_per_token=6)
    assert resolve_space({"num_experts": ["0.25x", "1x", "0.25x"]}, parent).widths["num_experts"] == (6, 8)
    with pytest.raises(InputError, match=r"num_experts: 4 is too few: experts_per_token \* router_groups \(6\)"):
        resolve_space({"num_experts": [4, 8, 2]}, parent)
    with pytest.raises(InputError, match=r"num_experts .*: 7 is not a multiple of router_groups 2"):
        resolve_space({"num_experts": [7, 8]}, tiny.MOE)
    with pytest.raises(InputError, match=r"moe_ffn_size .*: 12 is not a multiple of 8, as a grouped product needs"):
        resolve_space({"moe_ffn_size": [12, 24, 12]}, tiny.MOE)


@pytest.mark.parametrize(("dtype", "inner"), [(torch.float32, 24), (torch.float32, 5), (torch.float64, 24),
                                              (torch.bfloat16, 24)])
def test_a_grouped_product_is_that_of_each_expert(dtype: torch.dtype, inner: int) -> None:
    """Forward and backward, with an expert that no token came to."""
    x, w = torch.randn(19, 16, dtype=dtype, requires_grad=True), torch.randn(4, inner, 16, dtype=dtype, requires_grad=True)
    y = grouped_product(x, w, torch.tensor([3, 3, 10, 19], dtype=torch.int32))
    which = torch.tensor([0] * 3 + [2] * 7 + [3] * 9)
    plain = torch.einsum("sk,snk->sn", x.double(), w.double()[which])
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, w), grad)
    wanted = torch.autograd.grad(plain, (x, w), grad.double())
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    pairs = list(zip((y.detach(), *found), (plain.detach(), *wanted), strict=True))
    assert len(pairs) == 3
    assert max(relative(*pair) for pair in pairs) < limit


def test_shapes_are_known_without_numbers() -> None:
    """On fake tensors, forward and backward: the routed shapes do not depend on the data."""
    with FakeTensorMode():
        weights = {n: torch.empty(shape) for n, shape in tiny.MOE.shapes().items()}
        module = HybridLM(tiny.FAMILY, tiny.MOE, weights)
        out = module(torch.zeros(2, 30, dtype=torch.long))
        out.sum().backward()
    assert out.shape == (2, 30, tiny.MOE.hidden_size)
    assert sum(p.grad is None for p in module.parameters()) == len(tiny.MOE.buffers) + 1  # and the LM head


def test_training_moves_the_router_and_not_its_correction() -> None:
    weights = tiny.trained_like(tiny.MOE)
    module = HybridLM(tiny.FAMILY, tiny.MOE, weights)
    block = module.blocks[1]
    block.compute = torch.bfloat16
    used = block.cast()
    block.compute = None
    assert used["mixer.gate.weight"].dtype == torch.bfloat16
    assert used["mixer.gate.e_score_correction_bias"].dtype == torch.float32  # a rounded one is another router
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    (module(tokens(2, 30)) @ module.head.T).logsumexp(-1).mean().backward()
    optimizer.step()
    same = {n for n, p in module.parameters_by_name().items() if torch.equal(p, weights[n])}
    assert same == tiny.MOE.buffers


def test_what_is_left_out_or_was_not_reached_is_said(run: Any, tmp_path: Path) -> None:
    from minipuzzle.stages.notes import mtp_note, unreached_note

    arch = dataclasses.replace(tiny.MOE, mtp_pattern="*E")
    assert mtp_note(tiny.MOE) == ""
    assert mtp_note(arch).startswith("multi-token prediction (*E, ")
    assert arch.to_config(tiny.PARENT_CONFIG)["num_nextn_predict_layers"] == 0
    model = tiny.tiny_model(tiny.MOE)
    model.layers[1]["mixer.gate.e_score_correction_bias"][5] = -100.0
    widths = score_widths(model, tokens(2, 30))
    widths.write(tmp_path / "widths.safetensors")
    again = WidthScores.read(tmp_path / "widths.safetensors")
    assert again.layers["moe_experts"][1][5] == again.load["moe_experts"][1][5] == 0
    assert "no calibration token came to " in unreached_note(again)
    assert "(in layer 1: 5" in unreached_note(again)
    assert expert_load(model, tokens(2, 30))[1][5] == 0
