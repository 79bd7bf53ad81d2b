"""Step `scan`: the scan that training uses, against float64 on the CPU, forward and all gradients.

At the head shapes of three published models, in three precisions. Inputs are as
families/nemotron_h.py hands them over: x, B and C are views of one tensor, dt, A and D are float32.
Some dt are below 0.001, where other implementations have a floor. A change of the last third must
not reach the outputs before it, nor gradients of those the last third.

Each precision runs in a process of its own, because Triton reads the precision of its products
once; the three run at the same time. They take one configuration of each kernel (ONE in check.py).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minipuzzle.core.published import published
from minipuzzle.families import kernels
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.ssd import ssd

if TYPE_CHECKING:
    from check import Run

MODELS = ("nemotron-h-8b", "nemotron-h-4b", "nemotron-h-56b")
TENSORS = ("y", "x", "dt", "A", "B", "C", "D")  # the output, then the gradients


@dataclass(frozen=True)
class Precision:
    """`largest`: of max |a - b| / max |b|; `mean`: of mean |a - b| / mean |b|. Both were chosen
    before any GPU ran.
    """

    dtype: torch.dtype
    products: str  # of float32 in Triton
    largest: float
    mean: float


PRECISIONS = {
    "fp32, ieee": Precision(torch.float32, "ieee", 1e-4, 1e-4),
    "fp32, tf32": Precision(torch.float32, "tf32", 1e-2, 5e-3),
    "bf16": Precision(torch.bfloat16, "tf32", 5e-2, 2e-2),
}


def scan(run: Run) -> None:
    run.put(
        why_not_triton=kernels.reason("scan", torch.device(run.device)),
        tolerances={name: {"max": p.largest, "mean": p.mean} for name, p in PRECISIONS.items()},
    )
    rows: dict[str, Any] = {}
    if run.tiny:
        for name in PRECISIONS:
            rows[name] = compare(name, run.device, True)
            run.put(precisions=rows)
    else:
        children = {name: start(name, run.device, run.scratch) for name in PRECISIONS}
        for name, (process, answer) in children.items():
            code = process.wait()
            run.check(code == 0, f"{name}: exit code {code}")
            rows[name] = json.loads(answer.read_text()) if answer.is_file() else {}
            run.put(precisions=rows)
    for name, models in rows.items():
        run.check(
            set(models) == set(MODELS), f"{name}: {len(models)} of {len(MODELS)} models were done"
        )
        for model, row in models.items():
            for why in row["failures"]:
                run.check(False, f"{name}, {model}: {why}")


def start(name: str, device: str, scratch: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A process that writes the rows of one precision to a file, model by model."""
    number = list(PRECISIONS).index(name)
    answer = scratch / f"scan{number}.json"
    environment = os.environ | {
        "TRITON_F32_DEFAULT": PRECISIONS[name].products,
        "TRITON_CACHE_DIR": str(scratch / f"triton{number}"),
    }
    return subprocess.Popen(
        [sys.executable, __file__, name, device, str(answer)], env=environment
    ), answer


def compare(name: str, device: str, tiny: bool, answer: Path | None = None) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for model in MODELS:
        rows[model] = row(
            Architecture.from_config(published(model)), PRECISIONS[name], device, tiny
        )
        if answer is not None:
            answer.write_text(json.dumps(rows))
    return rows


def row(arch: Architecture, precision: Precision, device: str, tiny: bool) -> dict[str, Any]:
    """One shape in one precision: the errors of every tensor, causality, and what is above its
    limit.
    """
    heads, channels, groups, state = (
        arch.mamba_num_heads,
        arch.mamba_head_dim,
        arch.n_groups,
        arch.state_size,
    )
    if tiny:
        heads, channels, groups, state = heads // 8, channels // 8, groups // 4, state // 8
    tokens = 75 if tiny else 300
    late = tokens * 2 // 3
    shape = (tokens, heads, channels, groups, state)
    given = inputs(*shape, precision.dtype, seed=0)
    dy = torch.randn(1, tokens, heads, channels, generator=torch.Generator().manual_seed(1)).to(
        precision.dtype
    )
    expected = values(given, dy, "cpu", torch.float64)
    found = values(given, dy, device)
    failures, errors = [], {}
    for tensor, a, b in zip(TENSORS, found, expected, strict=True):
        difference = (a.double() - b).abs()
        largest = float(difference.max() / b.abs().max())
        mean = float(difference.mean() / b.abs().mean())
        errors[tensor] = {"max": largest, "mean": mean}
        if not (largest <= precision.largest and mean <= precision.mean):
            failures.append(
                f"{tensor}: max {largest:.1e} (limit {precision.largest:.0e}), mean {mean:.1e} "
                f"(limit {precision.mean:.0e})"
            )

    # other late tokens: nothing before them changes, and nothing flows back from before to them
    other = inputs(*shape, precision.dtype, seed=2)
    mixed = [
        torch.cat([u[:, :late], v[:, late:]], 1) if u.dim() > 1 else u
        for u, v in zip(given, other, strict=True)
    ]
    early_dy = dy.clone()
    early_dy[:, late:] = 0
    changed = values(mixed, early_dy, device)
    future = max(
        float(changed[i][:, late:].abs().max())
        for i, t in enumerate(TENSORS)
        if t in ("x", "dt", "B", "C")
    )
    before = float((changed[0] - found[0])[:, :late].abs().max() / found[0].abs().max())
    after = float((changed[0] - found[0])[:, late:].abs().max() / found[0].abs().max())
    causality = {
        "first_changed_token": late,
        "change_before": before,
        "change_after": after,
        "gradient_of_later_tokens": future,
    }
    if not (before <= 1e-6 and future == 0 and after > 1e-2):
        failures.append(f"not causal: {causality}")
    dt = given[1]
    return {
        "tokens": tokens,
        "heads": heads,
        "channels": channels,
        "groups": groups,
        "state": state,
        "dt_below_0.001": float((dt < 1e-3).double().mean()),
        "errors": errors,
        "causality": causality,
        "failures": failures,
    }


def inputs(
    tokens: int, heads: int, channels: int, groups: int, state: int, dtype: torch.dtype, seed: int
) -> list[torch.Tensor]:
    """x, dt, A, B, C, D of one sequence; dt from 1e-4 to 0.3, evenly in its logarithm."""
    gen = torch.Generator().manual_seed(seed)
    inner, small = heads * channels, groups * state
    xbc = torch.randn(1, tokens, inner + 2 * small, generator=gen).to(dtype)
    x, b, c = xbc.split([inner, small, small], dim=-1)
    dt = (torch.rand(1, tokens, heads, generator=gen) * math.log(3000) + math.log(1e-4)).exp()
    a, d = -(1 + 15 * torch.rand(heads, generator=gen)), torch.randn(heads, generator=gen)
    return [
        x.view(1, tokens, heads, channels),
        dt,
        a,
        b.view(1, tokens, groups, state),
        c.view(1, tokens, groups, state),
        d,
    ]


def values(
    given: list[torch.Tensor], dy: torch.Tensor, device: str, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """y and the gradients of all inputs, on the CPU."""
    leaves = [t.to(device, dtype or t.dtype).detach().requires_grad_() for t in given]
    y = ssd(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy.to(device, y.dtype))
    return [t.detach().cpu() for t in (y, *gradients)]


if __name__ == "__main__":
    compare(sys.argv[1], sys.argv[2], False, Path(sys.argv[3]))
