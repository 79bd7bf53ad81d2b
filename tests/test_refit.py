"""The refit of the writers: against least squares by hand in float64, on held-out samples, and in
stock transformers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    ARCH,
    layer_weights,
    reference_mixer,
    relative,
    rms,
    tiny_model,
    tokens,
    write_folder,
)

from minipuzzle import Recipe, prune
from minipuzzle.core.errors import InputError, ResourceError
from minipuzzle.core.scores import WidthScores
from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.held_out import two_parts
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.families.architecture import Architecture
from minipuzzle.importance.widths import score_widths
from minipuzzle.models.forward import embed
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.pipeline.forecast import check_memory, estimates
from minipuzzle.pipeline.plan import make_plan
from minipuzzle.stages.order import STAGES
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.gate import reload_gate, sample_logits
from minipuzzle.surgery.refit import FOLDS, RIDGES, BlockFit, refit, refit_bytes, ridge_step, samples_needed
from minipuzzle.surgery.rotate import Rotation, find_rotation, rotate
from minipuzzle.verbs.run import Run

ALL = tuple(range(ARCH.num_layers))
KEPT = (0, 1, 3, 4, 6, 7)  # layer 2, 5 and the last are gone
IDS = tokens(16, 32)
WRITERS = {"M": "mixer.out_proj", "*": "mixer.o_proj", "-": "mixer.down_proj"}
TARGETS = {
    "hidden": (dataclasses.replace(ARCH, hidden_size=20), ALL),
    "ffn": (dataclasses.replace(ARCH, ffn_size=16), ALL),
    "heads": (dataclasses.replace(ARCH, mamba_num_heads=4, mamba_head_dim=6), ALL),
    "layers": (ARCH.keep(KEPT), KEPT),
    "first layer": (ARCH.keep(ALL[1:]), ALL[1:]),
    "all": (dataclasses.replace(ARCH.keep(KEPT), hidden_size=24, ffn_size=24, mamba_num_heads=4), KEPT),
}


def wide(arch: Architecture = ARCH) -> Model:
    return tiny_model(arch, dtype=torch.float64)


def cutter_of(model: Model, rotates: bool) -> Cutter:
    return Cutter(model, score_widths(model, IDS), find_rotation(model, IDS) if rotates else None)


def add(arch: Architecture, weights: dict[str, torch.Tensor], layer: int, x: torch.Tensor) -> torch.Tensor:
    """The stream after a layer, by the references."""
    w = layer_weights(weights, layer)
    return x + reference_mixer(arch, arch.pattern[layer], w, rms(x, w["norm.weight"], arch.norm_eps))


def inputs_of_writer(arch: Architecture, weights: dict[str, torch.Tensor], layer: int, x: torch.Tensor) -> torch.Tensor:
    """What a layer's writer reads: the layer with the identity in its place."""
    w, kind = layer_weights(weights, layer), arch.pattern[layer]
    name = WRITERS[kind]
    w[f"{name}.weight"] = torch.eye(w[f"{name}.weight"].shape[1]).double()
    w.pop(f"{name}.bias", None)
    return reference_mixer(arch, kind, w, rms(x, w["norm.weight"], arch.norm_eps))


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("case", TARGETS)
def test_least_squares_by_hand(case: str, rotates: bool) -> None:
    """Every writer in its order: min |E - dW A|^2 + lambda |dW|^2 as one stacked least-squares
    problem, on streams that the references make; the errors that are told; and nothing but the
    writers changes."""
    target, kept = TARGETS[case]
    model = wide()
    cutter = cutter_of(model, rotates)
    small = cutter.cut(target, kept)
    found, fits = cutter.refitted(target, kept, IDS)
    turned = rotates and target.hidden_size < ARCH.hidden_size
    parent = (rotate(model, cutter.rotation) if turned and cutter.rotation else model).by_name()
    if target.hidden_size == ARCH.hidden_size:
        keep = np.arange(ARCH.hidden_size)
    elif turned:
        keep = np.arange(target.hidden_size)
    else:
        keep = np.sort(np.argsort(-cutter.scores.hidden, kind="stable")[: target.hidden_size])
    weights, result = dict(small.by_name()), found.by_name()
    theirs = parent["backbone.embeddings.weight"].double()[IDS]
    ours = weights["backbone.embeddings.weight"].double()[IDS]
    fit, held = np.arange(len(IDS)) % FOLDS != 0, np.arange(len(IDS)) % FOLDS == 0
    next_layer, changed = 0, 0
    for j, kind in enumerate(target.pattern):
        end = kept[j + 1] if j + 1 < len(kept) else ARCH.num_layers
        for layer in range(next_layer, end):
            theirs = add(ARCH, parent, layer, theirs)
        next_layer = end
        a, error = inputs_of_writer(target, weights, j, ours), theirs[..., keep] - add(target, weights, j, ours)
        assert fits[j].before == pytest.approx(float(error[held].square().sum(-1).mean()), rel=1e-6, abs=1e-20)
        name = f"backbone.layers.{j}.{WRITERS[kind]}.weight"
        ridge = fits[j].ridge
        if ridge is None:
            assert torch.equal(result[name], weights[name])
        else:
            changed += 1
            rows, wanted = a[fit].flatten(0, 1).numpy(), error[fit].flatten(0, 1).numpy()
            size = rows.shape[1]
            lam = ridge * np.trace(rows.T @ rows) / size
            step = np.linalg.lstsq(np.vstack([rows, np.sqrt(lam) * np.eye(size)]),
                                   np.vstack([wanted, np.zeros((size, wanted.shape[1]))]), rcond=None)[0].T
            assert relative(result[name] - weights[name], torch.from_numpy(step)) < 1e-6
            weights[name] = weights[name] + torch.from_numpy(step)
        error = theirs[..., keep] - add(target, weights, j, ours)
        assert fits[j].after == pytest.approx(float(error[held].square().sum(-1).mean()), rel=1e-6, abs=1e-20)
        assert fits[j].after < fits[j].before if ridge is not None else fits[j].after == fits[j].before
        ours = add(target, weights, j, ours)
    assert changed > len(target.pattern) // 2
    same = [n for n in result if torch.equal(result[n], small.by_name()[n])]
    assert len(result) - len(same) == changed


