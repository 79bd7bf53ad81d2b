"""Time and result of the main job, `minipuzzle prune` with no argument, for several seeds.

    python benchmarks/main_job.py [--seeds 0 1 2]

Writes benchmarks/results/main_job.json. The README's picture is of such a run:
benchmarks/screenshot.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minipuzzle.pipeline.machine import hardware, versions

ROOT = Path(__file__).resolve().parent.parent


def one(seed: int, folder: Path) -> dict:
    begin = time.perf_counter()
    command = [sys.executable, "-m", "minipuzzle.cli", "prune", "--seed", str(seed), "-o", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    result = report["result"]
    row = {"seed": seed, "seconds": round(seconds, 1), "parent_loss": report["parent"]["loss"],
           "parent_memory_bytes": report["parent"]["memory_bytes"], "parent_parameters": report["parent"]["parameters"]}
    keys = ("parameters", "memory_bytes", "loss_sliced", "loss_pruned", "loss_distilled", "kl_pruned", "kl_distilled",
            "recovery", "gap_left", "candidate", "reload_difference")
    return row | {k: result[k] for k in keys} | {
        "pattern": result["architecture"]["pattern"], "rank_correlation": report["rank_correlation"],
        "points": report["search"]["points"], "feasible": report["search"]["feasible"],
        "tokens": report["distillation"]["tokens"], "stages": {s["name"]: s["seconds"] for s in report["stages"]},
        "report": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [one(seed, Path(scratch) / str(seed)) for seed in args.seeds]
    corpus = rows[0]["report"]["hashes"]["corpus"]
    for row in rows:
        del row["report"]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    out = {"what": "minipuzzle prune (bundled model, default recipe)", "date": time.strftime("%Y-%m-%d"),
           "hardware": hardware(), "versions": versions(), "corpus_hash": corpus, "peak_rss_bytes": memory,
           "runs": rows}
    path = ROOT / "benchmarks" / "results" / "main_job.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
