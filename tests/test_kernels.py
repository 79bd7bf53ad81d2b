"""Which kernel computes what of a Mamba-2 layer, and what it is given. The kernels themselves are
compared with float64 in Triton's interpreter (`make test-triton`); here stand-ins with their
signatures compute in plain torch."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_family import relative, scan_inputs

from minipuzzle.families import kernels, mixers
from minipuzzle.families.ssd import TRITON_CHUNK, causal_conv, ssd, ssd_triton
from minipuzzle.stages.notes import kernel_notes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CALLS: list[str] = []


def scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, chunk_size: int,
         D: torch.Tensor, dt_bias: torch.Tensor, dt_softplus: bool, dt_limit: tuple[float, float]) -> torch.Tensor:
    CALLS.append(f"scan {chunk_size}")
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    return tiny.naive_ssd(x, dt.clamp(*dt_limit), A, B, C, D)


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    CALLS.append("convolution")
    assert x.stride(1) == 1  # channels last, in multiples of 8
    assert x.shape[1] % 8 == x.stride(2) % 8 == 0
    y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))[..., : x.shape[2]]
    return F.silu(y) if activation == "silu" else y


def block(zxbcdt: torch.Tensor, conv1d_weight: torch.Tensor, conv1d_bias: torch.Tensor, dt_bias: torch.Tensor,
          A: torch.Tensor, D: torch.Tensor, chunk_size: int, dt_limit: tuple[float, float], activation: str,
          rmsnorm_weight: torch.Tensor, rmsnorm_eps: float, headdim: int, ngroups: int,
          norm_before_gate: bool) -> torch.Tensor:
    CALLS.append(f"block {chunk_size} {norm_before_gate}")
    bsz, seq, _ = zxbcdt.shape
    inner, state = len(D) * headdim, len(conv1d_weight) - len(D) * headdim
    z, xbc, dt = zxbcdt.split([inner, inner + state, len(D)], dim=-1)
    y = F.conv1d(xbc.transpose(1, 2), conv1d_weight[:, None], conv1d_bias, padding=3, groups=inner + state)
    x, b, c = F.silu(y[..., :seq].transpose(1, 2)).split([inner, state // 2, state // 2], dim=-1)
    y = tiny.naive_ssd(x.reshape(bsz, seq, -1, headdim), F.softplus(dt + dt_bias).clamp(*dt_limit), A,
                       b.reshape(bsz, seq, ngroups, -1), c.reshape(bsz, seq, ngroups, -1), D)
    y = (y.flatten(2) * F.silu(z)).view(bsz, seq, ngroups, -1)
    return (y * (y.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()).flatten(2) * rmsnorm_weight


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages, as a machine with a GPU has them."""
    CALLS.clear()
    names = {"mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": scan, "mamba_split_conv1d_scan_combined": block},
             "causal_conv1d": {"causal_conv1d_fn": convolution}, "causal_conv1d.cpp_functions": {"causal_conv1d_fwd_function": None}}
    for name, functions in names.items():
        for part in (name.rsplit(".", i)[0] for i in range(name.count(".") + 1)):
            if part not in names or part == name:
                module: Any = types.ModuleType(part)
                module.__path__ = []
                module.__dict__.update(functions if part == name else {})
                monkeypatch.setitem(sys.modules, part, module)
    monkeypatch.setattr(kernels, "_find", kernels._find.__wrapped__)


