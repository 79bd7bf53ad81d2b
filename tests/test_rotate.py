"""The rotation of the stream: exact at full size, and the cut as the formulas say, against plain
float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ARCH, FAMILY, reference_hidden, reference_logits, relative, tiny_model, tokens, trained_like

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.importance.widths import score_widths
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.rotate import Rotation, find_rotation, rotate

ALL = tuple(range(ARCH.num_layers))


def wide() -> Model:
    return tiny_model(dtype=torch.float64)


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    return final_hidden(model, ids) @ model.head.T


def streams(model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """h / rms(h) at each norm, the final one last: by the references, one model for each depth."""
    out = []
    weights = trained_like(ARCH, dtype=torch.float64)
    plain = weights | {"backbone.norm_f.weight": torch.ones(ARCH.hidden_size, dtype=torch.float64)}
    for depth in range(ARCH.num_layers + 1):
        out.append(reference_hidden(ARCH, plain, ids, tuple(range(depth))))
    return out


def test_folding_and_rotating_change_nothing() -> None:
    model, ids = wide(), tokens(2, 40)
    full = reference_logits(ARCH, trained_like(ARCH, dtype=torch.float64), ids)
    folded = rotate(model, Rotation(np.eye(ARCH.hidden_size), np.ones((1, ARCH.hidden_size))))
    rotated = rotate(model, find_rotation(model, ids))
    assert relative(logits(folded, ids), full) < 1e-10
    assert relative(logits(rotated, ids), full) < 1e-10
    for other in (folded, rotated):
        assert all(torch.equal(w["norm.weight"], torch.ones(32).double()) for w in other.layers)
    assert relative(rotated.layers[0]["mixer.in_proj.weight"], folded.layers[0]["mixer.in_proj.weight"]) > 0.1
    # what is not a part of the stream stays as it is
    same = [n for n in ("mixer.A_log", "mixer.norm.weight", "mixer.conv1d.weight")
            if torch.equal(rotated.layers[0][n], model.layers[0][n])]
    assert len(same) == 3


def test_the_basis_is_that_of_the_normalised_stream() -> None:
    model, ids = wide(), tokens(3, 40)
    rotation = find_rotation(model, ids)
    np.testing.assert_allclose(rotation.basis.T @ rotation.basis, np.eye(32), atol=1e-10)
    at_norms = streams(model, ids)
    assert len(at_norms) == ARCH.num_layers + 1
    seconds = np.stack([(x.flatten(0, 1).T @ x.flatten(0, 1) / ids.numel()).numpy() for x in at_norms])
    values = np.sort(np.linalg.eigvalsh(seconds.sum(0)))[::-1]
    np.testing.assert_allclose(rotation.scores, values, rtol=1e-8)  # descending, and all of the energy
    np.testing.assert_allclose(rotation.energies, np.einsum("dk,lde,ek->lk", rotation.basis, seconds, rotation.basis),
                               rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(rotation.norm_weights(32), 1.0, rtol=1e-10)
    share = rotation.energies[:, :20].sum(1) / rotation.energies.sum(1)
    np.testing.assert_allclose(rotation.norm_weights(20), np.sqrt(share * 32 / 20))
    again = find_rotation(model, ids)
    np.testing.assert_array_equal(again.basis, rotation.basis)


def test_directions_are_scored_by_their_energy() -> None:
    """The hidden axis' width scores when rotating: the first k directions stay, whatever the
    channels' scores say."""
    model, ids = wide(), tokens(3, 40)
    rotation, scores = find_rotation(model, ids), score_widths(model, ids)
    upside_down = dataclasses.replace(scores, hidden=scores.hidden[::-1].copy())
    target = dataclasses.replace(ARCH, hidden_size=12)
    one, two = (Cutter(model, s, rotation).cut(target, ALL).by_name() for s in (scores, upside_down))
    assert all(torch.equal(one[n], two[n]) for n in one)
    turned = rotate(model, rotation).top["backbone.embeddings.weight"]
    assert torch.equal(one["backbone.embeddings.weight"], turned[:, :12])
    np.testing.assert_allclose(Cutter(model, scores, rotation).turned.hidden ** 2, rotation.energies.sum(0), atol=1e-9)
    assert Cutter(model, scores).turned is scores


