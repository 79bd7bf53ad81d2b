"""bf16, FP8 by its recipe, and activation checkpointing."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_distill import SETTINGS, STEP_TOKENS, rows, student, train, weights
from test_family import MatrixProducts
from tiny import ARCH, FAMILY, tiny_model

from minipuzzle.core.errors import InputError
from minipuzzle.distill import precision
from minipuzzle.distill.precision import Products, check_precision, fp8_note, quantise, use_fp8
from minipuzzle.models.module import HybridLM
from minipuzzle.models.selection import Selection

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHORT = replace(SETTINGS, tokens=4 * STEP_TOKENS)


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each value's nearest of all numbers that the dtype has."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[torch.isfinite(every)].unique()
    return every[(values[..., None] - every).abs().argmin(-1)]


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)])
def test_current_scaling(dtype: torch.dtype, largest: float) -> None:
    t = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * 1e-3
    values, scale = quantise(t, dtype)
    assert float(scale) == pytest.approx(largest / float(t.abs().max()))
    assert float(values.float().abs().max()) == largest  # the largest value fills the range
    assert torch.equal(values.float(), nearest(t * scale, dtype))
    assert torch.equal(quantise(t * 2**20, dtype)[0], values)  # the scale is this tensor's own
    zero, one = quantise(torch.zeros(3), dtype)
    assert float(one) == 1
    assert zero.tolist() == [0, 0, 0]
    tiny, finite = quantise(torch.full((3,), 1e-44), dtype)
    assert torch.isfinite(finite)
    assert torch.isfinite(tiny).all()


def test_products_and_gradients_are_of_the_rounded_values() -> None:
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 5, 16, generator=g).requires_grad_(), torch.randn(24, 16, generator=g).requires_grad_()
    out = torch.randn(2, 5, 24, generator=g)
    with Products(precision._emulated):
        y = F.linear(x, w)
    y.backward(out.bfloat16())

    def rounded(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scale = torch.finfo(dtype).max / t.detach().abs().max()
        return nearest(t.detach() * scale, dtype).double() / scale

    x8, w8 = rounded(x, torch.float8_e4m3fn), rounded(w, torch.float8_e4m3fn)
    g8 = rounded(out.bfloat16().float(), torch.float8_e5m2)
    assert x.grad is not None
    assert w.grad is not None
    for mine, exact in ((y, x8 @ w8.T), (x.grad, g8 @ w8), (w.grad, torch.einsum("bto,bti->oi", g8, x8))):
        assert float((mine.detach().double() - exact).norm() / exact.norm()) < 5e-3  # bf16 sums
    plain = x.detach() @ w.detach().T
    assert float((y.detach().float() - plain).norm() / plain.norm()) > 0.01


def test_the_first_and_last_two_layers_stay_out_of_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four matrix products at each end: of the M-M* and *-MM kind two layers have at most that."""
    shapes: list[torch.Size] = []
    real = precision._emulated
    monkeypatch.setattr(precision, "_emulated", lambda x, w: (shapes.append(w.shape), real(x, w))[1])
    pupil = student()
    use_fp8(pupil, CPU)
    pupil.compute_in(torch.bfloat16)
    pupil(torch.arange(16)[None])
    inner = list(pupil.blocks)[2:-2]
    expected = [w.shape for b in inner for n, w in b.weights().items() if n.endswith("proj.weight")]
    assert sorted(shapes) == sorted(expected)
    assert len(expected) >= 8
    few = tiny_model().slice(ARCH.keep((0, 1, 2, 3)), Selection((0, 1, 2, 3)))
    with pytest.raises(InputError, match="this student has 4"):
        use_fp8(HybridLM(FAMILY, few.arch, few.by_name()), CPU)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_low_precision_trains_nearly_alike(tmp_path: Path, name: str) -> None:
    longer = replace(SETTINGS, tokens=30 * STEP_TOKENS)
    train(tmp_path / "fp32", settings=longer)
    pupil = train(tmp_path / name, settings=replace(longer, precision=name))
    assert all(p.dtype == torch.float32 for p in pupil.parameters())
    exact, low = (sum(r["kl"] for r in rows(tmp_path / n)[-5:]) / 5 for n in ("fp32", name))
    first = rows(tmp_path / "fp32")[0]["kl"]
    assert low != exact
    assert low < 0.7 * first
    assert abs(low - exact) < 0.25 * (first - exact)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_in_bf16_scans_in_float32(tmp_path: Path, recompute: bool) -> None:
    """In the real loop, its backward pass and its recomputation: the batched products are the
    scan's."""
    with MatrixProducts() as products:
        train(tmp_path, settings=replace(SETTINGS, tokens=STEP_TOKENS, precision="bf16",
                                         activation_checkpointing=recompute))
    assert set(products.dtypes["bmm"]) == {torch.float32}
    # two in each of the teacher's four scans and of the student's three, these perhaps again; then
    # two for each back
    assert len(products.dtypes["bmm"]) == 2 * 4 + 2 * 3 * (4 if recompute else 3)
    assert torch.bfloat16 in products.dtypes["mm"]