@pytest.fixture
def used(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU too: the stand-ins need no GPU."""
    monkeypatch.setattr(kernels, "usable", lambda name, device, conv=None: kernels.reason(name, CUDA, conv) is None)


def test_why_a_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_find", kernels._find.__wrapped__)
    for package in ("mamba_ssm", "causal_conv1d"):  # also where they are installed
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "mamba_ssm").exists()])
    odd = replace(tiny.ARCH, mamba_num_heads=6, mamba_head_dim=3, conv_kernel=5)  # 18 + 2 x 2 x 8 channels
    width = "a convolution over 5 tokens is none of (2, 3, 4)"
    assert kernels.used_by(CUDA, odd) == {
        "scan": "plain torch: mamba_ssm is not installed",
        "convolution": f"plain torch: causal_conv1d is not installed; conv channels 50 are no multiple of 8; {width}",
        "block": "plain torch: causal_conv1d is not installed; mamba_ssm is not installed; conv channels 50 are no "
                 f"multiple of 8; {width}"}
    assert kernels.used_by(CPU)["scan"] == "plain torch: needs CUDA, this is cpu; mamba_ssm is not installed"
    # there, but broken: its own words
    package: Any = types.ModuleType("mamba_ssm")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    assert kernels.reason("scan", CUDA) == ("mamba_ssm.ops.triton.ssd_combined does not import: "
                                            "No module named 'mamba_ssm.ops'")
    assert kernel_notes(tiny.ARCH, CPU) == []
    assert [note.split(":")[0] for note in kernel_notes(tiny.ARCH, CUDA)] == [
        f"the {part} of Mamba-2 layers was not computed by {function}" for part, function in (
            ("scan", "mamba_chunk_scan_combined"), ("convolution", "causal_conv1d_fn"),
            ("block", "mamba_split_conv1d_scan_combined"))]


def test_where_both_are_installed(installed: None) -> None:
    assert [used.rsplit(".", 1)[1] for used in kernels.used_by(CUDA, tiny.ARCH).values()] == [
        "mamba_chunk_scan_combined", "causal_conv1d_fn", "mamba_split_conv1d_scan_combined"]
    assert kernel_notes(tiny.ARCH, CUDA) == []
    assert kernels.reason("block", CUDA, (52, 4)) == "conv channels 52 are no multiple of 8"
    assert not kernels.usable("scan", CPU)


@pytest.mark.parametrize(("chunk", "softplus", "limit"), [(None, True, (0.0, float("inf"))), (16, False, (0.05, 0.4))])
def test_the_scan_gets_all_that_was_asked(used: None, chunk: int | None, softplus: bool,
                                          limit: tuple[float, float]) -> None:
    x, dt, a, b, c, d = scan_inputs(40)
    bias = torch.linspace(-1, 1, 6, dtype=torch.float64) if softplus else None
    mine = ssd(x, dt, a, b, c, d, chunk, dt_bias_H=bias, dt_softplus=softplus, dt_limit=limit)
    assert [f"scan {chunk or TRITON_CHUNK}"] == CALLS
    assert torch.equal(mine, ssd_triton(x, dt, a, b, c, d, chunk, bias, softplus, limit))
    wanted = (F.softplus(dt + bias) if softplus else dt).clamp(*limit)
    assert relative(mine, tiny.naive_ssd(x, wanted, a, b, c, d)) < 1e-12


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.9)])
def test_the_plain_scan_makes_dt_as_the_kernel_does(limit: tuple[float, float]) -> None:
    x, dt, a, b, c, d = scan_inputs(40)
    raw, bias = dt.log(), torch.linspace(-1, 1, 6, dtype=torch.float64)
    found = []
    for function in (lambda *t: ssd(*t[:-1], dt_bias_H=t[-1], dt_softplus=True, dt_limit=limit),
                     lambda *t: tiny.naive_ssd(t[0], F.softplus(t[1] + t[-1]).clamp(*limit), *t[2:-1])):
        leaves = [t.clone().requires_grad_() for t in (x, raw, a, b, c, d, bias)]
        y = function(*leaves)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    assert max(relative(mine, plain) for mine, plain in zip(*found, strict=True)) < 1e-10


@pytest.mark.parametrize("silu", [False, True])
def test_the_convolution_is_the_kernels_where_channels_allow(used: None, silu: bool) -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 9, 43, generator=g)
    for channels, calls in ((16, ["convolution"]), (15, [])):
        CALLS.clear()
        x, w, bias = wide[..., 3 : 3 + channels].bfloat16(), torch.randn(channels, 1, 4, generator=g), torch.randn(channels, generator=g)
        found = causal_conv(x, w.bfloat16(), bias, silu)
        assert calls == CALLS
        assert found.dtype == torch.float32  # whatever the weights' dtype is
        wide_w = w.bfloat16().double()
        plain = F.conv1d(x.double().mT, wide_w, bias.double(), padding=3, groups=channels)[..., :9].mT
        assert relative(found, F.silu(plain) if silu else plain) < 1e-6


def test_training_takes_the_whole_block(used: None) -> None:
    """With gradients and without a probe; scoring and evaluation scan in float32. Values and
    gradients are those of the plain layer."""
    weights = {n.removeprefix("mixer."): t.double() for n, t in tiny.layer_weights(tiny.trained_like(tiny.ARCH), 0).items()}
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        leaves = {n: t.clone().requires_grad_() for n, t in weights.items()}
        y = mixers.mamba2(tiny.ARCH, leaves, x, None)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    fused = run()
    assert [f"block {TRITON_CHUNK} False"] == CALLS
    CALLS.clear()
    with torch.no_grad():
        evaluated = mixers.mamba2(tiny.ARCH, weights, x, None)
    mixers.mamba2(tiny.ARCH, weights, x, lambda name, tensor: None)
    assert ["convolution", f"scan {TRITON_CHUNK}"] * 2 == CALLS
    assert relative(evaluated, fused[0]) < 1e-10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "usable", lambda *asked: False)
        plain = run()
    assert len(fused) == 1 + 8  # in_proj, conv weight and bias, dt_bias, A_log, D, norm, out_proj
    assert max(relative(a, b) for a, b in zip(fused, plain, strict=True)) < 1e-9
