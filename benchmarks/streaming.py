"""Scoring a checkpoint of more than 4 GB: memory of the streamed pass against the parent in memory.

    python benchmarks/streaming.py [--folder DIR]

Random bf16 weights in the shapes of Nemotron-H 8B with fewer layers. Each side is a process of its
own; anonymous memory (RssAnon: what the file cache does not give back) is sampled 50 times a
second, above what the imports take.
Bound: three times the largest block in float32, plus the streams. Writes
benchmarks/results/streaming.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.published import find_config
from minipuzzle.costs.cost import layer_parameters
from minipuzzle.families.architecture import Architecture
from minipuzzle.importance.layers import score
from minipuzzle.models.passes import Pass
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.pipeline.machine import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
SAMPLES, TOKENS = 2, 64


def shapes() -> Architecture:
    eight = Architecture.from_config(find_config("nemotron-h-8b"))
    return dataclasses.replace(eight, pattern="M-M*-M-M-")


def make(folder: Path) -> None:
    """The checkpoint, shard by shard."""
    arch = shapes()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, shape in arch.shapes().items():
            value = torch.randn(shape, generator=generator, dtype=torch.float32)
            value *= shape[-1] ** -0.5 if len(shape) > 1 else 0.1
            if name.endswith(("norm.weight", "norm_f.weight", "A_log", ".D")):
                value = value.exp()
            yield name, value.bfloat16()

    write_model(folder, arch.to_config(dict(find_config("nemotron-h-8b"))), tensors(), shard_bytes=2 * 10**9)


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def child(folder: Path, how: str) -> None:
    """Score, and print what it took."""
    base, peak, stop = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    opened = open_model(folder)
    source = Model.load(opened) if how == "resident" else StreamedModel.open(opened, torch.device("cpu"))
    ids = torch.randint(0, 131072, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    table = score(Pass(source, ids, memory_bytes=2**28)).layers.table
    seconds = time.perf_counter() - begin
    stop.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "peak_anonymous_bytes": peak - base, "kl": table["kl"].tolist()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(Path(args.child[0]), args.child[1])
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "model"
        if not folder.is_dir():
            make(folder)
        found: dict[str, Any] = {}
        for how in ("streamed", "resident"):
            done = subprocess.run([sys.executable, __file__, "--child", str(folder), how], check=True,
                                  capture_output=True, text=True)
            found[how] = json.loads(done.stdout.splitlines()[-1])
            print(how, found[how], flush=True)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    arch = shapes()
    assert found["streamed"]["kl"] == found["resident"]["kl"], "the same numbers, bit for bit"
    largest = 4 * max(layer_parameters(arch, i) for i in range(arch.num_layers))
    streams = 4 * SAMPLES * TOKENS * arch.hidden_size * (2 * arch.num_layers + 4)
    out = {"what": "scoring a checkpoint streamed from disk, against the parent in memory", "versions": versions(),
           "date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "threads": torch.get_num_threads(),
           "load": os.getloadavg()[0], "checkpoint_bytes": size, "pattern": arch.pattern, "samples": SAMPLES,
           "tokens": TOKENS, "largest_block_float32_bytes": largest, "streams_bytes": streams,
           "bound_bytes": 3 * largest + streams, **found,
           "in bound": found["streamed"]["peak_anonymous_bytes"] < 3 * largest + streams}
    path = ROOT / "benchmarks" / "results" / "streaming.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(path, out["in bound"], f"{found['streamed']['peak_anonymous_bytes'] / largest:.2f} blocks")


if __name__ == "__main__":
    main()
