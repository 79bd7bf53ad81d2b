"""Surgery: what is sliced is what was asked for, against plain references in float64."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import (
    ARCH,
    FAMILY,
    config_of,
    layer_weights,
    make_selection,
    reference_attention,
    reference_ffn_inner,
    reference_hidden,
    reference_logits,
    reference_scan,
    relative,
    tiny_model,
    tokens,
    trained_like,
    transformers_model,
    write_folder,
)

from minipuzzle.core.budget import Workload
from minipuzzle.core.errors import CorruptArtifact, InputError, UnsupportedModel
from minipuzzle.core.scores import WidthScores
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.module import HybridLM
from minipuzzle.models.selection import Selection, select
from minipuzzle.models.slicing import slice_model
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.verbs.source import bundled_model

ALL = tuple(range(ARCH.num_layers))
MAMBA_LAYERS, FFN_LAYERS = ARCH.layers_of("M"), ARCH.layers_of("-")
HEADS, CHANNELS = np.array([1, 3, 4, 7]), np.array([0, 2, 3, 5, 7])  # two heads of each group of four
HIDDEN, NEURONS = np.array([*range(0, 32, 3), 1, 31]), np.arange(5, 48, 2)
HIDDEN.sort()


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """name -> (dtype, shape, bytes), read from the safetensors files without the library."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, about in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in about["data_offsets"])
                out[name] = (about["dtype"], tuple(about["shape"]), data[begin:end])
    return out


def random_scores(arch: Architecture, seed: int = 0) -> WidthScores:
    chance = np.random.default_rng(seed)
    return WidthScores(chance.random(arch.hidden_size),
                       {"ffn": {i: chance.random(arch.sizes(i)["ffn_size"]) for i in arch.layers_of("-")},
                        "mamba": {i: chance.random((arch.mamba_num_heads, arch.mamba_head_dim))
                                  for i in arch.layers_of("M")}}, 4)


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    return final_hidden(model, ids) @ model.head.T


def masked_logits(arch: Architecture, weights: Mapping[str, torch.Tensor], ids: torch.Tensor, selection: Selection,
                  correct_means: bool = True) -> torch.Tensor:
    """The parent at its full size, in float64, with zeros wherever something is not selected.

    A norm's mean square is over the kept channels: sum / kept. Without `correct_means` it is over
    all of them, which is what a masked model computes and a sliced one does not.
    """
    kept = selection.stream.get("hidden_size", np.arange(arch.hidden_size))
    mask = _mask(arch.hidden_size, kept)
    count = len(kept) if correct_means else arch.hidden_size

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight.double() * x / torch.sqrt((x * x).sum(-1, keepdim=True) / count + arch.norm_eps)

    x = weights["backbone.embeddings.weight"].double()[ids] * mask
    for i in selection.kept_layers:
        w, index = layer_weights(weights, i), selection.of(i)
        h = norm(x, w["norm.weight"])
        if arch.pattern[i] == "*":
            y = reference_attention(arch, w, h)
        elif arch.pattern[i] == "-":
            up = reference_ffn_inner(w, h)
            y = (up * _mask(up.shape[-1], index.get("ffn_size"))) @ w["mixer.down_proj.weight"].T
        else:
            y = _gated_norm(arch, w["mixer.norm.weight"], reference_scan(arch, w, h), index.get("mamba_num_heads"),
                            index.get("mamba_head_dim"), correct_means) @ w["mixer.out_proj.weight"].T
        x = x + y * mask
    return norm(x, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].double().T


def _mask(size: int, kept: np.ndarray | None) -> torch.Tensor:
    out = torch.zeros(size, dtype=torch.float64)
    out[torch.arange(size) if kept is None else torch.from_numpy(kept)] = 1
    return out


