"""bf16, FP8 by its recipe, and activation checkpointing."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_distill import SETTINGS, STEP_TOKENS, rows, student, train, weights
from test_family import MatrixProducts
from tiny import ARCH, FAMILY, tiny_model

from minipuzzle.core.errors import InputError
from minipuzzle.distill import loop, precision, trainer
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
    assert values.dtype == dtype
    assert float(values.float().abs().max()) == largest  # the largest value fills the range
    assert torch.equal(values.float(), nearest(t * scale, dtype))
    assert torch.equal(quantise(t * 2**20, dtype)[0].float(), values.float())  # the scale is this tensor's own
    zero, one = quantise(torch.zeros(3), dtype)
    assert float(one) == 1
    assert zero.float().tolist() == [0, 0, 0]
    tiny, finite = quantise(torch.full((3,), 1e-44), dtype)
    assert torch.isfinite(finite)
    assert torch.isfinite(tiny.float()).all()


def test_products_and_gradients_are_of_the_rounded_values() -> None:
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 5, 16, generator=g).requires_grad_(), torch.randn(24, 16, generator=g).requires_grad_()
    other = torch.randn(24, 16, generator=g)
    out = torch.randn(2, 5, 24, generator=g)
    with Products(precision.Product(), {"w": w}):
        y = F.linear(x, w)
        assert torch.equal(F.linear(x, other), x @ other.T)  # no weight of the block
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
    names: list[str] = []
    real = precision.Product.__call__
    monkeypatch.setattr(precision.Product, "__call__", lambda self, n, x, w: (names.append(n), real(self, n, x, w))[1])
    pupil = student()
    use_fp8(pupil, CPU)
    pupil.compute_in(torch.bfloat16)
    pupil(torch.arange(16)[None])
    inner = list(pupil.blocks)[2:-2]
    expected = [n for b in inner for n in b.weights() if n.endswith("proj.weight")]
    assert sorted(names) == sorted(expected)
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


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights that are quantised from here on."""
    shapes: list[torch.Size] = []
    real = precision.Quantised.of
    monkeypatch.setattr(precision.Quantised, "of", lambda weight: (shapes.append(weight.shape), real(weight))[1])
    return shapes


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_are_quantised_once_for_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """However many passes a step has, and also where the backward pass computes again; of the
    weights as they are then."""
    shapes = counted(monkeypatch)
    settings = replace(SHORT, precision="fp8", activation_checkpointing=recompute)
    monkeypatch.setattr(loop, "pass_tokens", lambda device: 0)  # one sequence each
    pupil = train(tmp_path / "parts", settings=settings)
    products = sum(n.endswith("proj.weight") for b in list(pupil.blocks)[2:-2] for n in b.weights())
    assert len(shapes) == 4 * products
    monkeypatch.setattr(trainer, "use_fp8", lambda pupil, device, keep: use_fp8(pupil, device, keep=False))
    anew = train(tmp_path / "anew", settings=settings)  # quantised in every pass: the same numbers
    assert len(shapes) > 8 * products
    assert all(torch.equal(weights(pupil)[name], weight) for name, weight in weights(anew).items())


def test_shards_keep_no_quantised_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = counted(monkeypatch)
    pupil = student()
    products = use_fp8(pupil, CPU, keep=False)
    pupil.compute_in(torch.bfloat16)
    for _ in range(2):
        pupil(torch.arange(16)[None])
    assert [p.kept for p in products] == [{}] * len(products)
    assert len(shapes) == 2 * sum(n.endswith("proj.weight") for b in list(pupil.blocks)[2:-2] for n in b.weights())


def test_evaluation_is_never_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pupil that trains so: without gradients it computes what the bf16 model does."""
    seen: list[torch.Tensor] = []
    ids = torch.arange(16)[None]

    def look(pupil: HybridLM) -> dict[str, float]:
        with torch.no_grad():
            seen.append(pupil(ids))
        return {"loss": 1.0}

    pupil = student()
    train(tmp_path, pupil, replace(SHORT, precision="fp8"), evaluate=look)
    assert len(seen) == 2
    plain = HybridLM(FAMILY, pupil.arch, weights(pupil))
    plain.compute_in(torch.bfloat16)
    assert torch.equal(seen[-1], plain(ids).detach())
    assert not torch.equal(pupil(ids).detach(), seen[-1])  # with gradients it is fp8


def test_operands_lie_as_a_gpu_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLASLt's rules for FP8, which the CPU does not ask for: rows times columns, both sides of
    the second and the inner side multiples of 16, never two E5M2."""
    real, calls = torch._scaled_mm, []

    def strict(a: torch.Tensor, b: torch.Tensor, **more: Any) -> torch.Tensor:
        assert a.stride() == (a.shape[1], 1)
        assert b.stride() == (1, b.shape[0])
        assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0
        assert b.dtype == torch.float8_e4m3fn
        assert more["scale_a"].dtype == more["scale_b"].dtype == torch.float32
        calls.append((a.dtype, more["use_fast_accum"]))
        return real(a, b, **more)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    x, w = torch.randn(3, 7, 32).bfloat16().requires_grad_(), torch.randn(48, 32).bfloat16().requires_grad_()
    precision.Product()("w", x, w).sum().backward()
    assert calls == [(torch.float8_e4m3fn, True), (torch.float8_e5m2, False), (torch.float8_e5m2, False)]
    assert x.grad is not None
    assert x.grad.shape == x.shape


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
    """The interface of Transformer Engine that is used, with our own products; of each call,
    whether its weight is quantised anew."""
    inside: list[object] = []
    firsts: list[bool | None] = []

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

        def forward(self, x: torch.Tensor, is_first_microbatch: bool | None) -> torch.Tensor:
            assert inside == [("current", "hybrid")]
            firsts.append(is_first_microbatch)
            return precision.Product(keep=False)("", x, self.weight)

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
    return firsts


@pytest.mark.parametrize("recompute", [False, True])
def test_transformer_engine_gets_the_students_own_weights(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """With our products behind its interface, the gradients are ours."""
    firsts = stand_in(monkeypatch)
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
    assert len(firsts) == products * 2 * (1 + recompute)
    assert sum(first is True for first in firsts) == products  # of one step of two passes
    monkeypatch.setattr(precision, "FP8_MULTIPLE", 1024)
    with pytest.raises(InputError, match=r"proj.weight is \(.*need multiples of 1024"):
        use_fp8(student(), CUDA)


def wide_student() -> HybridLM:
    """Its widths are multiples of 16, in_proj's too."""
    arch = replace(ARCH, n_groups=2, mamba_num_heads=16)
    return HybridLM(FAMILY, arch, tiny_model(arch).by_name())


def test_what_a_gpu_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    check_precision("fp8", CUDA)
    assert "by torch._scaled_mm (no Transformer Engine: " in fp8_note(CUDA)
    assert {type(product) for product in use_fp8(wide_student(), CUDA)} == {precision.Product}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"a GPU has none .*8\.9"):
        check_precision("fp8", CUDA)
    for name in ("fp32", "bf16", "fp8"):
        check_precision(name, torch.device("cpu"))