def test_the_largest_ridge_that_keeps_the_gain() -> None:
    """Every ridge solved by itself, its error taken on the held-out part."""
    chance = np.random.default_rng(0)
    a, truth = chance.normal(size=(90, 12)) * np.logspace(0, -3, 12), chance.normal(size=(5, 12))
    error = a @ truth.T + 0.05 * chance.normal(size=(90, 5))
    fit_a, fit_e, held_a, held_e = (torch.from_numpy(x) for x in (a[:60], error[:60], a[60:], error[60:]))
    gram, cross = fit_a.T @ fit_a, fit_e.T @ fit_a
    before = float(held_e.square().sum()) / 30
    told = {}
    for ridge in RIDGES:
        lam = ridge * float(gram.trace()) / 12
        step = torch.linalg.solve(gram + lam * torch.eye(12).double(), cross.T).T
        told[ridge] = (float((held_e - held_a @ step.T).square().sum()) / 30, step)
    least = min(told, key=lambda ridge: told[ridge][0])
    assert RIDGES[0] < least < RIDGES[-1]  # neither end: noise asks for some, the small directions forbid much
    wanted = max(ridge for ridge, (error, _) in told.items() if before - error >= 0.75 * (before - told[least][0]))
    assert least < wanted < RIDGES[-1]
    found, fit = ridge_step(gram.clone(), cross, [(held_a[:20], held_e[:20]), (held_a[20:], held_e[20:])])
    assert found is not None
    assert fit.ridge == wanted
    assert fit.after == pytest.approx(told[wanted][0], rel=1e-9)
    assert fit.before == pytest.approx(before, rel=1e-12)
    torch.testing.assert_close(found, told[wanted][1], rtol=1e-7, atol=1e-9)


def test_refused_where_the_held_out_error_does_not_fall() -> None:
    """What fits the one part is wrong on the other."""
    a = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).double()
    error = a @ torch.ones(6, 3).double()
    step, fit = ridge_step(a.T @ a, error.T @ a, [(a, -error)])
    assert step is None
    assert fit.ridge is None
    assert fit.after == fit.before == pytest.approx(float(error.square().sum(-1).mean()))
    dead, fit = ridge_step(torch.zeros(6, 6).double(), torch.zeros(3, 6).double(), [(0 * a, error)])
    assert dead is None  # neurons that never fire: a Gram matrix of zeros
    assert np.isfinite(fit.after)


