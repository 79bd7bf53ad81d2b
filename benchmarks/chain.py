"""Two steps against one: first layers go, then widths by fresh scores, and the original teaches both.

The bundled model at half its parameters, one seed, 200k tokens in all each way (100k for each step;
one finalist, so that no tournament takes some), 16 calibration samples and 16 candidates measured in every
search. About half the logarithm of the cut is the first step's.

    python benchmarks/chain.py --work runs/chain       goes on where it stopped
-> benchmarks/results/chain.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from minipuzzle import Recipe, prune
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.verbs.evaluate import evaluate
from minipuzzle.verbs.run import Run
from minipuzzle.verbs.source import bundled_model

TOKENS, PART, FIRST = 200_000, 0.5, 0.71
DEPTH = {f"space.{axis}": None for axis in ("hidden_size", "ffn_size", "mamba_num_heads", "mamba_head_dim")}
WIDTH = {f"space.drop_{kind}": 0 for kind in ("mamba", "ffn", "attention")}


def recipe(params: str, tokens: int, **settings: Any) -> Recipe:
    return Recipe.load("default", budget={"params": params}, settings={
        "distillation.tokens": tokens, "search.finalists": 1, "calibration.samples": 16, "search.measure": 16,
        **settings})


def row(name: str, run: Run, seconds: float) -> dict[str, Any]:
    result, found = run.report["result"], evaluate(run.model_path, bundled_model(), Recipe.load("default"))
    paired = found["paired"]
    return {"way": name, "parameters": result["parameters"], "tokens": run.report["distillation"]["tokens"],
            "loss": found["loss"], "kl_to_original": found["kl"], "kl_stderr": found["kl_stderr"],
            "loss_minus_original": paired["loss_minus_parent"], "loss_minus_original_stderr": paired["stderr"],
            "pattern": result["architecture"]["pattern"], "hidden_size": result["architecture"]["hidden_size"],
            "ffn_size": result["architecture"]["ffn_size"], "stages_seconds": round(seconds, 1)}


def main() -> None:
    work = argparse.ArgumentParser()
    work.add_argument("--work", type=Path, default=Path("runs/chain"))
    folder = work.parse_args().work
    parent, rows = bundled_model(), []

    def step(name: str, model: Path, asked: Recipe, teacher: Path | None = None, scores: Path | None = None) -> Run:
        run = prune(model, asked, folder / name, teacher=teacher, scores=scores)
        rows.append(row(name, run, sum(stage["seconds"] for stage in run.report["stages"])))
        write(rows)
        return run

    one = step("one-step", parent, recipe(f"{PART}x", TOKENS))
    depth = step("depth", parent, recipe(f"{FIRST}x", TOKENS // 2, **DEPTH), scores=one.path)
    limit = str(int(PART * one.report["parent"]["parameters"]))
    step("depth-width", depth.model_path, recipe(limit, TOKENS // 2, **WIDTH), parent)


def write(rows: list[dict[str, Any]]) -> None:
    about = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "versions": versions(), "seed": 0, "rows": rows}
    path = Path(__file__).parent / "results" / "chain.json"
    path.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
