"""How long `minipuzzle --help`, the help of every verb and `import minipuzzle` take, each in a
fresh process.

    python benchmarks/startup.py [--repeats 15]

Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from minipuzzle.cli import main as command
from minipuzzle.pipeline.machine import hardware, versions

ROOT = Path(__file__).resolve().parent.parent


def seconds(arguments: list[str], repeats: int) -> dict[str, float]:
    """Median, least and most over `repeats`, after one that warms the file cache."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - begin)
    return {"median": round(statistics.median(taken[1:]), 3), "least": round(min(taken[1:]), 3),
            "most": round(max(taken[1:]), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    tool = [sys.executable, "-m", "minipuzzle.cli"]
    rows = {"minipuzzle --help": seconds([*tool, "--help"], repeats)}
    rows |= {f"minipuzzle {verb} --help": seconds([*tool, verb, "--help"], repeats) for verb in command.commands}
    rows["import minipuzzle"] = seconds([sys.executable, "-c", "import minipuzzle"], repeats)
    rows["python -c pass"] = seconds([sys.executable, "-c", "pass"], repeats)
    out = {"what": "wall seconds of a fresh process", "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
           "load_average": os.getloadavg()[0], "versions": versions(), "repeats": repeats, "seconds": rows}
    path = ROOT / "benchmarks" / "results" / "startup.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