@pytest.mark.parametrize("rotates", [False, True])
def test_nothing_cut_nothing_changed(rotates: bool) -> None:
    model = tiny_model()
    found, fits = cutter_of(model, rotates).refitted(ARCH, ALL, IDS)
    assert all(torch.equal(t, model.by_name()[n]) for n, t in found.by_name().items())
    assert fits == [BlockFit(0.0, 0.0, None)] * ARCH.num_layers


def test_full_size_in_the_rotated_basis_is_the_parent_to_rounding() -> None:
    """All directions kept, in float32: the student is turned twice, so that its stream differs by
    rounding alone."""
    model = tiny_model()
    turned = rotate(model, find_rotation(model, IDS))
    again = rotate(turned, find_rotation(turned, IDS))  # its axes are the principal ones already: the identity
    found, fits = refit(turned, again, ALL, lambda x: x, IDS)
    full = final_hidden(model, IDS) @ model.head.T
    assert relative(final_hidden(found, IDS) @ found.head.T, full) < 1e-4
    scale = float(embed(turned.family, turned.top, IDS).square().sum(-1).mean())
    assert max(f.before for f in fits) > 0
    assert max(f.after for f in fits) < 1e-8 * scale


def test_a_damaged_writer_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough tokens and an exact answer: the parent's own matrix comes back, with next to no
    ridge."""
    monkeypatch.setattr("minipuzzle.surgery.refit.GAIN", 1.0)
    monkeypatch.setattr("minipuzzle.surgery.refit.RIDGES", (1e-6,))
    model = wide()
    for layer, kind in ((1, "-"), (0, "M"), (3, "*")):
        name = f"{WRITERS[kind]}.weight"
        broken = [dict(w) for w in model.layers]
        broken[layer][name] = broken[layer][name] * 0.3
        found, fits = refit(model, dataclasses.replace(model, layers=tuple(broken)), ALL, lambda x: x, IDS)
        assert fits[layer].after < 1e-6 * fits[layer].before
        assert relative(found.layers[layer][name], model.layers[layer][name]) < 1e-2


def test_refit_lowers_the_error_at_the_head() -> None:
    model, fresh = wide(), tokens(8, 32, seed=5)
    full = final_hidden(model, fresh) @ model.head.T
    for case in ("ffn", "layers"):
        target, kept = TARGETS[case]
        cutter = cutter_of(model, False)
        before, after = (final_hidden(m, fresh) @ m.head.T - full
                         for m in (cutter.cut(target, kept), cutter.refitted(target, kept, IDS)[0]))
        assert float(after.square().mean()) < 0.9 * float(before.square().mean()), case


def test_biases_stay() -> None:
    arch = dataclasses.replace(ARCH, use_bias=True, mlp_bias=True, attention_bias=True)
    cutter = cutter_of(wide(arch), True)
    target = dataclasses.replace(arch, hidden_size=20)
    found, fits = cutter.refitted(target, ALL, IDS)
    small = cutter.cut(target, ALL)
    moved = {n for n, t in found.by_name().items() if not torch.equal(t, small.by_name()[n])}
    assert moved
    assert all(n.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")) for n in moved)
    assert all(f.after <= f.before for f in fits)


def test_the_same_every_time_and_in_any_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    target, kept = TARGETS["all"]
    cutter = cutter_of(tiny_model(), True)
    one, two = (cutter.refitted(target, kept, IDS)[0].by_name() for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    wider = cutter_of(wide(), True)
    one, (fits) = wider.refitted(target, kept, IDS)[0].by_name(), wider.refitted(target, kept, IDS)[1]
    monkeypatch.setattr("minipuzzle.models.walk.BLOCK_BYTES", {"cpu": 1})  # a sample at a time
    two, again = wider.refitted(target, kept, IDS)[0].by_name(), wider.refitted(target, kept, IDS)[1]
    assert [f.ridge for f in fits] == [f.ridge for f in again]
    assert all(relative(one[n], two[n]) < 1e-9 for n in one)


@pytest.mark.parametrize("rotates", [False, True])
def test_streamed_from_disk(rotates: bool, tmp_path: Path) -> None:
    """A parent of which one layer is in memory at a time: the same refit."""
    folder = open_model(write_folder(tmp_path / "parent"))
    model = Model.load(folder)
    target, kept = TARGETS["all"]
    inside = cutter_of(model, rotates)
    outside = Cutter(StreamedModel.open(folder, torch.device("cpu")), inside.scores, inside.rotation)
    (one, fits), (two, again) = (cutter.refitted(target, kept, IDS) for cutter in (inside, outside))
    assert fits == again
    assert all(torch.equal(one.by_name()[n], two.by_name()[n]) for n in target.shapes())


def test_too_few_tokens_are_refused() -> None:
    model = tiny_model()
    cutter, needed = cutter_of(model, False), samples_needed(ARCH, 32)
    assert (needed - -(-needed // FOLDS)) * 32 >= 4 * 64  # the widest writer has 64 inputs
    target = dataclasses.replace(ARCH, ffn_size=16)
    with pytest.raises(InputError, match=rf"64 inputs needs {needed} samples of 32 tokens, there are {needed - 1}"):
        cutter.refitted(target, ALL, IDS[: needed - 1])
    assert cutter.refitted(target, ALL, IDS[:needed])[1][1].ridge is not None


def test_memory_is_told() -> None:
    """At the 8B's size: the Gram matrix and its vectors are most of it."""
    arch = dataclasses.replace(ARCH, hidden_size=4096, ffn_size=21504)
    assert refit_bytes(arch, 100_000) == 8 * 100_000 * 4096 + 4 * 12_500 * (21504 + 4096) + 16 * 21504**2


