"""mamba-ssm's Triton kernels, as we call them, on a CPU in Triton's interpreter; `make test-triton`
runs this in an environment of its own.

Values and all gradients against our plain layer in float64: the scan by itself, the convolution,
scan and gated norm in one kernel, and the whole layer. Shown so: signatures, strides, dtypes, order
of groups and gate, padding, limits of dt. Not shown: compilation, speed, TF32, and the convolution,
for which causal-conv1d has CUDA alone: torch stands in for its two functions.
-> benchmarks/results/triton.json
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import sys
import time
import types
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton and mamba_ssm are imported
os.environ["MAMBA_DETERMINISTIC"] = "1"  # one configuration of each kernel, so nothing is timed

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter

from minipuzzle.families import kernels, mixers
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.ssd import NO_LIMIT, mamba_block_triton, ssd_plain, ssd_triton

RESULT = Path(__file__).parent / "results" / "triton.json"
# relative, in the 2-norm
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
LAYER_BF16 = 3e-2  # of a whole layer, whose in_proj rounds too
SCAN = ("y", "x", "dt", "A", "B", "C", "D", "dt_bias")
# sequences, tokens, heads, channels, groups, state, chunk
SHAPES = {"two groups": (1, 70, 4, 16, 2, 16, 32), "three groups, two sequences": (2, 70, 6, 16, 3, 16, 64),
          "one group, whole chunks": (1, 64, 2, 32, 1, 16, 16), "one chunk": (1, 20, 4, 16, 2, 32, None)}
Values = list[torch.Tensor]


def teach_bfloat16() -> None:
    """The interpreter keeps bfloat16 as uint16: its dot multiplies bit patterns, and its casts
    truncate. Give both their values; let any other arithmetic in bfloat16 fail loudly."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, binary = builder.create_dot, builder.cast_impl, builder.binary_op

    def widen(h: Any) -> Any:
        if h.dtype.scalar != tl.bfloat16:
            return h
        wide = np.ascontiguousarray(h.data).astype(np.uint32) << 16
        return handle(wide.view(np.float32), tl.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return widen(src)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()  # to nearest even
            return handle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise NotImplementedError(f"bfloat16 {op} in the interpreter works on bit patterns")
        return binary(self, lhs, rhs, op)

    builder.cast_impl, builder.binary_op = cast_impl, binary_op
    builder.create_fp_to_fp = lambda self, src, dst, mode: cast_impl(self, src, dst)
    builder.create_dot = lambda self, a, b, d, *rest: dot(self, widen(a), widen(b), d, *rest)


def lay_in_kernels() -> None:
    """mamba_ssm without its `__init__`, which wants compiled parts; causal_conv1d in torch; no
    CUDA."""
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package: Any = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["mamba_ssm"] = package
    torch.cuda.device = lambda index: contextlib.nullcontext()  # type: ignore[assignment, misc]
    card = types.SimpleNamespace(multi_processor_count=4)
    torch.cuda.get_device_properties = lambda device=None: card  # type: ignore[assignment]

    def conv(x_BCT: Any, w_CK: Any, bias: Any, silu: bool) -> torch.Tensor:
        assert x_BCT.stride(1) == 1
        assert x_BCT.shape[1] % kernels.CONV_CHANNELS == 0
        y = F.conv1d(x_BCT, w_CK[:, None], bias, padding=w_CK.shape[1] - 1, groups=len(w_CK))
        return F.silu(y[..., : x_BCT.shape[-1]]) if silu else y[..., : x_BCT.shape[-1]]

    def forward(x: Any, w: Any, bias: Any, seq_idx: Any, initial: Any, final: Any, silu: bool) -> torch.Tensor:
        return torch.empty_like(x).copy_(conv(x.float(), w.float(), bias.float(), silu))

    def backward(x: Any, w: Any, bias: Any, dout: Any, seq_idx: Any, initial: Any, dfinal: Any, dx: Any,
                 dinitial: bool, silu: bool) -> tuple[Any, ...]:
        leaves = [t.detach().float().requires_grad_() for t in (x, w, bias)]
        with torch.enable_grad():
            y = conv(leaves[0].mT.contiguous().mT, *leaves[1:], silu)
            gradients = torch.autograd.grad(y, leaves, dout.float())
        return dx.copy_(gradients[0]), gradients[1].to(w.dtype), gradients[2].to(bias.dtype), None

    whole: Any = types.ModuleType("causal_conv1d")
    parts: Any = types.ModuleType("causal_conv1d.cpp_functions")
    whole.__path__ = []
    whole.causal_conv1d_fn = lambda x, w, b, activation: conv(x, w, b, activation == "silu")
    parts.causal_conv1d_fwd_function, parts.causal_conv1d_bwd_function = forward, backward
    parts.causal_conv1d_update_function = None
    sys.modules |= {"causal_conv1d": whole, "causal_conv1d.cpp_functions": parts}


def values(function: Callable[..., torch.Tensor], inputs: Values, dtype: torch.dtype | None = None) -> Values:
    """y and the gradients of all inputs, in `dtype` or in their own."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def compare(names: tuple[str, ...], mine: Values, exact: Values, limit: float) -> dict[str, float]:
    errors = {}
    for name, a, b in zip(names, mine, exact, strict=True):
        errors[name] = float((a.double() - b.double()).norm() / b.double().norm())
        assert errors[name] <= limit, f"{name}: {errors[name]:.1e}, limit {limit:.0e}"
    return {name: float(f"{error:.1e}") for name, error in errors.items()}


def scan_inputs(shape: tuple[Any, ...], dtype: torch.dtype) -> Values:
    """As the layer hands them over: x, B, C views of one tensor; A is float32. Some dt are below
    0.001."""
    bsz, seq, heads, channels, groups, state, _ = shape
    g = torch.Generator().manual_seed(0)
    inner, small = heads * channels, groups * state
    xbc = torch.randn(bsz, seq, inner + 2 * small, generator=g).to(dtype)
    x, b, c = xbc.split([inner, small, small], dim=-1)
    raw = 3 * torch.randn(bsz, seq, heads, generator=g) - 4
    assert float((F.softplus(raw) < 1e-3).double().mean()) > 0.05
    return [x.view(bsz, seq, heads, channels), raw.to(dtype), -(1 + 3 * torch.rand(heads, generator=g)),
            b.view(bsz, seq, groups, state), c.view(bsz, seq, groups, state),
            torch.randn(heads, generator=g).to(dtype), torch.randn(heads, generator=g).to(dtype)]


def scan(shape: tuple[Any, ...], dtype: torch.dtype, limit: tuple[float, float]) -> dict[str, float]:
    inputs, chunk = scan_inputs(shape, dtype), shape[-1]
    mine = values(lambda *t: ssd_triton(*t[:6], chunk, t[6], True, limit), inputs)
    exact = values(lambda *t: ssd_plain(*t[:6], chunk, t[6], True, limit), inputs, torch.float64)
    return compare(SCAN, mine, exact, LIMITS[dtype])


def causality(shape: tuple[Any, ...]) -> dict[str, float]:
    """Other tokens from a place on: bit for bit the same before it, no gradient from there."""
    inputs, at = scan_inputs(shape, torch.float32), 40
    mixed = [torch.cat([t[:, :at], t[:, at:] + 1], 1) if t.dim() > 1 else t for t in inputs]

    def early(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return ssd_triton(x, *rest[:5], shape[-1], rest[5], True, NO_LIMIT)[:, :at]

    one, other = values(early, inputs), values(early, mixed)
    assert torch.equal(one[0], other[0])
    late = max(float(g[:, at:].abs().max()) for g in one[1:] if g.dim() > 1)
    assert late == 0
    return {"gradient of later tokens": late}


def layer(dtype: torch.dtype, shape: tuple[Any, ...], limit: tuple[float, float], whole: bool,
          plain: bool = False) -> dict[str, float]:
    """Convolution, scan and norm by our function, with `chunk` and `limit`; or the `whole` layer by
    the mixer itself, or `plain`, to compare with."""
    bsz, seq, heads, channels, groups, state, chunk = shape
    arch = Architecture("M", vocab_size=8, hidden_size=24, ffn_size=8, mamba_num_heads=heads, mamba_head_dim=channels,
                        n_groups=groups, state_size=state, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    g = torch.Generator().manual_seed(3)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*size, generator=g)

    inner, conv, rows = arch.mamba_inner, arch.mamba_conv, arch.mamba_inner + arch.mamba_conv + heads
    weights = {"in_proj.weight": normal(rows, 24, scale=0.3), "conv1d.weight": normal(conv, 1, 4, scale=0.5),
               "conv1d.bias": normal(conv, scale=0.2), "dt_bias": normal(heads) - 3, "A_log": normal(heads).abs(),
               "D": normal(heads), "norm.weight": 1 + normal(inner, scale=0.1),
               "out_proj.weight": normal(24, inner, scale=inner**-0.5)}
    names, inputs = tuple(weights), [t.to(dtype) for t in (*weights.values(), normal(bsz, seq, 24))]

    def mixer(*t: torch.Tensor) -> torch.Tensor:
        return mixers.mamba2(arch, dict(zip(names, t[:-1], strict=True)), t[-1], None)

    def block(*t: torch.Tensor) -> torch.Tensor:
        w = dict(zip(names, t[:-1], strict=True))
        y = mamba_block_triton(
            F.linear(t[-1], w["in_proj.weight"]), w["conv1d.weight"], w["conv1d.bias"], w["dt_bias"],
            -torch.exp(w["A_log"].float()), w["D"], w["norm.weight"], arch.norm_eps, channels,
            groups, chunk, limit)
        return F.linear(y, w["out_proj.weight"])

    usable = kernels.usable
    kernels.usable = lambda name, device, conv=None: name == "block" and not plain  # type: ignore[assignment]
    try:
        mine = values(mixer if whole else block, inputs)
    finally:
        kernels.usable = usable
    real = mixers.ssd
    mixers.ssd = lambda *t, **more: real(*t, **more, dt_limit=limit)  # type: ignore[assignment]
    try:
        exact = values(mixer, inputs, torch.float64)
    finally:
        mixers.ssd = real
    return compare(("y", *names, "x"), mine, exact, LAYER_BF16 if dtype == torch.bfloat16 else LIMITS[dtype])


def main() -> None:
    warnings.filterwarnings("ignore", message="Deterministic mode")
    torch.set_num_threads(1)
    lay_in_kernels()
    teach_bfloat16()
    clamped, f32, bf16 = (0.01, 0.1), torch.float32, torch.bfloat16
    two, three = SHAPES["two groups"], SHAPES["three groups, two sequences"]
    cases: dict[str, Callable[[], dict[str, float]]] = {
        f"scan, {name}, fp32": (lambda s=shape: scan(s, f32, NO_LIMIT)) for name, shape in SHAPES.items()}
    cases |= {
        "scan, dt between 0.01 and 0.1, fp32": lambda: scan(two, f32, clamped),
        "scan, two groups, bf16": lambda: scan(two, bf16, NO_LIMIT),
        "scan, three groups, two sequences, bf16": lambda: scan(three, bf16, NO_LIMIT),
        "scan, causality": lambda: causality(two),
        "block, three groups, two sequences, fp32": lambda: layer(f32, three, NO_LIMIT, False),
        "block, dt between 0.01 and 0.1, fp32": lambda: layer(f32, two, clamped, False),
        "layer, fp32": lambda: layer(f32, two, NO_LIMIT, True),
        "layer, bf16": lambda: layer(bf16, two, NO_LIMIT, True),
        "layer, bf16, plain torch": lambda: layer(bf16, two, NO_LIMIT, True, plain=True),
    }
    found, begin = {}, time.perf_counter()
    for name, case in cases.items():
        start = time.perf_counter()
        errors = case()
        found[name] = {"seconds": round(time.perf_counter() - start, 1), "errors": errors}
        print(name, found[name], flush=True)
    about = {"date": time.strftime("%Y-%m-%d"), "hardware": f"{os.cpu_count()} cores ({platform.machine()}), 1 thread",
             "versions": {"python": platform.python_version()} | {
                 n: metadata.version(n) for n in ("torch", "triton", "mamba-ssm")},
             "seconds": round(time.perf_counter() - begin, 1),
             "errors_are": "|ours - float64| / |float64| in the 2-norm, of the output and each gradient",
             "limits": {"fp32": LIMITS[f32], "bf16": LIMITS[bf16], "layer, bf16": LAYER_BF16}, "cases": found}
    RESULT.write_text(json.dumps(about, indent=1) + "\n")
    print(RESULT, file=sys.stderr)


if __name__ == "__main__":
    main()