def _gated_norm(arch: Architecture, weight: torch.Tensor, y: torch.Tensor, heads: np.ndarray | None,
                channels: np.ndarray | None, correct_means: bool) -> torch.Tensor:
    """The grouped norm of a Mamba block over the kept heads of each group, head by head."""
    hd, per = arch.mamba_head_dim, arch.mamba_num_heads // arch.n_groups
    heads = np.arange(arch.mamba_num_heads) if heads is None else heads
    channels = np.arange(hd) if channels is None else channels
    out = torch.zeros_like(y)
    for group in range(arch.n_groups):
        places = [h * hd + c for h in heads if h // per == group for c in channels]
        count = len(places) if correct_means else per * hd
        scale = torch.sqrt(y[..., places].square().sum(-1, keepdim=True) / count + arch.norm_eps)
        out[..., places] = weight[places] * y[..., places] / scale
    return out


def smaller(**widths: int) -> Architecture:
    return dataclasses.replace(ARCH, **widths)


def sliced_equals_reference(selection: Selection, target: Architecture) -> None:
    """The sliced model is the masked reference, and not the model masked without care for its
    norms."""
    weights, ids = trained_like(ARCH, dtype=torch.float64), tokens(2, 37)
    mine = logits(tiny_model(dtype=torch.float64).slice(target, selection), ids)
    assert relative(mine, masked_logits(ARCH, weights, ids, selection)) < 1e-10


# the identity
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "mixed"])
@pytest.mark.parametrize("explicit", [False, True])
def test_full_size_is_the_identity_bit_for_bit(tmp_path: Path, dtype: torch.dtype | str, explicit: bool) -> None:
    weights = trained_like(ARCH)
    if dtype == "mixed":  # as published checkpoints are: the recurrence in float32, the rest in bfloat16
        weights = {k: v if k.endswith(("A_log", ".D", "dt_bias")) else v.bfloat16() for k, v in weights.items()}
    else:
        weights = {k: v.to(dtype) for k, v in weights.items()}
    parent = open_model(write_folder(tmp_path / "parent", weights=weights))
    selection = select(ARCH, ARCH, ALL, random_scores(ARCH))
    if explicit:  # the same with index lists that keep everything
        selection = make_selection(ALL, np.arange(32), ffn={i: np.arange(48) for i in FFN_LAYERS},
                                   heads={i: np.arange(8) for i in MAMBA_LAYERS},
                                   channels={i: np.arange(8) for i in MAMBA_LAYERS})
    write_model(tmp_path / "child", ARCH.to_config(parent.config),
                slice_model(ARCH, ARCH, selection, parent.read))
    before, after = raw_tensors(tmp_path / "parent"), raw_tensors(tmp_path / "child")
    assert len(before) == len(ARCH.shapes()) > 40
    assert after == before


def test_the_bundled_model_survives_float32_and_back(tmp_path: Path) -> None:
    """The way of the pipeline: read in float32, sliced, made trainable, written in the dtype it
    had."""
    parent = open_model(bundled_model())
    model = Model.load(parent)
    everything = tuple(range(parent.arch.num_layers))
    student = HybridLM(parent.family, parent.arch, model.slice(parent.arch, Selection(everything)).by_name())
    write_model(tmp_path / "model", parent.arch.to_config(parent.config),
                ((n, p.detach().to(parent.dtype)) for n, p in student.parameters_by_name().items()), parent.path)
    before = raw_tensors(parent.path)
    assert len(before) > 100
    assert raw_tensors(tmp_path / "model") == before
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (parent.path / "tokenizer.json").read_bytes()
    assert open_model(tmp_path / "model").arch == parent.arch


# parameters
# ------------------------------------------------------------------------------------------------------


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    groups, kv = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return Architecture(
        "".join(draw(st.lists(st.sampled_from("M*-"), min_size=1, max_size=6))), vocab_size=draw(st.integers(3, 40)),
        hidden_size=draw(st.integers(2, 24)), ffn_size=draw(st.integers(2, 40)),
        mamba_num_heads=groups * draw(st.integers(1, 4)), mamba_head_dim=draw(st.integers(1, 6)), n_groups=groups,
        state_size=draw(st.integers(1, 5)), num_attention_heads=kv * draw(st.integers(1, 3)), num_key_value_heads=kv,
        head_dim=draw(st.sampled_from((2, 4, 6))), conv_kernel=draw(st.integers(2, 4)), use_bias=draw(st.booleans()),
        conv_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))