def test_the_cut_is_the_projection_by_hand() -> None:
    """Readers W diag(g) Q_k, writers Q_k' W, embeddings E Q_k, norm weights sqrt(e D / k)."""
    model, ids, keep = wide(), tokens(2, 40), 20
    rotation, scores = find_rotation(model, ids), score_widths(model, ids)
    target = dataclasses.replace(ARCH, hidden_size=keep)
    small = Cutter(model, scores, rotation).cut(target, ALL)
    q = torch.from_numpy(rotation.basis[:, :keep])
    gains = rotation.norm_weights(keep)
    weights, expected = trained_like(ARCH, dtype=torch.float64), {}
    for name, w in weights.items():
        inside = name.startswith("backbone.layers.")
        layer = int(name.split(".")[2]) if inside else ARCH.num_layers
        norm = f"backbone.layers.{layer}.norm.weight" if inside else "backbone.norm_f.weight"
        part = name.split(".")[-2]
        if name == norm:
            w = torch.full((keep,), gains[layer], dtype=torch.float64)
        elif part == "embeddings":
            w = w @ q
        elif part in ("out_proj", "o_proj", "down_proj"):
            w = q.T @ w
        elif part in ("in_proj", "q_proj", "k_proj", "v_proj", "up_proj", "lm_head"):
            w = (w * weights[norm]) @ q
        expected[name] = w
    found = small.by_name()
    assert {n: tuple(t.shape) for n, t in found.items()} == target.shapes()
    for name, w in expected.items():
        assert relative(found[name], w) < 1e-9, name
    assert relative(logits(small, ids), reference_logits(target, expected, ids)) < 1e-9


def test_rotation_beats_selection() -> None:
    """On a stream of which half the directions carry little, none of them a channel."""
    chance = np.random.default_rng(0)
    mix = torch.from_numpy(np.linalg.qr(chance.normal(size=(32, 32)))[0])
    gains = torch.cat([torch.ones(16), torch.full((16,), 0.05)]).double()
    weights = trained_like(ARCH, dtype=torch.float64)
    for name, w in weights.items():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            weights[name] = mix @ (gains[:, None] * (mix.T @ w))
        if name == "backbone.embeddings.weight":
            weights[name] = (w @ mix) * gains @ mix.T
    model, ids = Model.build(FAMILY, ARCH, weights.items()), tokens(4, 40)
    scores, target = score_widths(model, ids), dataclasses.replace(ARCH, hidden_size=20)
    full = logits(model, ids)
    plain = relative(logits(Cutter(model, scores).cut(target, ALL), ids), full)
    turned = relative(logits(Cutter(model, scores, find_rotation(model, ids)).cut(target, ALL), ids), full)
    assert turned < 0.5 * plain


def test_nothing_cut_is_the_parent_itself() -> None:
    model, ids = tiny_model(), tokens(2, 30)
    cutter = Cutter(model, score_widths(model, ids), find_rotation(model, ids))
    same = cutter.cut(ARCH, ALL)
    assert all(torch.equal(t, same.by_name()[n]) for n, t in model.by_name().items())
    kept = (0, 1, 3)
    small = cutter.cut(dataclasses.replace(ARCH.keep(kept), ffn_size=20), kept)
    assert torch.equal(small.top["lm_head.weight"], model.top["lm_head.weight"])


def test_expanding_gives_the_lm_head_what_it_knew() -> None:
    model, ids = wide(), tokens(2, 30)
    cutter = Cutter(model, score_widths(model, ids), find_rotation(model, ids))
    small = cutter.cut(dataclasses.replace(ARCH, hidden_size=24), ALL)
    hidden = final_hidden(small, ids)
    assert relative(cutter.expand(hidden) @ model.head.T, hidden @ small.head.T) < 1e-10
    plain = Cutter(model, cutter.scores)
    hidden = final_hidden(plain.cut(dataclasses.replace(ARCH, hidden_size=24), ALL), ids)
    assert plain.expand(hidden).shape[-1] == 32
    assert relative(plain.expand(hidden) @ model.head.T,
                    hidden @ plain.cut(dataclasses.replace(ARCH, hidden_size=24), ALL).head.T) < 1e-12
    assert torch.equal(plain.expand(plain.expand(hidden)), plain.expand(hidden))


def test_a_rotation_in_a_file(tmp_path: Path) -> None:
    rotation = find_rotation(wide(), tokens(2, 30))
    rotation.write(tmp_path / "rotation.safetensors")
    again = Rotation.read(tmp_path / "rotation.safetensors")
    np.testing.assert_array_equal(again.basis, rotation.basis)
    np.testing.assert_array_equal(again.energies, rotation.energies)
    (tmp_path / "rotation.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        Rotation.read(tmp_path / "rotation.safetensors")
