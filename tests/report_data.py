"""A report as the pipeline would fill it: real architectures and costs, invented losses."""

from __future__ import annotations

from typing import Any

import numpy as np

from minipuzzle.core.budget import Budget, Workload
from minipuzzle.core.scores import WidthScores
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.candidate import Candidate
from minipuzzle.stages.results import width_shares

PARENT = Architecture(
    pattern="M-M-M*-M-M-M-M*-M-M-M-", vocab_size=2048, hidden_size=96, ffn_size=512, mamba_num_heads=16,
    mamba_head_dim=16, n_groups=4, state_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
LOAD = Workload()
NATS_PARENT, NATS_SLICED, NATS_DISTILLED = 1.8421, 4.0178, 1.9937
RECIPE = "recipe: 1\nbudget:       {memory: 0.5x}   # half\nworkload:     {precision: bf16, context: 1k, batch: 1}\n"


def layer_scores(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for layer, kind in enumerate(PARENT.pattern):
        kl = float(np.exp(rng.normal({"M": -3.0, "-": -3.6}.get(kind, -2.4), 0.9))) * (8 if layer in (0, 1) else 1)
        rows.append({"layer": layer, "kind": kind, "mse": 3 * kl, "mse_stderr": 0.2 * kl, "nmse": kl / 2, "kl": kl,
                     "kl_stderr": kl / 12, "loss_delta": kl - 0.01, "cosine": kl / 9, "samples": 64})
    return rows


def width_curves() -> list[dict[str, Any]]:
    steps = {"hidden_size": (48, 64, 80, 96), "ffn_size": (128, 256, 384, 512), "mamba_num_heads": (8, 12, 16),
             "mamba_head_dim": (8, 12, 16)}
    return [{"axis": axis, "width": w, "mse": 9 * (1 - w / ws[-1]) ** 2, "kl": 4 * (1 - w / ws[-1]) ** 2,
             "loss_delta": 4 * (1 - w / ws[-1]) ** 2} for axis, ws in steps.items() for w in ws]


def candidates(rows: list[dict[str, Any]], rng: np.random.Generator, count: int, measure: int) -> list[Candidate]:
    """`count` candidates under half the memory, best first; 3 finalists, the second of which
    wins."""
    limit = cost(PARENT, LOAD).memory_bytes // 2
    found: list[tuple[float, Architecture, tuple[int, ...]]] = []
    while len(found) < count:
        drop = {kind: rng.integers(0, 4 if kind != "*" else 2) for kind in "M*-"}
        gone = {layer for kind in "M*-" for layer in
                sorted(PARENT.layers_of(kind), key=lambda i: rows[i]["kl"] * rng.uniform(0.8, 1.25))[: drop[kind]]}
        kept = tuple(i for i in range(PARENT.num_layers) if i not in gone)
        arch = PARENT.keep(kept)
        arch = Architecture.from_json(arch.to_json() | {
            "hidden_size": int(rng.choice([64, 80, 96])), "ffn_size": int(rng.choice([128, 192, 256, 320, 384])),
            "mamba_num_heads": int(rng.choice([8, 12, 16])), "mamba_head_dim": int(rng.choice([8, 12, 16]))})
        if 0.7 * limit < cost(arch, LOAD).memory_bytes <= limit:
            damage = sum(rows[i]["kl"] for i in gone) + 4 * (1 - arch.hidden_size / 96) ** 2
            found.append((damage + 2 * (1 - arch.ffn_size / 512) ** 2 + (1 - arch.mamba_inner / 256) ** 2, arch, kept))
    out = []
    found.sort(key=lambda f: f[0])
    order = [(d * float(np.exp(rng.normal(0, 0.25))) + 0.3 if i < measure else None) for i, (d, *_) in enumerate(found)]
    ranking = sorted(range(count), key=lambda i: (order[i] is None, order[i] or found[i][0]))
    for rank, i in enumerate(ranking):
        (damage, arch, kept), kl = found[i], order[i]
        after = {"loss": (2.31, 2.24, 2.37)[rank], "kl": (0.47, 0.40, 0.53)[rank]} if rank < 3 and kl else None
        out.append(Candidate(
            f"c{rank + 1:03d}", arch, kept, cost(arch, LOAD), {"layers": damage / 2, "widths": damage / 2,
                                                               "damage": damage},
            None if kl is None else {"loss": NATS_PARENT + kl, "kl": kl, "accuracy": 0.3, "agreement": float(
                np.exp(-kl))}, after, rank == 1 and after is not None))
    return out


def training_curve(start: float, end: float, tokens: int, steps: int, held_out: bool) -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    rows = []
    for step in range(1, steps + 1):
        kl = end + (start - end) * np.exp(-6 * step / steps)
        row: dict[str, Any] = {"step": step, "tokens": tokens * step // steps, "kl": kl * np.exp(rng.normal(0, 0.04)),
                               "loss": NATS_PARENT + kl, "lr": 1e-3}
        if held_out and step % (steps // 8) == 0:
            row |= {"eval_loss": NATS_PARENT + kl, "eval_kl": kl}
        rows.append(row)
    return rows


def build(count: int = 200, measure: int = 64) -> dict[str, Any]:
    """The whole report."""
    rng = np.random.default_rng(0)
    rows = layer_scores(rng)
    found = candidates(rows, rng, count, measure)
    chosen = next((c for c in found if c.chosen), found[0])
    parent_cost = cost(PARENT, LOAD)
    return {
        "schema": 1, "model": "minipuzzle-bundled", "generated": "2026-01-02T03:04:05+00:00", "seed": 0,
        "command": "minipuzzle prune --budget memory=0.5x",
        "parent": {"parameters": parent_cost.parameters, "memory_bytes": parent_cost.memory_bytes, "loss": NATS_PARENT,
                   "loss_stderr": 0.02, "architecture": PARENT.to_json(), "cost": parent_cost.to_json(),
                   "path": "minipuzzle/bundled/model"},
        "result": {"parameters": chosen.cost.parameters, "memory_bytes": chosen.cost.memory_bytes,
                   "loss_sliced": NATS_SLICED, "loss_pruned": NATS_SLICED, "loss_distilled": NATS_DISTILLED,
                   "loss_distilled_stderr": 0.021, "kl_pruned": 2.1, "kl_distilled": 0.1612,
                   "agreement_distilled": 0.842, "path": "runs/bundled/model", "candidate": chosen.name,
                   "architecture": chosen.architecture.to_json(), "cost": chosen.cost.to_json(),
                   "exported": {"step": 132, "steps": 144, "kl": 0.162, "loss": 1.99, "last_kl": 0.163,
                                "last_loss": 1.991},
                   "kept_layers": list(chosen.kept_layers), "gap_left": NATS_DISTILLED - NATS_PARENT,
                   "recovery": (NATS_SLICED - NATS_DISTILLED) / (NATS_SLICED - NATS_PARENT)},
        "paired": {"loss_minus_parent": NATS_DISTILLED - NATS_PARENT, "stderr": 0.0042,
                   "sliced": {"loss_minus_parent": NATS_SLICED - NATS_PARENT, "stderr": 0.031},
                   "pruned": {"loss_minus_parent": NATS_SLICED - NATS_PARENT, "stderr": 0.031}},
        "budget": Budget.parse({"memory": "0.5x"}, parent_cost.to_json()).to_json(),
        "workload": LOAD.to_json(),
        "evaluation": {"blocks": 64, "sequence_length": 256, "tokens": 16384, "bytes_per_token": 3.12,
                       "source": "stdlib (Python 3.11.2)"},
        "scores": {"metric": "mse", "layers": rows, "curves": width_curves()} | width_shares(
            WidthScores(rng.uniform(size=96), {
                "ffn": {i: rng.uniform(size=512) for i in PARENT.layers_of("-")},
                "mamba": {i: rng.uniform(size=(16, 16)) for i in PARENT.layers_of("M")}}), PARENT, chosen),
        "search": {"points": 15120, "feasible": 6011, "measured": measure},
        "rank_correlation": {"measured": 0.37, "controls": 0.92},
        "controls": [c.to_json() | {"name": f"r{i + 1}"} for i, c in enumerate(found[3:43:5])],
        "candidates": [c.to_json() for c in found],
        "distillation": {"tokens": 600000, "seconds": 131.5, "tokens_per_second": 4562.7,
                         "curve": training_curve(2.1, 0.16, 600000, 144, held_out=True),
                         "tournament": [{"candidate": c.name, "curve": training_curve(2.0 + i / 5, 0.4 + i / 9, 100000,
                                                                                      24, held_out=False)}
                                        for i, c in enumerate(found[:3])]},
        "stages": [{"name": n, "seconds": s} for n, s in (("tokenise", 8.1), ("scores", 21.7), ("search", 1.9),
                                                          ("evaluate", 48.3), ("tournament", 66.0),
                                                          ("distill", 131.5), ("export", 3.2))],
        "warnings": ["The held-out set has 64 blocks; differences below 0.04 nats are noise."],
        "defaults": ["workload.context: 1k", "distillation.tokens: 600k"],
        "samples": {"prompt": "def read(self, size=-1):\n", "parent": "    if size < 0:\n        return self._buf\n",
                    "pruned": "   the the return of\n", "distilled": "    if size is None:\n        return b''\n"},
        "recipe": RECIPE,
        "versions": {"minipuzzle": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "hashes": {"parent": "9f2c" * 16, "data": "01ab" * 16}, "hardware": "2 cores x86-64, no GPU",
    }
