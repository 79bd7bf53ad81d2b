"""The blocks of each family against transformers and against plain references."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import tiny
import torch
from family_contract import FamilyContract
from tiny import relative, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from minipuzzle.core.published import read_config
from minipuzzle.families import mixers
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.ssd import causal_conv, ssd
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.verbs.source import bundled_model

CHUNK = 32


class TestNemotronH(FamilyContract):
    family = tiny.FAMILY
    arch = tiny.ARCH
    config = tiny.PARENT_CONFIG

    def weights(self, arch: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return tiny.trained_like(arch, dtype=dtype)

    def theirs(self, arch: Architecture, weights: Mapping[str, torch.Tensor]) -> Any:
        return tiny.transformers_model(arch, weights)

    def reference(self, arch: Architecture, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        return tiny.reference_logits(arch, weights, ids)

    @pytest.mark.parametrize("change", [{"n_groups": 4}, {"n_groups": 8}, {"n_groups": 1}, {"conv_kernel": 2},
                                        {"conv_bias": False}, {"use_bias": True, "mlp_bias": True},
                                        {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"norm_eps": 0.1}])
    def test_variants(self, change: dict[str, Any]) -> None:
        arch = dataclasses.replace(self.arch, **change)
        weights, ids = self.weights(arch, torch.float32), tokens(2, 45)
        theirs = tiny.transformers_model(arch, weights, layer_norm_epsilon=arch.norm_eps)
        with torch.no_grad():
            expected = theirs(ids, use_cache=False).logits
        assert relative(self.mine(arch, weights, ids), expected) < 1e-5

    def test_transformers_with_its_dt_limit_is_another_model(self) -> None:
        """Why the limit has to be taken away: with small steps the clamp at 0.001 is seen in the
        logits."""
        weights, ids = self.weights(self.arch, torch.float32), tokens(2, 200)
        for name in weights:
            if name.endswith("dt_bias"):
                weights[name] = weights[name] - 6
        clamped, free = self.theirs(self.arch, weights), self.theirs(self.arch, weights)
        limited = 0
        for layer in clamped.model.layers:
            if hasattr(layer.mixer, "time_step_limit"):
                layer.mixer.time_step_limit = (0.001, float("inf"))
                limited += 1
        assert limited == 4
        mine = self.mine(self.arch, weights, ids)
        with torch.no_grad():
            assert relative(mine, free(ids, use_cache=False).logits) < 1e-5
            assert relative(mine, clamped(ids, use_cache=False).logits) > 1e-3

    def test_the_bundled_model(self) -> None:
        """Real weights: the logits of transformers, unpatched, and an SSM that matters."""
        from transformers import AutoModelForCausalLM

        folder = open_model(bundled_model())
        model = Model.load(folder)
        ids = tokens(2, 150, vocab=folder.arch.vocab_size)
        assert folder.arch.to_config(folder.config) == folder.config  # as we write it, with time_step_min
        theirs = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = theirs(ids, use_cache=False).logits
            assert torch.equal(tiny.without_dt_limit(theirs)(ids, use_cache=False).logits, expected)  # needs no patch
            for layer in theirs.model.layers:
                layer.mixer.time_step_limit = (0.001, float("inf"))  # as published models come
            clamped = theirs(ids, use_cache=False).logits
        assert 3e-4 < float((clamped - expected).norm() / expected.norm()) < 3e-3
        mine = final_hidden(model, ids) @ model.head.T
        assert relative(mine, expected) < 1e-5
        for i in folder.arch.layers_of("M"):
            model.layers[i]["mixer.out_proj.weight"].zero_()
        assert relative(final_hidden(model, ids) @ model.head.T, expected) > 0.1
        assert read_config(folder.path)["hybrid_override_pattern"] == folder.arch.pattern


class TestMoE(TestNemotronH):
    """The same with MoE layers."""

    arch = tiny.MOE
    config = tiny.PARENT_CONFIG | {"mlp_bias": True}

    @pytest.mark.parametrize("change", [
        {"moe_latent_size": 0, "mlp_bias": False}, {"router_groups": 1, "norm_topk_prob": False}, {"experts_per_token": 4},
        {"router_groups": 4, "router_groups_used": 3, "experts_per_token": 5}])
    def test_variants(self, change: dict[str, Any]) -> None:
        arch = dataclasses.replace(self.arch, **change)
        weights, ids = self.weights(arch, torch.float32), tokens(2, 45)
        with torch.no_grad():
            expected = tiny.transformers_model(arch, weights)(ids, use_cache=False).logits
        assert relative(self.mine(arch, weights, ids), expected) < 1e-5
        wide = {k: v.double() for k, v in weights.items()}
        assert relative(self.mine(arch, wide, ids), self.reference(arch, wide, ids)) < 1e-9

    test_the_bundled_model = None
    test_transformers_with_its_dt_limit_is_another_model = None


# the scan
# --------------------------------------------------------------------------------------------------------


def scan_inputs(length: int, heads: int = 6, groups: int = 3, chan: int = 3, state: int = 4,
                seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, dt, a, b, c, d as a trained block has them: dt from 0.001 to 1, A from 1 to 16."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    dt = torch.exp(torch.rand(2, length, heads, generator=g, dtype=torch.float64) * 6.9 - 6.9)
    a = -torch.exp(torch.rand(heads, generator=g, dtype=torch.float64) * 2.8)
    return normal(2, length, heads, chan), dt, a, normal(2, length, groups, state), normal(2, length, groups, state), \
        normal(heads)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 97])
def test_scan_is_the_recurrence(length: int) -> None:
    inputs = scan_inputs(length)
    assert relative(ssd(*inputs), tiny.naive_ssd(*inputs)) < 1e-12


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_a_head_reads_its_own_group(groups: int) -> None:
    inputs = scan_inputs(40, groups=groups)
    out = ssd(*inputs)
    assert relative(out, tiny.naive_ssd(*inputs)) < 1e-12
    x, dt, a, b, c, d = inputs
    other = b.clone()
    other[:, :, -1] = 0  # the last group's B: only its heads may notice
    changed = ssd(x, dt, a, other, c, d)
    first = 6 - 6 // groups
    assert torch.equal(changed[:, :, :first], out[:, :, :first])
    assert relative(changed[:, :, first:], out[:, :, first:]) > 0.1


def test_scan_does_not_depend_on_the_chunk() -> None:
    inputs = scan_inputs(100)
    plain = tiny.naive_ssd(*inputs)
    results = [ssd(*inputs, chunk=chunk) for chunk in (1, 7, 16, 32, 100, 128)]
    assert len(results) == 6
    assert max(relative(result, plain) for result in results) < 1e-12


def test_scan_survives_fast_decay() -> None:
    """exp of the differences above the diagonal would overflow: dt A = -3000 over a chunk."""
    x, dt, a, b, c, d = (t.float() for t in scan_inputs(64))
    dt = torch.full_like(dt, 6.0)
    x.requires_grad_()
    out = ssd(x, dt, a * 16, b, c, d)
    out.sum().backward()
    assert relative(out.detach(), tiny.naive_ssd(*(t.detach().double() for t in (x, dt, a * 16, b, c, d)))) < 1e-5
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_scan_in_low_precision_computes_in_float32() -> None:
    inputs = [t.bfloat16() for t in scan_inputs(70)]
    out = ssd(*inputs)
    assert out.dtype == torch.float32
    assert relative(out, tiny.naive_ssd(*(t.double() for t in inputs))) < 1e-5


def test_gradients_of_the_scan() -> None:
    inputs = [t.requires_grad_() for t in scan_inputs(7, heads=2, groups=1, chan=2, state=2)]
    assert torch.autograd.gradcheck(lambda *args: ssd(*args, chunk=3), inputs)
    grads = []
    for function in (ssd, tiny.naive_ssd):
        leaves = [t.requires_grad_() for t in scan_inputs(70)]
        function(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert len(grads[0]) == 6
    assert max(relative(mine, plain) for mine, plain in zip(*grads, strict=True)) < 1e-10


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_causal_convolution(length: int, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, length, 5, generator=g, dtype=torch.float64), torch.randn(5, 1, 4, generator=g, dtype=torch.float64)
    b = torch.randn(5, generator=g, dtype=torch.float64) if bias else None
    plain = torch.nn.functional.conv1d(x.transpose(1, 2), w, b, padding=3, groups=5)[..., :length].transpose(1, 2)
    assert relative(causal_conv(x, w, b), plain) < 1e-12


@pytest.mark.parametrize("length", [1, 33, 97])
def test_scan_and_convolution_are_those_of_transformers(length: int) -> None:
    """A second reference, by other hands: its chunked scan (in float32) and its depthwise
    convolution."""
    from transformers.models.nemotron_h.modeling_nemotron_h import causal_conv1d_fn, mamba2_chunk_scan

    x, dt, a, b, c, d = (t.float() for t in scan_inputs(length))
    theirs = mamba2_chunk_scan(x, dt, a, b, c, chunk_size=CHUNK, D=d)
    assert relative(ssd(x, dt, a, b, c, d), theirs) < 1e-5
    g = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*shape, generator=g) for shape in ((2, length, 5), (5, 1, 4), (5,)))
    theirs = causal_conv1d_fn(x.transpose(1, 2), w[:, 0], bias).transpose(1, 2)
    assert relative(causal_conv(x, w, bias), theirs) < 1e-6


# low precision
# ---------------------------------------------------------------------------------------------------


class MatrixProducts(TorchDispatchMode):
    """While entered, notes the dtype of every matrix product, of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, list[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "matmul", "einsum", "linear"):
            self.dtypes.setdefault(name, []).append(out.dtype)
        return out


