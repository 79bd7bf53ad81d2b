"""Quantised folders, without modelopt: the formats against numbers worked out by hand, what it is
asked for, and the verb with a stand-in for it. benchmarks/quantize.py runs the real one."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny import ARCH, FAMILY, trained_like, write_folder

from minipuzzle.cli import main
from minipuzzle.core.budget import Workload
from minipuzzle.core.errors import CorruptArtifact, InputError, ResourceError, UnsupportedModel
from minipuzzle.costs.cost import cost
from minipuzzle.engines import formats, gguf
from minipuzzle.engines import quantize as engine
from minipuzzle.evaluate.served import open_served
from minipuzzle.families import mixers
from minipuzzle.families.base import is_stacked, numbered
from minipuzzle.families.experts import route
from minipuzzle.models.module import Block
from minipuzzle.models.weights import open_model, write_model

SERVED = dataclasses.replace(ARCH, ffn_size=64)  # all rows are multiples of 32


def test_fp8_comes_back_as_by_hand():
    weight = torch.tensor([[1.0, -2.0], [448.0, 0.0]]).to(torch.float8_e4m3fn)
    assert formats.dequantise(weight, {"weight_scale": torch.tensor(0.5)}).tolist() == [[0.5, -1.0], [224.0, 0.0]]
    x = torch.tensor([1.05, 17.0, -1000.0])  # the codes between 1 and 2 are 1/8 apart, from 16 on 2
    assert formats.round_fp8(x, torch.tensor(1.0)).tolist() == [1.0, 16.0, -448.0]


def test_nvfp4_comes_back_as_by_hand():
    codes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]  # the upper eight are negative
    packed = torch.tensor([[low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]] * 2,
                          dtype=torch.uint8)
    scale = torch.tensor([[2.0], [0.5]]).to(torch.float8_e4m3fn)
    found = formats.dequantise(packed, {"weight_scale": scale, "weight_scale_2": torch.tensor(0.25)})
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert found.tolist() == [[v / 2 for v in values], [v / 8 for v in values]]


def test_nvfp4_rounds_to_the_nearest_and_ties_to_the_even_code():
    #                  6 sets the scale to 1; then between two codes, above, and exactly between
    row = torch.tensor([[6.0, 2.4, 2.6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.1, -0.2, 0, 0, 0, 0]])
    wanted = [6.0, 2.0, 3.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -6.0, 0.0, 0, 0, 0, 0]
    assert formats.round_nvfp4(row, torch.tensor(1.0)).tolist() == [wanted]
    assert not formats.round_nvfp4(torch.zeros(1, 16), torch.tensor(1.0)).any()


def test_int4_comes_back_as_by_hand():
    # rows 0 and 1 share bytes: low half row 0, high half row 1; 8 to 15 are negative
    packed = torch.tensor([[1 + 16 * 15, 7 + 16 * 8, 0, 2 + 16 * 2]], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 0.5], [2.0, 3.0]])
    beside = {"weight_scale": scale, "pre_quant_scale": torch.tensor([1.0, 2.0, 1.0, 10.0])}
    assert formats.dequantise(packed, beside).tolist() == [[1, 14, 0, 10], [-2, -32, 0, 60]]
    row = torch.tensor([[7.0, -1.4, 0.6, 70.0, 14.0, 0.0]])
    assert formats.round_int4(row, 3).tolist() == [[7, -1, 1, 70, 10, 0]]


@pytest.mark.parametrize("precision", engine.PRECISIONS)
def test_rounding_again_changes_nothing_and_rounding_is_near(precision):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    found = formats.round_weight(weight, precision, 32)
    relative = (found - weight).norm() / weight.norm()
    assert relative < {"fp8": 0.04, "nvfp4": 0.13, "int4": 0.14}[precision]
    if precision != "nvfp4":  # whose block scales are themselves rounded
        assert torch.allclose(formats.round_weight(found, precision, 32), found, rtol=1e-6)
    assert not formats.round_weight(torch.zeros(2, 64), precision, 32).any()


# what modelopt is asked for
# -----------------------------------------------------------------------------------------


def test_exactly_the_priced_matrices_are_quantised(tmp_path: Path) -> None:
    """Patterns against the names of all modules of the stock model."""
    folder = write_folder(tmp_path / "model", SERVED, trained_like(SERVED))
    stock = open_served(folder, "cpu")
    modules = [name for name, module in stock.named_modules() if hasattr(module, "weight")]
    # 4 Mamba and 3 FFN layers with 2 matrices each, 2 attention layers with 4; in the middle three: * - M
    for keep, ends, wanted in (((), 0, 22), (("attention",), 0, 14), (("mamba",), 0, 14), ((), 3, 8)):
        plan = engine.make_plan(SERVED, "fp8", "fp8", keep, ends)
        rows = [row["quantizer_name"] for row in engine._settings(plan)["quant_cfg"]]
        hit = [m for m in modules if any(fnmatch.fnmatch(f"{m}.weight_quantizer", row) for row in rows[1:])]
        assert len(hit) == len(plan.weights) == wanted
        assert hit == [m for m in modules if any(fnmatch.fnmatch(f"{m}.input_quantizer", row) for row in rows[1:])]
        assert {m.rsplit(".layers.", 1)[1] for m in hit} == {
            n.split(".layers.", 1)[1].removesuffix(".weight") for n in plan.weights}
    assert rows[0] == "*"
    assert rows[-1] == "*[kv]_bmm_quantizer"


def test_experts_have_numbered_quantisers() -> None:
    arch = dataclasses.replace(ARCH, pattern="ME*", num_experts=4, experts_per_token=2, moe_ffn_size=32,
                               shared_ffn_size=32)
    plan = engine.make_plan(arch, "nvfp4")
    names = {n: q for n, q in plan.weights.items() if "experts.3.up_proj" in n or "shared" in n or "gate" in n}
    assert names == {"backbone.layers.1.mixer.experts.3.up_proj.weight": "layers.1.mixer.experts.up_proj_weight_quantizers*",
                     "backbone.layers.1.mixer.shared_experts.up_proj.weight":
                         "layers.1.mixer.shared_experts.up_proj.weight_quantizer",
                     "backbone.layers.1.mixer.shared_experts.down_proj.weight":
                         "layers.1.mixer.shared_experts.down_proj.weight_quantizer"}
    rows = [row["quantizer_name"] for row in engine._settings(dataclasses.replace(plan, inputs=True))["quant_cfg"]]
    assert "*layers.1.mixer.experts.up_proj_input_quantizer" in rows


def test_rows_that_a_format_cannot_hold_are_named() -> None:
    odd = dataclasses.replace(ARCH, ffn_size=40)
    with pytest.raises(UnsupportedModel, match=r"layers.1.mixer.down_proj.weight is \[32, 40\].*each 16.*no multiple"):
        engine.make_plan(odd, "nvfp4")
    with pytest.raises(UnsupportedModel, match=r"int4 has a scale for each 32 of a row, and 48 is no multiple"):
        engine.make_plan(ARCH, "int4")
    with pytest.raises(UnsupportedModel, match="is odd; use fp8"):
        engine.make_plan(dataclasses.replace(SERVED, pattern="-*", ffn_size=33, hidden_size=32), "int4")
    with pytest.raises(InputError, match="nothing is left to quantise"):
        engine.make_plan(ARCH, "fp8", keep_ends=5)
    assert engine.make_plan(odd, "fp8").weights  # takes all
    assert engine.make_plan(SERVED, "int4").group == 32
    wide = dataclasses.replace(SERVED, hidden_size=128, ffn_size=256, mamba_head_dim=16, head_dim=32)
    assert engine.make_plan(wide, "int4").group == 128


# a folder
# -----------------------------------------------------------------------------------------


def packed(weight: torch.Tensor, precision: str, group: int) -> dict[str, torch.Tensor]:
    """A weight as it lies on disk, written independently of engines/formats.py."""
    rows, columns = weight.shape
    if precision == "fp8":
        scale = weight.abs().max() / 448
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale,
                "input_scale": torch.tensor(1 / 64)}
    blocks = weight.reshape(rows, -1, group)
    if precision == "int4":
        scale = (blocks.abs().amax(-1) / 7).bfloat16()
        codes = (blocks / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int32).reshape(rows, columns) % 16
        return {"weight": (codes[::2] + 16 * codes[1::2]).to(torch.uint8), "weight_scale": scale,
                "pre_quant_scale": torch.ones(columns)}
    all_ = weight.abs().max() / (6 * 448)
    scale = (blocks.abs().amax(-1) / (6 * all_)).to(torch.float8_e4m3fn)
    known = torch.tensor(formats.FP4)
    sizes = blocks / (scale.float() * all_)[..., None]
    codes = (sizes.abs()[..., None] - known).abs().argmin(-1) + 8 * (sizes < 0)
    codes = codes.reshape(rows, columns).to(torch.uint8)
    return {"weight": codes[:, ::2] + 16 * codes[:, 1::2], "weight_scale": scale, "weight_scale_2": all_}


def write_quantised(out: Path, source: Path, plan: engine.Plan) -> None:
    folder = open_model(source)
    tensors: dict[str, torch.Tensor] = {}
    for name in folder.files:
        whole = folder.read(name)
        names = numbered(name, len(whole))
        for part, weight in zip(names, whole if is_stacked(name) else [whole], strict=True):
            if part in plan.weights:
                parts = packed(weight.float(), plan.precision, plan.group)
                tensors |= {part.removesuffix("weight") + beside: tensor for beside, tensor in parts.items()}
            else:
                tensors[part] = weight
    config = folder.config | {"quantization_config": {"quant_method": "modelopt"}}
    write_model(out, config, tensors.items(), folder.path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = trained_like(SERVED, dtype=torch.bfloat16)
    return write_folder(tmp_path_factory.mktemp("source") / "model", SERVED, weights, torch_dtype="bfloat16")


@pytest.mark.parametrize("precision", engine.PRECISIONS)
def test_a_folder_is_read_again_and_its_size_explained_to_the_byte(precision: str, source: Path, tmp_path: Path) -> None:
    plan = engine.make_plan(SERVED, precision, on_gpu=False)
    write_quantised(tmp_path / "out", source, plan)
    found, given = engine.open_quantised(tmp_path / "out"), open_model(source).weights(torch.float32)
    names = found.model.by_name()
    assert names.keys() == given.keys()
    for name, weight in given.items():
        if name in plan.weights:
            error = (names[name] - weight).norm() / weight.norm()
            assert 0.001 < error < 0.2, name
        else:
            assert torch.equal(names[name], weight)
    size = engine.size_report(SERVED, plan, Workload(precision), found.weights_bytes)
    assert size["written_bytes"] == sum(t.numel() * t.element_size()
                                        for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert size["priced_bytes"] == cost(SERVED, Workload(precision)).weights_bytes
    assert abs(size["priced_bytes"] + sum(size["differences"].values()) - size["written_bytes"]) < 1
    tables = 2 * SERVED.vocab_size * SERVED.hidden_size
    assert size["differences"]["embedding and LM head that stay at 16 bit"] == tables * (
        2 - {"fp8": 1, "nvfp4": 9 / 16, "int4": 33 / 64}[precision])
    kept = engine.size_report(SERVED, plan, Workload(precision, keep_16bit=("embedding", "lm_head")), found.weights_bytes)
    assert not any("embedding" in why for why in kept["differences"])


def test_activations_are_rounded_while_asked_for_and_the_cache_too(source: Path, tmp_path: Path) -> None:
    plan = engine.make_plan(SERVED, "fp8", "fp8")
    write_quantised(tmp_path / "out", source, plan)
    found = engine.open_quantised(tmp_path / "out")
    weight = found.model.layers[3]["mixer.k_proj.weight"]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    parts = found.parts[weight.data_ptr()]
    parts["k_scale"] = torch.tensor(0.01)
    with found.rounding():
        y = torch.nn.functional.linear(x, weight)
    coarse = (x * 64).clamp(-448, 448).to(torch.float8_e4m3fn).float() / 64
    assert torch.equal(y, (coarse @ weight.T / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01)
    assert not torch.equal(torch.nn.functional.linear(x, weight), y)


def test_what_goes_into_experts_is_rounded_too(tmp_path: Path) -> None:
    """Against a loop over tokens and their experts."""
    source = Path(__file__).parent / "data" / "moe"
    arch = open_model(source).arch
    write_quantised(tmp_path / "out", source, engine.make_plan(arch, "fp8"))
    found = engine.open_quantised(tmp_path / "out")
    size = engine.size_report(arch, engine.make_plan(arch, "fp8"), Workload("fp8"), found.weights_bytes)
    assert size["priced_bytes"] == cost(arch, Workload("fp8")).weights_bytes
    layer = arch.pattern.index("E")
    w = {name.removeprefix("mixer."): weight for name, weight in found.model.layers[layer].items()}
    x = torch.randn(6, arch.hidden_size, generator=torch.Generator().manual_seed(3))
    chosen, weights = route(arch, x, w["gate.weight"], w["gate.e_score_correction_bias"])
    coarse = lambda t: (t * 64).clamp(-448, 448).to(torch.float8_e4m3fn).float() / 64  # noqa: E731
    wanted = []
    for token, experts, shares in zip(coarse(x), chosen, weights, strict=True):
        y = w["shared_experts.down_proj.weight"] @ coarse((w["shared_experts.up_proj.weight"] @ token).relu() ** 2)
        for expert, share in zip(experts, shares, strict=True):
            inner = (w["experts.{num_experts}.up_proj.weight"][expert] @ token).relu() ** 2
            y = y + share * (w["experts.{num_experts}.down_proj.weight"][expert] @ coarse(inner))
        wanted.append(y)
    with found.rounding():
        ours = mixers.moe(arch, w, x[None], None)[0]
    assert torch.allclose(ours, torch.stack(wanted), rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    plain = mixers.moe(arch, w, x[None], None)[0]
    assert (plain - ours).norm() > 1e-3 * ours.norm()


def stock_of(folder: Path, tmp_path: Path) -> Any:
    """The dequantised folder in transformers: what a simulation computes without rounded inputs."""
    model = engine.open_quantised(folder).model
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "quantization_config"}
    write_model(tmp_path / "stock", config, model.by_name().items())
    return open_served(tmp_path / "stock", "cpu", torch.float32)


def test_the_gate_finds_one_wrong_scale(source: Path, tmp_path: Path) -> None:
    plan, out = engine.make_plan(SERVED, "int4"), tmp_path / "out"
    write_quantised(out, source, plan)
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    simulated = engine.simulate(stock_of(out, tmp_path), plan, ids)
    assert engine.gate(out, engine.open_quantised(out), *simulated) < 1e-5
    tensors = load_file(out / "model.safetensors")
    tensors["backbone.layers.5.mixer.in_proj.weight_scale"][7] *= 1.5
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CorruptArtifact, match="layer 5 differs from the simulation in memory by"):
        engine.gate(out, engine.open_quantised(out), *simulated)
    del tensors["backbone.layers.5.mixer.in_proj.weight"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CorruptArtifact, match=r"lacks backbone.layers.5.mixer.in_proj.weight"):
        engine.open_quantised(out)


def test_gradients_pass_through_the_rounding() -> None:
    weights = {n: w.float() for n, w in trained_like(SERVED).items()}
    prefix = FAMILY.layer_prefix(1)
    block = Block(SERVED, "-", {n: weights[prefix + n] for n in SERVED.layer_weights(1)})
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    plain = block(x)
    block.rounded = lambda name, w: w if w.ndim == 1 else w + (formats.round_int4(w, 32) - w).detach()
    block(x).sum().backward()
    assert not torch.allclose(block(x), plain, rtol=1e-3)
    up = block.weights()["mixer.up_proj.weight"]
    again = Block(SERVED, "-", {n: formats.round_int4(p.detach(), 32) if p.ndim == 2 else p.detach()
                                for n, p in block.weights().items()})
    again(x).sum().backward()
    assert torch.allclose(again.weights()["mixer.up_proj.weight"].grad, up.grad)
    assert up.grad.abs().sum() > 0


# the verb, with a stand-in for modelopt
# -----------------------------------------------------------------------------------------


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, args)])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What modelopt does, in a few lines: weights are rounded in the stock model, and packed."""
    def parts(weight: torch.Tensor, plan: engine.Plan) -> dict[str, torch.Tensor]:
        return {k: v for k, v in packed(weight.float(), plan.precision, plan.group).items() if k != "input_scale"}

    def calibrate(stock: Any, plan: engine.Plan, ids_NT: torch.Tensor, dtype: torch.dtype) -> None:
        assert ids_NT.shape == (4, 32)
        for name, weight in stock.named_parameters():
            if name.replace("model.", "backbone.", 1) in plan.weights:
                found = parts(weight.detach(), plan)
                weight.data = formats.dequantise(found.pop("weight"), found)

    def write(stock: Any, plan: engine.Plan, folder: Any, out: Path) -> dict[str, Any]:
        tensors = {name: folder.read(name) for name in folder.files if name not in plan.weights}
        for name in plan.weights:
            tensors |= {name.removesuffix("weight") + k: v for k, v in parts(folder.read(name), plan).items()}
        write_model(out, folder.config | {"quantization_config": {"quant_method": "modelopt"}}, tensors.items(), folder.path)
        return {"quantization": {"quant_algo": plan.precision.upper()}}

    monkeypatch.setattr(engine, "check_installed", lambda: None)
    monkeypatch.setattr(engine, "calibrate", calibrate)
    monkeypatch.setattr(engine, "write", write)


