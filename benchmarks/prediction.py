"""How well is the damage of whole candidates foretold?

    python benchmarks/prediction.py RUN [RUN ...]

RUN holds the scores of a model (`minipuzzle prune`, also with distillation.tokens: 0). For each way
to predict: Spearman's rank correlation with the measured KL over random candidates within the
budget (a seed of their own), among its own best 48, and over the best of all ways together; and the
best KL among its 48. On the blocks that select. Writes benchmarks/results/prediction.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from minipuzzle.core.rundir import read_about
from minipuzzle.core.scores import LayerScores, WidthCurves, WidthScores
from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.held_out import two_parts
from minipuzzle.evaluate.quality import measure_variants
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.pipeline.plan import budget_of
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.grid import random_architectures, search_architectures
from minipuzzle.search.space import resolve_space
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.rotate import Rotation

ROOT = Path(__file__).resolve().parent.parent
BEST, RANDOM = 48, 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    rows = [row for run in args.runs for row in judge(run, args.blocks, args.seed)]
    print(json.dumps(rows, indent=1))
    (ROOT / "benchmarks" / "results" / "prediction.json").write_text(json.dumps(
        {"date": datetime.date.today().isoformat(), "hardware": hardware(), "versions": versions(),
         "blocks": args.blocks, "seed": args.seed, "rows": rows}, indent=1) + "\n")


def judge(run: Path, blocks: int, seed: int) -> list[dict[str, Any]]:
    about = read_about(run)
    recipe, folder = Recipe.from_json(about["recipe"], str(run)), open_model(Path(about["model"]))
    arch, scores = folder.arch, LayerScores.read(run / "scores")
    curves = WidthCurves.read(run / "scores" / "width_curves.csv")
    alone = dataclasses.replace(curves, together=None)
    space, workload = resolve_space(recipe.space.model_dump(), arch), recipe.workload.build()
    budget, metric = budget_of(recipe, arch), recipe.scores.layer_metric
    ways = {"additive": (alone, "additive"), "quadratic": (alone, "quadratic"), "together": (curves, "auto")}
    every = {way: {_key(c): c for c in search_architectures(
        arch, space, budget, workload, scores, known, metric, 10**6, damage).candidates}
        for way, (known, damage) in ways.items()}
    drawn = random_architectures(arch, space, budget, workload, scores, curves, metric, "auto", RANDOM, seed)
    best = {way: list(found)[:BEST] for way, found in every.items()}
    wanted = {_key(c): c for c in drawn} | {k: every[way][k] for way in ways for k in best[way]}
    kl = _measure(run, recipe, folder, list(wanted.values()), blocks)
    union = list(dict.fromkeys(k for way in ways for k in best[way]))
    out = []
    for way, found in every.items():
        def agree(keys: list[Any], found: dict[Any, Candidate] = found) -> float:
            return round(float(spearmanr([found[k].predicted["damage"] for k in keys],
                                         [kl[k] for k in keys]).statistic), 3)

        out.append({"model": folder.path.name, "prediction": way, "feasible": len(found),
                    "random": agree([_key(c) for c in drawn]), "own_best": agree(best[way]),
                    "best_of_all": agree(union), "best_kl": round(min(kl[k] for k in best[way]), 4),
                    "mean_kl": round(float(np.mean([kl[k] for k in best[way]])), 4)})
    return out


def _key(c: Candidate) -> tuple[Any, ...]:
    return c.kept_layers, c.architecture


def _measure(run: Path, recipe: Recipe, folder: Any, candidates: list[Candidate],
             blocks: int) -> dict[tuple[Any, ...], float]:
    """KL by candidate."""
    tokens = next(p for p in (run / "tokens").iterdir() if (p / "held_out.bin").is_file())
    held_out = load_blocks(tokens, "held_out", recipe.calibration.sequence_length)
    ids = torch.from_numpy(two_parts(held_out, blocks)[0])
    source, arch = Model.load(folder), folder.arch
    rotation = run / "scores" / "rotation.safetensors"
    cutter = Cutter(source, WidthScores.read(run / "scores" / "widths.safetensors"),
                    Rotation.read(rotation) if rotation.is_file() else None,
                    folder.dtypes(tuple(range(arch.num_layers))))
    full = cutter.variant(arch, tuple(range(arch.num_layers)))
    variants = [cutter.variant(c.architecture, c.kept_layers) for c in candidates]
    found = measure_variants(cutter, full, variants, Pass(source, ids))
    return {_key(c): quality["kl"] for c, quality in zip(candidates, found, strict=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
