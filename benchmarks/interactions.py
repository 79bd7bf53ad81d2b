"""How well is the damage of a set of layers foretold, and does the order in which they go matter?

    python benchmarks/interactions.py [--sets 100]

Random sets of 2 to 12 layers of the bundled model, out of its 14 and 20 least important: Spearman's
rank correlation of what is foretold from single ablations with the measured KL. Then the sets that
a search takes for some numbers of
layers: the lowest-scored (one-shot) against those that iterative scoring removes. Writes
benchmarks/results/interactions.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from minipuzzle.core.scores import LayerScores
from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.writer import tokenize
from minipuzzle.evaluate.quality import measure_variants
from minipuzzle.importance.layers import score_iteratively
from minipuzzle.importance.racing import Race
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Model, Whole
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.search.damage import drop_order
from minipuzzle.verbs.source import bundled_model

ROOT = Path(__file__).resolve().parent.parent
COUNTS = ((2, 2, 0), (3, 3, 0), (4, 4, 0), (4, 6, 0), (5, 5, 1), (3, 8, 1), (6, 4, 1), (5, 8, 1), (6, 8, 1))


def foretold(scores: LayerScores, layers: list[int]) -> dict[str, float]:
    """What each way says about a set."""
    inside = np.ix_(layers, layers)
    mse, kl = (scores.metric(name)[layers].sum() for name in ("mse", "kl"))
    g, k = (scores.interactions[name] for name in ("mse", "kl"))
    rho = (k / np.sqrt(np.outer(np.diag(k), np.diag(k))))[inside]
    root = np.sqrt(scores.metric("kl")[layers])
    return {"sum of mse": mse, "sum of kl": kl, "quadratic, mse": g[inside].sum(), "quadratic, logits": k[inside].sum(),
            "kl and its interactions": kl + k[inside].sum() - np.diag(k)[layers].sum(),
            "kl and its correlations": root @ rho @ root}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    tokens = ROOT / "runs" / "tokens"
    tokenize("stdlib", AutoTokenizer.from_pretrained(bundled_model(), model_max_length=2**62), tokens, "bundled")
    folder = open_model(bundled_model())
    model, arch = Model.load(folder), folder.arch
    ids = torch.from_numpy(load_blocks(tokens, "train", 256).first(args.samples))
    held_out = Pass(model, torch.from_numpy(load_blocks(tokens, "held_out", 256).first(12)))
    most = {kind: max(c[i] for c in COUNTS) for i, kind in enumerate("M-*")}
    scored = score_iteratively(Pass(model, ids), Race({kind: (0, n) for kind, n in most.items()}, metric="kl"))
    scores, whole, rng = scored.layers, Whole(model), np.random.default_rng(0)
    values = scores.metric("kl")

    def measure(sets: list[list[int]]) -> list[dict[str, float]]:
        return measure_variants(whole, whole.variant(), [whole.variant(set(s)) for s in sets], held_out)

    rows: list[dict[str, Any]] = []
    for pool in (14, 20):
        least = np.argsort(values)[:pool]
        for size in (2, 4, 6, 8, 10, 12):
            sets = [sorted(int(i) for i in rng.choice(least, size, replace=False)) for _ in range(args.sets)]
            measured = [m["kl"] for m in measure(sets)]
            told = [foretold(scores, s) for s in sets]
            rows.append({"out of": pool, "layers": size, "sets": len(sets), "kl": [min(measured), max(measured)]} | {
                name: round(float(spearmanr([t[name] for t in told], measured).statistic), 3) for name in told[0]})
            print(rows[-1], flush=True)
    order = scores.table["order"].to_numpy(float)
    sets = []
    for places in (None, order):
        orders = [drop_order(arch, kind, values, places) for kind in "M-*"]
        sets += [[i for o, n in zip(orders, counts, strict=True) for i in o[:n]] for counts in COUNTS]
    measured = [m["kl"] for m in measure(sets)]
    chosen = [{"mamba, ffn, attention": list(c), "one-shot": round(a, 3), "iterative": round(b, 3)}
              for c, a, b in zip(COUNTS, measured, measured[len(COUNTS):], strict=False)]
    print(*chosen, sep="\n", flush=True)
    out = {"what": "KL of sets of layers, foretold and measured", "date": time.strftime("%Y-%m-%d"),
           "hardware": hardware(), "threads": torch.get_num_threads(), "versions": versions(),
           "calibration samples": args.samples, "held-out samples": 12, "rank correlation": rows, "chosen sets": chosen,
           "iterative layer-forwards over one-shot": scored.forwards / (args.samples * 253)}
    path = ROOT / "benchmarks" / "results" / "interactions.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