def settings_for(texts: Path) -> list[str]:
    return ["--data", str(texts), *(part for key, value in (
        ("calibration.samples", 4), ("calibration.sequence_length", 32), ("evaluation.samples", 4),
        ("distillation.sequence_length", 32), ("distillation.batch_tokens", 64)) for part in ("--set", f"{key}={value}"))]


def test_the_result_of_a_run_is_quantised(stand_in: None, finished: Path, texts: Path, tmp_path: Path) -> None:
    """With the run's own recipe and data, and again with training; the same command does nothing."""
    out = tmp_path / "out"
    found = run(finished, "--precision", "fp8", "-o", out, "--json", "-q")
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert data == json.loads((out / "quantization.json").read_text()) == json.loads(
        (out / "model" / "minipuzzle.json").read_text())
    assert 0 < data["after"]["kl"] < 0.1
    assert 0.5 < data["after"]["agreement"] <= 1
    assert data["gate_difference"] < 1e-5
    assert data["after"]["loss"] != data["before"]["loss"]
    assert (out / "model" / "tokenizer.json").is_file()
    assert (out / "model" / "LICENSE").is_file()
    card = (out / "model" / "README.md").read_text()
    assert "quantised to fp8" in card
    assert "vllm serve" in card
    assert json.loads((out / "run.json").read_text())["recipe"]["calibration"]["data"] == str(texts)
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    assert run(finished, "--precision", "fp8", "-o", out, "-q").exit_code == 0
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before
    other = run(finished, "--precision", "fp8", "-o", out, "-q", "--set", "quantization.keep_ends=1")
    assert other.exit_code == 2
    assert "quantization.keep_ends" in other.stderr
    again = run(out / "model", "--precision", "fp8", "-o", tmp_path / "again", *settings_for(texts))
    assert (again.exit_code, again.stderr.count("\n")) == (3, 1)
    assert "is quantised already (modelopt)" in again.stderr
    trained = run(finished, "--precision", "fp8", "--distill", "512", "-o", tmp_path / "trained", "--json", "-q")
    assert trained.exit_code == 0, trained.output
    [metrics] = (tmp_path / "trained").glob("distillation/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(rows) == 512 // 64
    assert {row["tokens"] for row in rows} == {64 * (i + 1) for i in range(8)}
    assert json.loads(trained.stdout)["distilled_tokens"] == 512


def test_quantisation_is_the_last_stage_of_prune(stand_in: None, without_gate_and_page: None, model_folder: Path,
                                                 recipe: Any, tmp_path: Path) -> None:
    from minipuzzle import prune

    chosen = recipe.with_overrides(settings={"quantization.precision": "fp8", "distillation.tokens": 0})
    made = prune(model_folder, chosen, tmp_path / "run")
    data = json.loads((made.path / "quantized" / "quantization.json").read_text())
    assert made.report["quantization"] == data == json.loads((made.path / "report.json").read_text())["quantization"]
    assert data["before"]["loss"] == pytest.approx(made.report["result"]["loss_distilled"], abs=1e-4)
    assert engine.open_quantised(made.path / "quantized" / "model").model.arch == open_model(made.path / "model").arch
    stages = json.loads((made.path / "run.json").read_text())["stages"]
    assert stages[-1]["name"] == "quantize"
    assert stages[-1]["status"] == "done"


def test_bad_input_is_one_line_and_nothing_is_lost(stand_in: None, source: Path, model_folder: Path, texts: Path,
                                                   tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    out, fp8 = tmp_path / "out", ("--precision", "fp8")
    for code, said, *args in (
            (2, "needs an output folder", model_folder, *fp8),
            (2, "needs a precision: --precision fp8, int4 or nvfp4; or --gguf", model_folder, "-o", out),
            (2, "needs quantization.precision", model_folder, "--gguf", "q8_0", "--distill", "1k", "-o", out),
            (2, "is not empty and not a run", model_folder, *fp8, "-o", foreign, *settings_for(texts)),
            (2, "has no result yet", unfinished, *fp8, "-o", out, "--recipe", "default"),
            (2, "tokens", model_folder, *fp8, "-o", out, "--data", short),
            (2, "nothing is left to quantise", model_folder, *fp8, "-o", out, *settings_for(texts),
             "--set", "workload.keep_16bit=[mamba,attention,ffn]"),
            (3, "int4 has a scale for each 32 of a row, and 48 is no multiple", model_folder, "--precision", "int4",
             "-o", out, *settings_for(texts)),
            (2, "Invalid value for '--kv-precision'", model_folder, *fp8, "--kv-precision", "nvfp4", "-o", out),
            (6, "this machine has 0 CUDA devices", model_folder, *fp8, "-o", out, "--device", "cuda"),
    ):
        found = run(*args)
        assert (found.exit_code, found.stderr.count("\n")) == (code, 1), (args, found.output)
        assert said in found.stderr
        assert not out.exists()
    assert [p.name for p in foreign.iterdir()] == ["mine.txt"]


def test_without_the_extra_one_line_names_it(source: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch,
                                             tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for args in (["quantize", str(source), "--precision", "fp8", "-o", str(tmp_path / "out")],
                 ["prune", str(model_folder), "--set", "quantization.precision=fp8", "--dry-run"]):
        found = CliRunner().invoke(main, args)
        assert (found.exit_code, found.stderr) == (6, "minipuzzle: quantisation needs nvidia-modelopt: pip install "
                                                      "'minipuzzle[quantize]'\n")
    assert not (tmp_path / "out").exists()


def test_gguf_without_llama_cpp_is_one_line(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = run(source, "--gguf", "q8_0", "-o", tmp_path / "out")
    assert (found.exit_code, found.stderr.count("\n")) == (6, 1)
    assert "'make test-engines' builds them" in found.stderr
    assert not (tmp_path / "out").exists()


def test_gguf_is_measured_and_a_refusal_is_one_line(model_folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch,
                                                    tmp_path: Path) -> None:
    """With a stand-in for llama.cpp's environment: what is passed to it, and what comes back."""
    place = tmp_path / "minipuzzle" / f"llama-cpp-python-{gguf.VERSION}"
    (place / "source" / "vendor" / "llama.cpp").mkdir(parents=True)
    (place / "source" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py").write_text("")
    python = place / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("""#!/bin/sh
shift 2
case "$1" in
*convert_hf_to_gguf*) cp "$3/config.json" "$4";;
*llama_model_quantize*) test "$4" = 7 && cp "$2" "$3";;
*) python3 -c 'import json,sys; rows=json.load(sys.stdin); print(json.dumps({"tokens": [[-2.5]*(len(r)-1) for r in rows]}))';;
esac
""")
    python.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "out"
    found = run(model_folder, "--gguf", "q8_0", "-o", out, *settings_for(texts))
    assert found.exit_code == 0, found.output
    about = json.loads((out / "quantization.json").read_text())["gguf"]
    assert about == {"path": str(out / "model-q8_0.gguf"), "type": "q8_0", "loss": 2.5,
                     "bytes": (model_folder / "config.json").stat().st_size}
    assert [p.name for p in out.glob("*gguf*")] == ["model-q8_0.gguf"]
    python.write_text("#!/bin/sh\necho 'NotImplementedError: BPE pre-tokenizer was not recognized' >&2; exit 1\n")
    refused = run(model_folder, "--gguf", "q8_0", "-o", tmp_path / "other", *settings_for(texts), "-q")
    assert (refused.exit_code, refused.stderr.count("\n")) == (3, 1)
    assert "llama.cpp does not take" in refused.stderr
    assert "BPE pre-tokenizer was not recognized" in refused.stderr


def test_the_converter_runs_no_code_of_the_folder_and_learns_the_split(model_folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                                       tmp_path: Path) -> None:
    """The real program, with transformers as it is here and a converter that trusts the folder, as llama.cpp's does."""
    place = tmp_path / "minipuzzle" / f"llama-cpp-python-{gguf.VERSION}"
    source = place / "source" / "vendor" / "llama.cpp"
    (source / "conversion").mkdir(parents=True)
    (source / "conversion" / "base.py").write_text(
        "class TextModel:\n    def get_vocab_base_pre(self, tokenizer):\n        raise NotImplementedError('which?')\n")
    (source / "convert_hf_to_gguf.py").write_text("""
import sys
from pathlib import Path
from transformers import AutoTokenizer
from conversion.base import TextModel
folder, _, out, _, kind = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
Path(out).write_text(TextModel().get_vocab_base_pre(tokenizer) + " " + kind)
""")
    python = place / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gguf.convert(model_folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "gpt-2 f32"
    evil = tmp_path / "evil"
    shutil.copytree(model_folder, evil)
    (evil / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(UnsupportedModel):
        gguf.convert(evil, tmp_path / "evil.gguf")
    assert not (tmp_path / "ran").exists()
    split = json.loads((evil / "tokenizer.json").read_text())
    split["pre_tokenizer"]["use_regex"] = False
    (evil / "tokenizer.json").write_text(json.dumps(split))
    (evil / "tokenizer_config.json").write_bytes((model_folder / "tokenizer_config.json").read_bytes())
    with pytest.raises(UnsupportedModel, match=r"llama.cpp does not take .*NotImplementedError: which\?"):
        gguf.convert(evil, tmp_path / "evil.gguf")


def test_a_card_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for precision in ("fp8", "nvfp4"):
        with pytest.raises(ResourceError, match=rf"A100 cannot compute in {precision} \(compute capability 8.9 is needed\)"):
            engine.check_device(precision, torch.device("cuda"))
    engine.check_device("int4", torch.device("cuda"))
    engine.check_device("fp8", torch.device("cpu"))