def test_autocast_leaves_the_scan_in_float32() -> None:
    """Forward and backward; its own bf16 would be wrong by 4e-3."""
    inputs = [t.float().requires_grad_() for t in scan_inputs(97)]
    exact = [t.double().detach().requires_grad_() for t in inputs]
    with MatrixProducts() as products:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16  # it is on
            out = ssd(*inputs)
        out.square().sum().backward()
    assert products.dtypes == {"mm": [torch.bfloat16], "bmm": [torch.float32] * 12}  # four, and two for each
    plain = tiny.naive_ssd(*exact)
    plain.square().sum().backward()
    assert relative(out.detach(), plain.detach()) < 1e-6
    assert max(relative(mine.grad, other.grad) for mine, other in zip(inputs, exact, strict=True)) < 1e-5


@pytest.mark.parametrize("weights_in_bf16", [False, True])
def test_a_mamba_block_in_bf16_scans_in_float32(weights_in_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, and with bf16 weights: only the two projections are bf16; dt is rounded
    nowhere after in_proj."""
    seen: list[tuple[torch.Tensor, ...]] = []
    real = mixers.ssd
    monkeypatch.setattr(mixers, "ssd", lambda *inputs, dt_bias_H, **more: (
        seen.append((*inputs, dt_bias_H)), real(*inputs, dt_bias_H=dt_bias_H, **more))[1])
    dtype = torch.bfloat16 if weights_in_bf16 else torch.float32
    weights = {n.removeprefix("mixer."): t.to(dtype) for n, t in tiny.layer_weights(tiny.trained_like(tiny.ARCH), 0).items()}
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with MatrixProducts() as products, torch.autocast("cpu", torch.bfloat16, enabled=not weights_in_bf16):
        out = mixers.mamba2(tiny.ARCH, weights, x, None)
    assert out.dtype == torch.bfloat16
    assert products.dtypes == {"mm": [torch.bfloat16] * 2, "bmm": [torch.float32] * 4}
    ((xs, raw, a, b, c, _, dt_bias),) = seen
    dt = torch.nn.functional.softplus(raw + dt_bias)
    assert {t.dtype for t in (xs, dt, a, b, c)} == {torch.float32}
    projected = torch.nn.functional.linear(x.bfloat16(), weights["in_proj.weight"].bfloat16())[..., -8:].double()
    wanted = torch.nn.functional.softplus(projected + weights["dt_bias"].double())
    assert relative(dt, wanted) < 1e-6
