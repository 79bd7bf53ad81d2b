"""CPU time of scoring and training, beside an earlier commit: the same calls on the same numbers, in turn.

    git worktree add /tmp/before COMMIT
    python benchmarks/cpu_time.py /tmp/before [--rounds 3]

The bundled model, float32, one thread: `score` of all layers and widths, and 8 steps of `distill_model` of a
copy whose weights are 1 % smaller, its state written at the end. User seconds of the call alone, which other
work on the machine lengthens too: so each side has several turns, and the least counts. Writes
benchmarks/results/cpu_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES = ("score", "train")
SAMPLES, LENGTH, STEPS, BATCH = 8, 256, 8, 4096


def child(case: str) -> None:
    """Runs in either tree: what it imports is as old as the older one."""
    import numpy as np
    import torch

    from minipuzzle.data.blocks import TokenBlocks
    from minipuzzle.distill.loop import distill_model
    from minipuzzle.distill.settings import TrainSettings
    from minipuzzle.importance.layers import score
    from minipuzzle.models.module import HybridLM
    from minipuzzle.models.passes import Pass
    from minipuzzle.models.walk import Model
    from minipuzzle.models.weights import open_model

    torch.set_num_threads(1)
    model = Model.load(open_model(ROOT / "minipuzzle" / "bundled" / "model"))
    ids = torch.randint(0, model.arch.vocab_size, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        if case == "score":
            def work() -> Any:
                return score(Pass(model, ids[:SAMPLES])).layers.table["kl"].sum()
        else:
            pupil = HybridLM(model.family, model.arch, model.by_name())
            with torch.no_grad():
                for p in pupil.parameters():
                    p.mul_(0.99)
            blocks = TokenBlocks(ids.flatten().numpy().astype(np.uint16), LENGTH, "random", "", 2 * ids.numel())

            def work() -> Any:
                distill_model(pupil, model, blocks, TrainSettings(STEPS * BATCH, BATCH, 1e-4), Path(scratch))
                return json.loads((Path(scratch) / "metrics.jsonl").read_text().splitlines()[-1])["kl"]
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        value = float(work())
        print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_utime - begin, value]))


def measured(tree: Path, case: str) -> tuple[float, float]:
    """(user seconds, a number that says whether both computed the same)"""
    done = subprocess.run([sys.executable, __file__, "--child", case], check=True, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)})
    seconds, value = json.loads(done.stdout.splitlines()[-1])
    return round(seconds, 2), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="A checkout of the earlier commit.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    from minipuzzle.pipeline.machine import hardware, versions

    trees = {"before": args.before.resolve(), "after": ROOT}
    commits = {name: subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, check=True, capture_output=True,
                                    text=True).stdout.strip() for name, tree in trees.items()}
    rounds: dict[str, dict[str, list[float]]] = {case: {name: [] for name in trees} for case in CASES}
    values: dict[str, dict[str, float]] = {case: {} for case in CASES}
    for number in range(args.rounds):
        for case in CASES:
            for name in list(trees)[:: 1 if number % 2 == 0 else -1]:
                seconds, values[case][name] = measured(trees[name], case)
                rounds[case][name].append(seconds)
                print(case, name, seconds, os.getloadavg()[0], flush=True)
    least = {case: {name: min(found) for name, found in sides.items()} for case, sides in rounds.items()}
    out = {"what": "user CPU seconds of scoring and of training, the least of some rounds", "commits": commits,
           "date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "versions": versions(),
           "load": round(os.getloadavg()[0], 1), "samples": SAMPLES, "sequence_length": LENGTH, "steps": STEPS,
           "batch_tokens": BATCH, "user_seconds": least, "rounds": rounds, "sum of KL, last KL": values,
           "after / before": {case: round(sides["after"] / sides["before"], 3) for case, sides in least.items()}}
    (ROOT / "benchmarks" / "results" / "cpu_time.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
