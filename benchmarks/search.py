"""Seconds and peak memory of the search.  python benchmarks/search.py  ->
benchmarks/results/search.json

Each case runs in a process of its own. The loop is what a search without arrays does:
itertools.product over the same points, each priced by costs/cost.py and compared with the
budget; on the 8B it stops after some points, and the rest is extrapolated. Where the loop is
complete it must find what the grid finds.
"""

import dataclasses
import heapq
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from minipuzzle.core.budget import Budget
from minipuzzle.core.published import published
from minipuzzle.core.scores import LayerScores
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.damage import drop_order
from minipuzzle.search.grid import search_architectures
from minipuzzle.search.space import resolve_space

DATA = Path(__file__).parent.parent / "tests" / "data"
RESULT = Path(__file__).parent / "results" / "search.json"
LOOP_POINTS = 100_000
WIDE = {"drop_mamba": [0, 20], "drop_ffn": [0, 20], "drop_attention": [0, 9]}
# case: what runs, recipe, parent, scores, changes of the space
CASES = {
    "56b_grid_of_the_recipe": ("grid", "nemotron-h-47b", "nemotron-h-56b", "nemotron_h_56b_fig9_layer_mse.csv", {}),
    "56b_grid": ("grid", "nemotron-h-47b", "nemotron-h-56b", "nemotron_h_56b_fig9_layer_mse.csv", WIDE),
    "56b_loop": ("loop", "nemotron-h-47b", "nemotron-h-56b", "nemotron_h_56b_fig9_layer_mse.csv", WIDE),
    "8b_grid": ("grid", "nemotron-h-4b", "nemotron-h-8b", "nemotron_h_8b_fig4_layer_kld.csv", {}),
    "8b_loop": ("loop", "nemotron-h-4b", "nemotron-h-8b", "nemotron_h_8b_fig4_layer_kld.csv", {}),
}


def ask(recipe_name, parent_name, scores_name, changes):
    """(parent, space, budget, workload, scores, metric)"""
    recipe = Recipe.load(recipe_name)
    parent = Architecture.from_config(published(parent_name))
    workload = recipe.workload.build()
    space = resolve_space(recipe.space.model_dump() | changes, parent)
    budget = Budget.parse(recipe.budget, cost(parent, workload).to_json())
    return parent, space, budget, workload, LayerScores.read(DATA / scores_name), recipe.scores.layer_metric


def loop(parent, space, budget, workload, scores, metric):
    """The plain loop, best 10000 kept: (points, seen, feasible, least damage)."""
    values = scores.metric(metric)
    drops_3 = list(space.drops.values())
    sums = [[float(values[drop_order(parent, kind, values)[:n]].sum()) for n in drops]
            for kind, drops in zip("M-*", drops_3, strict=True)]
    kept, seen, feasible = [], 0, 0
    for point in itertools.product(*(range(len(drops)) for drops in drops_3), *space.widths.values()):
        if seen == LOOP_POINTS:
            break
        seen += 1
        counts = [parent.pattern.count(kind) - drops[i]
                  for kind, drops, i in zip("M-*", drops_3, point[:3], strict=True)]
        arch = dataclasses.replace(parent, pattern="".join(k * n for k, n in zip("M-*", counts, strict=True)),
                                   **dict(zip(space.widths, point[3:], strict=True)))
        priced = cost(arch, workload)
        if budget.exceeded(priced.to_json()):
            continue
        feasible += 1
        damage = sum(sums[kind][i] for kind, i in enumerate(point[:3]))
        kept.append((damage, -priced.parameters, seen))
    best = heapq.nsmallest(10_000, kept)
    return space.num_points, seen, feasible, best[0][0] if best else None


def run_case(name):
    """One case, in this process."""
    kind, *what = CASES[name]
    parent, space, budget, workload, scores, metric = ask(*what)
    begin = time.perf_counter()
    if kind == "grid":
        found = search_architectures(parent, space, budget, workload, scores, None, metric)
        out = {"points": found.points, "feasible": found.feasible,
               "least_damage": found.candidates[0].predicted["damage"], "candidates": len(found.candidates)}
    else:
        points, seen, feasible, least = loop(parent, space, budget, workload, scores, metric)
        out = {"points": points, "seen": seen, "feasible": feasible, "least_damage": least}
    out["seconds"] = time.perf_counter() - begin
    if kind == "loop" and out["seen"] < out["points"]:
        out["seconds_extrapolated"] = out["seconds"] * out["points"] / out["seen"]
    return out


def measure(name):
    """One case in a process of its own, with its peak memory."""
    done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main():
    cases = {}
    for name in ["imports", *CASES]:
        cases[name] = measure(name)
        print(name, json.dumps(cases[name]), flush=True)
    assert cases["56b_loop"]["feasible"] == cases["56b_grid"]["feasible"]
    assert abs(cases["56b_loop"]["least_damage"] - cases["56b_grid"]["least_damage"]) < 1e-12
    speedup = {size: (cases[f"{size}_loop"].get("seconds_extrapolated") or cases[f"{size}_loop"]["seconds"])
               / cases[f"{size}_grid"]["seconds"] for size in ("56b", "8b")}
    from minipuzzle.pipeline.machine import hardware, versions  # torch; a child begins with the peak of its parent

    result = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "versions": versions(),
              "note": "one process at a time; other work may have shared the machine: see load_average",
              "load_average": os.getloadavg(), "cases": cases, "loop_over_grid": speedup}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        case = {} if sys.argv[1] == "imports" else run_case(sys.argv[1])
        scale = 2**20 if platform.system() == "Darwin" else 2**10
        case["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
        print(json.dumps(case))
    else:
        main()