def test_the_written_model_opens_in_transformers(tmp_path: Path) -> None:
    """Rotated and refitted: a plain nemotron_h, no weight more, the same logits in a fresh
    process."""
    folder = open_model(write_folder(tmp_path / "parent"))
    target, kept = TARGETS["all"]
    small, fits = cutter_of(Model.load(folder), True).refitted(target, kept, IDS)
    assert any(f.ridge is not None for f in fits)
    write_model(tmp_path / "child", target.to_config(folder.config), small.by_name().items())
    ids = tokens(2, 40)
    wanted = sample_logits(small.family, small.arch, small.by_name().items(), ids)
    assert reload_gate(tmp_path / "child", ids, wanted) < 1e-5
    assert open_model(tmp_path / "child").arch == target


# in a run
# --------------------------------------------------------------------------------------------------------

RECIPE = """
recipe: 1
budget: {memory: 0.7x}
workload: {context: 128}
calibration: {data: DATA, samples: 8, sequence_length: 32}
space: {drop_mamba: [1, 2], drop_ffn: [0, 1], drop_attention: 0, hidden_size: 24, ffn_size: [24, 48, 24]}
search: {measure: 3, finalists: 2}
evaluation: {data: DATA, samples: 8}
surgery: {hidden: rotate, refit: ridge}
distillation:
  {data: DATA, tournament_tokens: 512, tokens: 1024, sequence_length: 32, batch_tokens: 256, learning_rate: 1.0e-3}
"""


def recipe_for(data: Path, **settings: object) -> Recipe:
    return Recipe.parse(RECIPE.replace("DATA", str(data)), "test").with_overrides(
        settings={k.replace("__", "."): v for k, v in settings.items()})


