"""CPU time of scoring and training, beside an earlier commit: the same commands, in turn.

    git worktree add /tmp/before COMMIT
    python benchmarks/cpu_time.py /tmp/before [--rounds 2]

The bundled model, float32, one thread. User seconds of the whole process, of which `start` (a command
that computes nothing) is a part; other work on the machine slows both sides alike. Writes
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

from minipuzzle.pipeline.machine import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "minipuzzle" / "bundled" / "model"
SET = {"calibration.samples": "16", "calibration.sequence_length": "256", "evaluation.samples": "4"}
TRAIN = {"calibration.samples": "2", "search.measure": "1", "search.finalists": "1",
         "distillation.tournament_tokens": "0", "distillation.tokens": "32768", "distillation.batch_tokens": "4096",
         "distillation.sequence_length": "256", "budget.memory": "0.6x", "distillation.precision": "fp32"}
CASES = {"start": ["inspect", str(MODEL)], "score": ["score", str(MODEL), "-q"],
         "prune and train": ["prune", str(MODEL), "-q"]}


def user_seconds(tree: Path, case: str, tokens: Path) -> float:
    """Of one run in a folder of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "minipuzzle", *CASES[case]]
        if case != "start":
            command += ["-o", f"{scratch}/run", "--data", str(tokens)]
            for key, value in (SET | (TRAIN if case == "prune and train" else {})).items():
                command += ["--set", f"{key}={value}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=scratch,
                       env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)})
        return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="A checkout of the earlier commit.")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    trees = {"before": args.before.resolve(), "after": ROOT}
    commits = {name: subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, check=True, capture_output=True,
                                    text=True).stdout.strip() for name, tree in trees.items()}
    found: dict[str, dict[str, list[float]]] = {case: {"before": [], "after": []} for case in CASES}
    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch)
        for path in sorted((ROOT / "minipuzzle").rglob("*.py"))[:60]:
            for i, part in enumerate(path.read_text().split("\n\n\ndef ")):
                (texts / f"{path.stem}-{i}.txt").write_text(part)
        for number in range(args.rounds):
            for case in CASES:
                for name in list(trees)[:: 1 if number % 2 == 0 else -1]:
                    found[case][name].append(user_seconds(trees[name], case, texts))
                    print(case, name, found[case][name][-1], os.getloadavg()[0], flush=True)
    least = {case: {name: min(values) for name, values in sides.items()} for case, sides in found.items()}
    out = {"what": "user CPU seconds of the whole process, the lower of the rounds, and all of them",
           "commits": commits, "date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "versions": versions(),
           "load": round(os.getloadavg()[0], 1), "settings": {"score": SET, "prune and train": SET | TRAIN},
           "user_seconds": least, "rounds": found,
           "after / before": {case: round(sides["after"] / sides["before"], 3) for case, sides in least.items()}}
    (ROOT / "benchmarks" / "results" / "cpu_time.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