def test_checkpointing_changes_nothing_but_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fp32", "fp8"):
        settings = replace(SHORT, precision=name)
        plain = weights(train(tmp_path / name, settings=settings))
        less = weights(train(tmp_path / f"{name} less", settings=replace(settings, activation_checkpointing=True)))
        assert all(torch.equal(plain[n], less[n]) for n in plain)
        assert rows(tmp_path / name) == rows(tmp_path / f"{name} less")
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        pupil = student()
        for block in pupil.blocks:
            block.recompute = recompute  # type: ignore[assignment]
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            pupil(torch.arange(64)[None])
        kept[recompute] = sum(saved)
    assert kept[True] < 0.3 * kept[False]
    # it may be switched when a run goes on
    train(tmp_path / "switched", settings=SHORT, stop_at_tokens=2 * STEP_TOKENS)
    on = weights(train(tmp_path / "switched", settings=replace(SHORT, activation_checkpointing=True)))
    assert all(torch.equal(on[n], weights(train(tmp_path / "fp32", settings=SHORT))[n]) for n in on)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The interface of Transformer Engine that is used, with the emulation's products; the shapes
    it multiplied."""
    inside: list[object] = []
    shapes: list[torch.Size] = []

    class Autocast:
        def __init__(self, enabled: bool, recipe: object) -> None:
            assert enabled
            self.recipe = recipe

        def __enter__(self) -> None:
            inside.append(self.recipe)

        def __exit__(self, *_: object) -> None:
            inside.pop()

    class Linear(torch.nn.Linear):
        def __init__(self, columns: int, rows: int, bias: bool, device: str, params_dtype: torch.dtype) -> None:
            super().__init__(columns, rows, bias, device, params_dtype)
            assert self.weight.is_meta

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert inside == [("current", "hybrid")]
            shapes.append(self.weight.shape)
            return precision._emulated(x, self.weight)

    engine, modules, recipes = (types.ModuleType(n) for n in ("te", "te.pytorch", "te.recipe"))
    engine.__version__ = "2.20"  # type: ignore[attr-defined]
    modules.__dict__.update(autocast=Autocast, Linear=Linear)
    recipes.__dict__.update(Format=types.SimpleNamespace(HYBRID="hybrid"),
                            Float8CurrentScaling=lambda fp8_format: ("current", fp8_format))
    monkeypatch.setitem(sys.modules, "transformer_engine", engine)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", modules)
    monkeypatch.setitem(sys.modules, "transformer_engine.common", types.ModuleType("te.common"))
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return shapes


@pytest.mark.parametrize("recompute", [False, True])
def test_transformer_engine_gets_the_students_own_weights(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """With the emulation's products behind its interface, the gradients are the emulation's."""
    shapes = stand_in(monkeypatch)
    check_precision("fp8", CUDA)
    assert "Transformer Engine 2.20" in fp8_note(CUDA)
    monkeypatch.setattr(precision, "FP8_MULTIPLE", 2)  # the small model's widths
    gradients = []
    for device in (CPU, CUDA):
        pupil = student()
        use_fp8(pupil, device)
        pupil.compute_in(torch.bfloat16)
        for block in pupil.blocks:
            block.recompute = recompute  # type: ignore[assignment]
        for _ in range(2):
            pupil(torch.arange(16)[None]).square().sum().backward()
        gradients.append({n: p.grad for n, p in pupil.parameters_by_name().items() if n != "lm_head.weight"})
    emulated, engine = gradients
    for name, gradient in emulated.items():
        torch.testing.assert_close(engine[name], gradient, rtol=0, atol=0)
    products = sum(n.endswith("proj.weight") for b in list(student().blocks)[2:-2] for n in b.weights())
    assert len(shapes) == products * 2 * (1 + recompute)
    monkeypatch.setattr(precision, "FP8_MULTIPLE", 1024)
    with pytest.raises(InputError, match=r"proj.weight is \(.*need multiples of 1024"):
        use_fp8(student(), CUDA)


def test_what_a_gpu_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(InputError, match=r"Transformer Engine.*minipuzzle\[fp8\]"):
        check_precision("fp8", CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"a GPU has none .*8\.9"):
        check_precision("fp8", CUDA)
    for name in ("fp32", "bf16", "fp8"):
        check_precision(name, torch.device("cpu"))