@pytest.fixture(scope="module")
def finished(model_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prune(model_folder, recipe_for(texts), tmp_path_factory.mktemp("runs") / "run")


def rounded(model: Model) -> Model:
    tensors = ((n, t.bfloat16().float()) for n, t in model.by_name().items())
    return Model.build(model.family, model.arch, tensors)


def test_a_run_tells_the_refitted_numbers(finished: Run, model_folder: Path) -> None:
    """Pruned: as refitted, from the parent and what the run has written; sliced: plain
    selection."""
    result, path = finished.report["result"], finished.path
    parent = Model.load(open_model(model_folder))
    (folder,) = (path / "tokens").iterdir()
    selection, reference = (Reference(parent, torch.from_numpy(part))
                            for part in two_parts(load_blocks(folder, "held_out", 32), 8))
    target, kept = Architecture.from_json(result["architecture"]), tuple(result["kept_layers"])
    scores = WidthScores.read(path / "scores" / "widths.safetensors")
    rotation = Rotation.read(path / "scores" / "rotation.safetensors")
    cutter = Cutter(parent, scores, rotation)
    needed = samples_needed(parent.arch, 32)
    assert needed > 8
    ids = torch.from_numpy(load_blocks(folder, "train", 32).first(needed))
    small, fits = cutter.refitted(target, kept, ids)
    assert measure(rounded(small), reference)["kl"] == pytest.approx(result["kl_pruned"], rel=1e-5)
    assert measure(rounded(cutter.cut(target, kept)), reference)["kl"] != pytest.approx(result["kl_pruned"], rel=1e-2)
    assert measure(rounded(Cutter(parent, scores).cut(target, kept)), reference)["loss"] == pytest.approx(
        result["loss_sliced"], rel=1e-6)
    assert [fit["ridge"] for fit in result["refit"]] == [fit.ridge for fit in fits]
    assert any(f"surgery.refit used {needed} samples" in line for line in finished.report["warnings"])
    # the hidden axis is scored, and told, by the energies of directions
    (half,) = (w for w in finished.report["scores"]["widths"] if w["axis"] == "hidden_size" and w["width"] == 16)
    assert half["median"] == pytest.approx(rotation.energies[:, :16].sum() / rotation.energies.sum(), abs=1e-4)
    # candidates are measured as they are cut: hundreds of them must stay cheap
    chosen = next(c for c in finished.report["candidates"] if c["chosen"])
    assert chosen["measured"]["kl"] == pytest.approx(measure(rounded(cutter.cut(target, kept)), selection)["kl"], rel=1e-5)


def test_refitted_once_and_found_again(finished: Run, model_folder: Path, texts: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Tournament, distillation and export read the same file; without it they make the same
    again."""
    files = sorted((finished.path / "refit").iterdir())
    assert [f.suffix for f in files] == [".safetensors"] * 2  # of two finalists
    path = Path(shutil.copytree(finished.path, tmp_path / "run"))
    (path / "stages" / "export.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("minipuzzle.surgery.cut.refit", None)  # nothing is refitted
        again = prune(model_folder, recipe_for(texts), path)
    assert again.report["result"] | {"path": ""} == finished.report["result"] | {"path": ""}
    for stage in ("tournament", "distill", "export"):
        (path / "stages" / f"{stage}.json").unlink()
    shutil.rmtree(path / "refit")
    shutil.rmtree(path / "distillation")
    prune(model_folder, recipe_for(texts), path)
    for file in files:
        assert (path / "refit" / file.name).read_bytes() == file.read_bytes()
    for name in ("model/model.safetensors", "candidates.csv"):
        assert (path / name).read_bytes() == (finished.path / name).read_bytes()


def test_another_refit_is_another_result(finished: Run, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished.path, tmp_path / "run"))
    with pytest.raises(InputError, match=r"refit: ridge -> none.*stages to make again: tokenize, tournament, distill, export\."):
        prune(model_folder, recipe_for(texts, surgery__refit="none"), path)
    run = prune(model_folder, recipe_for(texts, surgery__refit="none"), path, redo=True)
    assert run.report["result"]["refit"] is None
    assert run.report["result"]["kl_pruned"] != pytest.approx(finished.report["result"]["kl_pruned"], rel=1e-2)


def test_damaged_or_too_little(finished: Run, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished.path, tmp_path / "run"))
    (path / "stages" / "export.json").unlink()
    for file in (path / "refit").iterdir():
        file.write_bytes(file.read_bytes()[:200])
    run = prune(model_folder, recipe_for(texts), path)  # refitted again: the numbers are a function of the rest
    (again,) = (f for f in (path / "refit").iterdir() if f.name.startswith(run.report["result"]["candidate"]))
    assert again.read_bytes() == (finished.path / "refit" / again.name).read_bytes()
    short = tmp_path / "short"
    short.mkdir()
    for file in sorted(texts.iterdir())[:2]:
        shutil.copy(file, short)
    with pytest.raises(InputError, match=r"64 inputs needs \d+ samples of 128 tokens, there are \d+; give more"):
        prune(model_folder, recipe_for(short, calibration__sequence_length=128), tmp_path / "other")


def test_the_plan_counts_a_refit(model_folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = open_model(model_folder).arch
    with_it, without = (make_plan(arch, recipe_for(texts, surgery__refit=refit)) for refit in ("ridge", "none"))
    assert (with_it.refit_samples, without.refit_samples) == (samples_needed(arch, 32), 0)
    assert estimates(with_it, STAGES)["tournament"] > estimates(without, STAGES)["tournament"]
    least = dataclasses.replace(without, memory_bytes=2**20)
    assert least.student_stage_bytes > 4 * (with_it.parent_cost.parameters + 4 * with_it.largest.parameters)
    enough = least.student_stage_bytes + least.reference_bytes + 10
    with_it, without = (dataclasses.replace(p, memory_bytes=enough) for p in (with_it, without))
    check_memory(without, STAGES, torch.device("cpu"))
    with pytest.raises(ResourceError, match="to refit; use a machine with more memory"):
        check_memory(with_it, STAGES, torch.device("cpu"))