@st.composite
def parents_and_children(draw: st.DrawFn) -> tuple[Architecture, Architecture, tuple[int, ...]]:
    """A parent, an architecture no larger than it in any width, and the parent's layers that it
    has."""
    parent = draw(architectures())
    kept = tuple(i for i in range(parent.num_layers) if draw(st.booleans())) or (0,)
    target = dataclasses.replace(
        parent.keep(kept), hidden_size=draw(st.integers(1, parent.hidden_size)),
        ffn_size=draw(st.integers(1, parent.ffn_size)),  # type: ignore[arg-type]
        mamba_num_heads=parent.n_groups * draw(st.integers(1, parent.mamba_num_heads // parent.n_groups)),
        mamba_head_dim=draw(st.integers(1, parent.mamba_head_dim)))
    return parent, target, kept


@settings(max_examples=60)
@given(parents_and_children())
def test_a_written_model_has_exactly_the_parameters_it_costs(
        tmp_path_factory: pytest.TempPathFactory, family: tuple[Architecture, Architecture, tuple[int, ...]]) -> None:
    parent, target, kept = family
    folder = tmp_path_factory.mktemp("written")
    model = Model.build(FAMILY, parent, trained_like(parent).items())
    write_model(folder / "model", config_of(target),
                model.slice(target, select(parent, target, kept, random_scores(parent))).by_name().items())
    count = sum(int(np.prod(shape)) for _, shape, _ in raw_tensors(folder / "model").values())
    assert count == cost(target, Workload()).parameters
    assert open_model(folder / "model").arch == target


@pytest.mark.parametrize("change", [{}, {"use_bias": True, "mlp_bias": True},
                                    {"conv_bias": False, "n_groups": 4, "head_dim": 6, "conv_kernel": 3}])
def test_transformers_counts_the_same_and_computes_the_same(tmp_path: Path, change: dict[str, int]) -> None:
    from transformers import AutoModelForCausalLM

    arch = dataclasses.replace(ARCH, **change)  # type: ignore[arg-type]
    target = dataclasses.replace(arch.keep((0, 1, 3, 4, 6)), hidden_size=20, ffn_size=18, mamba_num_heads=4,
                                 mamba_head_dim=5)
    parent = open_model(write_folder(tmp_path / "parent", arch, trained_like(arch)))
    selection = select(arch, target, (0, 1, 3, 4, 6), random_scores(arch))
    write_model(tmp_path / "model", target.to_config(parent.config),
                slice_model(arch, target, selection, parent.read), shard_bytes=6000)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 3
    loaded, about = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32,
                                                         output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    assert sum(p.numel() for p in loaded.parameters()) == cost(target, Workload()).parameters
    ids = tokens(2, 40)
    with torch.no_grad():
        theirs = loaded.eval()(ids, use_cache=False).logits
    raw = open_model(tmp_path / "model")
    mine = logits(Model.load(raw), ids)
    assert relative(mine, theirs) < 1e-5
    plain = reference_logits(target, {n: raw.read(n) for n in raw.files}, ids)
    assert relative(mine, plain) < 1e-5


# slices against references
# ---------------------------------------------------------------------------------------


def mamba_selection_of(heads: np.ndarray, channels: np.ndarray) -> Selection:
    return make_selection(ALL, heads=dict.fromkeys(MAMBA_LAYERS, heads), channels=dict.fromkeys(MAMBA_LAYERS, channels))


def test_mamba_heads_equal_the_reference() -> None:
    sliced_equals_reference(mamba_selection_of(HEADS, np.arange(8)), smaller(mamba_num_heads=4))


def test_a_head_in_another_group_is_another_model() -> None:
    """Three heads of one group and one of the other: the third reads the B, C and norm of a group
    that is not its own."""
    moved = mamba_selection_of(np.array([1, 2, 3, 7]), np.arange(8))
    with pytest.raises(AssertionError):
        sliced_equals_reference(moved, smaller(mamba_num_heads=4))
    weights, ids = trained_like(ARCH, dtype=torch.float64), tokens(2, 37)
    right = masked_logits(ARCH, weights, ids, mamba_selection_of(HEADS, np.arange(8)))
    assert relative(masked_logits(ARCH, weights, ids, moved), right) > 0.05  # the test can tell them apart


def test_heads_of_other_layers_are_not_the_reference() -> None:
    """Every layer has its own list: with the lists of two layers exchanged the reference is
    missed."""
    a, b, c = MAMBA_LAYERS[:3]
    heads = {a: HEADS, b: np.array([0, 1, 5, 6]), c: np.array([2, 3, 4, 5]), MAMBA_LAYERS[3]: HEADS}
    channels = dict.fromkeys(MAMBA_LAYERS, np.arange(8))
    target = smaller(mamba_num_heads=4)
    sliced_equals_reference(make_selection(ALL, heads=heads, channels=channels), target)
    weights, ids = trained_like(ARCH, dtype=torch.float64), tokens(2, 37)
    exchanged = make_selection(ALL, heads=heads | {a: heads[b], b: heads[a]}, channels=channels)
    mine = logits(tiny_model(dtype=torch.float64).slice(target, make_selection(ALL, heads=heads, channels=channels)), ids)
    assert relative(mine, masked_logits(ARCH, weights, ids, exchanged)) > 0.01


def test_mamba_channels_equal_the_reference() -> None:
    sliced_equals_reference(mamba_selection_of(np.arange(8), CHANNELS), smaller(mamba_head_dim=5))


def test_mamba_heads_and_channels_equal_the_reference() -> None:
    sliced_equals_reference(mamba_selection_of(HEADS, CHANNELS), smaller(mamba_num_heads=4, mamba_head_dim=5))


def test_hidden_size_equals_the_reference() -> None:
    sliced_equals_reference(make_selection(ALL, hidden=HIDDEN), smaller(hidden_size=len(HIDDEN)))


def test_ffn_equals_the_reference() -> None:
    sliced_equals_reference(make_selection(ALL, ffn=dict.fromkeys(FFN_LAYERS, NEURONS)), smaller(ffn_size=len(NEURONS)))


def test_dropped_layers_equal_the_reference() -> None:
    kept = (0, 2, 3, 4, 7)
    sliced_equals_reference(Selection(kept), ARCH.keep(kept))
    small = tiny_model(dtype=torch.float64).slice(ARCH.keep(kept), Selection(kept))
    plain = reference_hidden(ARCH, trained_like(ARCH, dtype=torch.float64), tokens(2, 37), kept)
    assert relative(final_hidden(small, tokens(2, 37)), plain) < 1e-10


def test_everything_at_once_equals_the_reference() -> None:
    kept = (0, 1, 3, 5, 6, 7)
    target = dataclasses.replace(ARCH.keep(kept), hidden_size=21, ffn_size=30, mamba_num_heads=6, mamba_head_dim=5)
    selection = select(ARCH, target, kept, random_scores(ARCH))
    assert sum("mamba_num_heads" in index for index in selection.layers.values()) == 3
    assert sum("ffn_size" in index for index in selection.layers.values()) == 1
    sliced_equals_reference(selection, target)


@pytest.mark.parametrize(("selection", "target"), [
    (make_selection(ALL, hidden=HIDDEN), smaller(hidden_size=len(HIDDEN))),
    (mamba_selection_of(HEADS, np.arange(8)), smaller(mamba_num_heads=4)),
    (mamba_selection_of(np.arange(8), CHANNELS), smaller(mamba_head_dim=5))])
def test_masking_without_care_for_the_norms_is_another_model(selection: Selection, target: Architecture) -> None:
    weights, ids = trained_like(ARCH, dtype=torch.float64), tokens(2, 37)
    mine = logits(tiny_model(dtype=torch.float64).slice(target, selection), ids)
    assert relative(mine, masked_logits(ARCH, weights, ids, selection, correct_means=False)) > 0.01


def test_the_references_agree_with_each_other_and_with_transformers() -> None:
    weights, ids = trained_like(ARCH, dtype=torch.float64), tokens(2, 37)
    plain = reference_logits(ARCH, weights, ids)
    assert relative(masked_logits(ARCH, weights, ids, Selection(ALL)), plain) < 1e-12
    with torch.no_grad():
        theirs = transformers_model(ARCH, weights)(ids, use_cache=False).logits
    assert relative(theirs, plain) < 1e-5


def test_selection_keeps_the_best_scored() -> None:
    scores, target = random_scores(ARCH), smaller(hidden_size=20, ffn_size=18, mamba_num_heads=4)
    selection = select(ARCH, target, ALL, scores)
    hidden = selection.stream["hidden_size"]
    assert set(hidden) == set(np.argsort(-scores.hidden)[:20])
    assert (np.diff(hidden) > 0).all()
    for layer in FFN_LAYERS:
        assert set(selection.of(layer)["ffn_size"]) == set(np.argsort(-scores.layers["ffn"][layer])[:18])
    for layer in MAMBA_LAYERS:
        assert [int((selection.of(layer)["mamba_num_heads"] // 4 == group).sum()) for group in range(2)] == [2, 2]
    assert select(ARCH, smaller(), ALL, None) == Selection(ALL)
    with pytest.raises(InputError, match="width scores"):
        select(ARCH, target, ALL, None)


# errors
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("selection", "target"), [
    (Selection(ALL), smaller(hidden_size=20)),
    (Selection(ALL), smaller(ffn_size=20)),
    (Selection(ALL), smaller(mamba_num_heads=4)),
    (Selection(ALL), smaller(mamba_head_dim=4)),
    (make_selection(ALL, ffn={FFN_LAYERS[0]: NEURONS}), smaller(ffn_size=len(NEURONS))),  # one layer forgotten
    (make_selection(ALL, heads={0: HEADS}, channels={0: np.arange(8)}), smaller(mamba_num_heads=4)),
    (make_selection(ALL, hidden=HIDDEN), smaller()),  # cut, but the target is not smaller
])
def test_a_slice_of_another_shape_than_the_target_is_an_error(selection: Selection, target: Architecture) -> None:
    read = trained_like(ARCH).__getitem__
    with pytest.raises(AssertionError, match="must be"):
        list(slice_model(ARCH, target, selection, read))


def damaged(folder: Path, change: str) -> None:
    """Damage a model folder in one way."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    match change:
        case "unknown":
            weights["backbone.layers.0.mixer.extra.weight"] = torch.zeros(3)
        case "missing":
            del weights["backbone.layers.2.mixer.D"]
        case "shape":
            weights["backbone.layers.1.mixer.up_proj.weight"] = torch.zeros(49, 32)
        case "transposed":
            weights["backbone.layers.1.mixer.up_proj.weight"] = weights["backbone.layers.1.mixer.up_proj.weight"].T
    save_file({k: v.contiguous() for k, v in weights.items()}, file)
    data = file.read_bytes()
    match change:
        case "truncated":
            file.write_bytes(data[: len(data) * 2 // 3])
        case "truncated header":
            file.write_bytes(data[:100])
        case "empty":
            file.write_bytes(b"")
        case "not json":
            (folder / "config.json").write_text('{"model_type": "nemotron_h",')
        case "a list":
            (folder / "config.json").write_text("[1, 2]")
        case "a shard is missing":
            (folder / "model.safetensors.index.json").write_text(json.dumps(
                {"weight_map": {"lm_head.weight": "model.safetensors", "x": "model-00002-of-00002.safetensors"}}))
        case "index":
            (folder / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(("change", "message"), [
    ("unknown", "1 weights, first backbone.layers.0.mixer.extra.weight"),
    ("missing", "lacks 1 weights, first backbone.layers.2.mixer.D"),
    ("shape", r"up_proj.weight is \[49, 32\], config.json says \[48, 32\]"), ("transposed", r"\[32, 48\]"),
    ("truncated", "cannot be read"), ("truncated header", "cannot be read"), ("empty", "cannot be read"),
    ("not json", "not JSON"), ("a list", "not a JSON object"), ("a shard is missing", "1 of 2 shards are missing"),
    ("index", "not a JSON object")])
def test_a_damaged_folder_is_corrupt(tmp_path: Path, change: str, message: str) -> None:
    folder = write_folder(tmp_path / "model")
    open_model(folder)
    damaged(folder, change)
    with pytest.raises(CorruptArtifact, match=message):
        open_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_a_number_is_corrupt(tmp_path: Path, value: float) -> None:
    weights = trained_like(ARCH)
    weights["backbone.layers.3.mixer.k_proj.weight"][1, 2] = value
    folder = open_model(write_folder(tmp_path / "model", weights=weights))
    assert folder.read("backbone.layers.2.mixer.D").shape == (8,)
    with pytest.raises(CorruptArtifact, match=r"k_proj\.weight holds NaN or infinity"):
        Model.load(folder)


def test_quantised_weights_are_told_before_they_are_read(tmp_path: Path) -> None:
    weights = trained_like(ARCH)
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight is F8_E4M3"):
        open_model(write_folder(tmp_path / "model", weights=weights))


def test_no_weights_or_no_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"only pytorch_model\.bin"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        open_model(folder)


def test_other_spellings_of_names_are_read(tmp_path: Path) -> None:
    """`model.` in memory, the misspelt embeddings of transformers 5.14, and MTP weights that are
    not the model's."""
    weights = trained_like(ARCH)
    renamed = {k.replace("backbone.", "model.", 1): v for k, v in weights.items()}
    renamed["mtp.layers.0.norm.weight"] = torch.zeros(4)
    folder = open_model(write_folder(tmp_path / "renamed", weights=renamed))
    assert all(torch.equal(folder.read(name), weights[name]) for name in weights)
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    folder = open_model(write_folder(tmp_path / "typo", weights=weights))
    assert torch.equal(folder.read("backbone.embeddings.weight"), weights["backbone.embedding.weight"])


def test_a_failed_write_leaves_no_model(tmp_path: Path) -> None:
    def broken() -> object:
        yield "a", torch.zeros(3)
        raise CorruptArtifact("in the middle")

    with pytest.raises(CorruptArtifact):
        write_model(tmp_path / "model", {}, broken())  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()
    write_model(tmp_path / "model", {}, iter([("a", torch.zeros(3))]))  # what is left does not stand in the way
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model"]
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert all(f.stat().st_mode & 0o077 == 0o044 for f in (tmp_path / "model").iterdir())
