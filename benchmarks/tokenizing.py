"""Tokenising: tokens per second and peak memory, by the number of processes.

    python benchmarks/tokenizing.py      writes benchmarks/results/tokenizing.json

The text is the standard library's source several times over, the tokenizer that of the bundled
model. Each row is a fresh process. `transformers` is the call that was used before, a batch of 64
documents at a time; `threads` is the tokenizer's own, Rust's. The files must be the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

from minipuzzle.data.corpus import documents
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.verbs.source import bundled_model

OUT = Path(__file__).parent / "results" / "tokenizing.json"
ROWS = [("transformers", 1), ("transformers, threads", 1), ("ours", 1), ("ours", 2)]


def measure(how: str, workers: int, text: Path, folder: Path) -> dict[str, Any]:
    """In this process: seconds, CPU seconds of it and its children, and peak memory of both."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if "threads" in how else "false"
    from minipuzzle.data import encoding
    from minipuzzle.data.tokenizer import load_tokenizer
    from minipuzzle.data.writer import tokenize

    tokenizer, peaks = load_tokenizer(bundled_model()), dict[int, int]()
    if "transformers" in how:
        encoding._settings = lambda tokenizer: None
    start = encoding._start
    encoding._start = lambda settings: watch(start(settings), peaks)
    before, begin = _high_water("self"), time.perf_counter()
    cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    tokenize(str(text), tokenizer, folder, "benchmark", workers=workers)
    seconds = time.perf_counter() - begin
    cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) - cpu
    tokens = sum(json.loads((folder / "tokens.json").read_text())["tokens"].values())
    return {"how": how, "processes": workers, "tokens": tokens, "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1), "tokens_per_second": round(tokens / seconds),
            "tokens_per_cpu_second": round(tokens / cpu), "more_memory_MiB": _high_water("self") - before,
            "memory_of_each_worker_MiB": max(peaks.values(), default=None),
            "sha256": hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()[:16]}


def watch(child: subprocess.Popen[bytes], peaks: dict[int, int]) -> subprocess.Popen[bytes]:
    def look() -> None:
        while child.poll() is None:
            peaks[child.pid] = max(peaks.get(child.pid, 0), _high_water(str(child.pid), "VmRSS"))
            time.sleep(0.1)

    threading.Thread(target=look, daemon=True).start()
    return child


def _high_water(pid: str, what: str = "VmHWM") -> int:
    """MiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith(what)), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=2, help="The text is the standard library so many times.")
    parser.add_argument("--row", nargs=4)
    args = parser.parse_args()
    if args.row:
        how, workers, text, folder = args.row
        print(json.dumps(measure(how, int(workers), Path(text), Path(folder))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text.jsonl"
        with text.open("w") as file:
            for _ in range(args.times):
                file.writelines(json.dumps({"text": content}) + "\n" for _, content in documents("stdlib"))
        for i, (how, workers) in enumerate(ROWS):
            done = subprocess.run([sys.executable, __file__, "--row", how, str(workers), str(text), f"{work}/{i}"],
                                  check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout) | {"load": round(os.getloadavg()[0], 1)})
            print(rows[-1], flush=True)
        size = text.stat().st_size
    assert len({row["sha256"] for row in rows}) == 1
    about = {"date": str(date.today()), "hardware": hardware(), "versions": versions(), "text_bytes": size,
             "note": "other work was on the machine (load); CPU seconds tell more than seconds"}
    OUT.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
