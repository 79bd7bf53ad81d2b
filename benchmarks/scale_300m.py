"""Peak memory of each process that scores, measures and trains a parent of 300M parameters, on 1, 2
and 4 processes (gloo, CPU), beside what is foretold.

    python benchmarks/scale_300m.py [--folder DIR] [--parameters 150]

Random bf16 weights whose SSM is loud, computed with in float32. Every case is a run of its own; anonymous
memory (RssAnon: what the file cache does not give back) is sampled 50 times a second, above what a
process holds before the parent is opened. Training is two steps and the state of the last, which is
written from a copy. A row is kept as soon as it is measured, and not measured again: delete
benchmarks/results/scale_300m.json to begin anew.

    score     the parent in memory and its streams              4 P + streams
    streamed  the same from the disk                            three layers + streams
    measure   three candidates, cut from the disk               three layers + streams
    train     distill/memory.py: the state's copy, 12 S / N, is part of it
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

import numpy as np
import torch

from minipuzzle.core.published import find_config
from minipuzzle.core.scores import WidthScores
from minipuzzle.costs.cost import layer_parameters
from minipuzzle.data.blocks import TokenBlocks
from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.memory import forecast
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.sharding import read_sharded
from minipuzzle.distill.teacher import LiveTeacher
from minipuzzle.evaluate.quality import measure_variants
from minipuzzle.families.architecture import Architecture
from minipuzzle.importance.layers import score
from minipuzzle.models.module import HybridLM
from minipuzzle.models.passes import Pass
from minipuzzle.models.ranks import end_process, open_ranks
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model, Source
from minipuzzle.models.weights import ModelFolder, open_model, write_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.surgery.cut import Cutter

RESULT = Path(__file__).parent / "results" / "scale_300m.json"
CASES, PROCESSES = ("score", "streamed", "measure", "train"), (1, 2, 4)
SAMPLES, LENGTH = 4, 64
STREAMS = 2**26
EIGHT = dict(find_config("nemotron-h-8b"))


def parent(millions: int) -> Architecture:
    """Nemotron-H 8B's shapes, smaller: 300M or 150M parameters."""
    half = "M-M-M-M*-M-M-M-M-" if millions > 200 else "M-M-M*-M"
    return dataclasses.replace(
        Architecture.from_config(EIGHT), pattern=2 * half, vocab_size=16384, hidden_size=1024, ffn_size=4096,
        mamba_num_heads=32, num_attention_heads=16)


def student(arch: Architecture) -> Architecture:
    """About half of it."""
    return dataclasses.replace(arch, hidden_size=768, ffn_size=2560, mamba_num_heads=24)


def parameters(arch: Architecture) -> int:
    return sum(int(np.prod(shape)) for shape in arch.shapes().values())


def write(folder: Path, arch: Architecture) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, shape in arch.shapes().items():
            value = torch.randn(shape, generator=generator) * (1.5 * shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
            if name.endswith(("norm.weight", "norm_f.weight", "A_log", ".D")):
                value = value.exp()
            yield name, value.bfloat16()

    write_model(folder, arch.to_config(EIGHT), tensors(), shard_bytes=2 * 10**8)


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def run_case(case: str, big: ModelFolder, small: ModelFolder, scratch: Path) -> dict[str, int]:
    """Bytes that it took of this process, and what was foretold."""
    ranks = open_ranks(torch.device("cpu"))
    ids = torch.randint(0, big.arch.vocab_size, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    layers = 12 * max(layer_parameters(big.arch, i) for i in range(big.arch.num_layers))
    base, peak, stop = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    if case == "train":
        settings = TrainSettings(2 * ids.numel(), ids.numel(), 1e-3, activation_checkpointing=True)
        blocks = TokenBlocks(ids.flatten().numpy().astype(np.uint16).repeat(2), LENGTH, "random", "", 2 * ids.numel())
        if ranks.size > 1:
            teacher: Model | LiveTeacher = LiveTeacher(read_sharded(big, ranks), 0)
            pupil = read_sharded(small, ranks, torch.float32)
        else:
            teacher, pupil = Model.load(big), HybridLM(small.family, small.arch, small.weights(torch.float32))
        distill_model(pupil, teacher, blocks, settings, scratch / f"train-{ranks.size}", ranks=ranks)
        foretold = forecast(big.arch, small.arch, settings, ranks, ids.numel() // ranks.size)
    elif case == "measure":
        cutter = Cutter(StreamedModel.open(big, ranks.device), WidthScores.read(scratch / "widths.safetensors"))
        every = tuple(range(big.arch.num_layers))
        cuts = [cutter.variant(dataclasses.replace(small.arch, ffn_size=n), every) for n in (1536, 2048, 2560)]
        measure_variants(cutter, cutter.variant(big.arch, every), cuts, Pass(cutter.source, ids, ranks=ranks,
                                                                            memory_bytes=STREAMS))
        foretold = layers + STREAMS
    else:
        source: Source = Model.load(big) if case == "score" else StreamedModel.open(big, ranks.device)
        score(Pass(source, ids, ranks=ranks, memory_bytes=STREAMS))
        foretold = STREAMS + (4 * parameters(big.arch) if case == "score" else layers)
    stop.set()
    watcher.join()
    return {"peak_bytes": peak - base, "forecast_bytes": foretold}


def child(case: str, scratch: Path) -> None:
    torch.set_num_threads(1)
    found = run_case(case, *(open_model(scratch / name) for name in ("big", "small")), scratch)
    rank = int(os.environ.get("RANK", 0))
    (scratch / f"row-{rank}.json").write_text(json.dumps(found))
    end_process(0)


def prepare(scratch: Path, arch: Architecture) -> None:
    if (scratch / "widths.safetensors").is_file():
        return
    for name, made in (("big", arch), ("small", student(arch))):
        write(scratch / name, made)
    ids = torch.zeros((1, 64), dtype=torch.long)
    score(Pass(StreamedModel.open(open_model(scratch / "big"), torch.device("cpu")), ids, memory_bytes=STREAMS)
          ).widths.write(scratch / "widths.safetensors")


def measured(case: str, processes: int, scratch: Path) -> dict[str, Any]:
    """A row: the process that took most."""
    for old in scratch.glob("row-*.json"):
        old.unlink()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    begin = time.perf_counter()
    subprocess.run([*start, __file__, "--child", case, str(scratch)], check=True, stdout=sys.stderr,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(path.read_text()) for path in scratch.glob("row-*.json")]
    assert len(rows) == processes
    row = max(rows, key=lambda found: found["peak_bytes"])
    return {"case": case, "processes": processes, **row,
            "of_forecast": round(row["peak_bytes"] / row["forecast_bytes"], 3),
            "all_processes_bytes": sum(found["peak_bytes"] for found in rows),
            "seconds": round(time.perf_counter() - begin, 1), "load": round(os.getloadavg()[0], 1),
            "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where the models lie; made if they do not.")
    parser.add_argument("--parameters", type=int, choices=(300, 150), default=300, help="Millions of the parent.")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]))
    arch = parent(args.parameters)
    about = {"what": "peak anonymous memory of each process beside the forecast; two or more are gloo on one machine",
             "parent": str(arch), "parent_parameters": parameters(arch),
             "student_parameters": parameters(student(arch)),
             "samples": SAMPLES, "sequence_length": LENGTH, "streams_bytes": STREAMS, "hardware": hardware(),
             "versions": versions()}
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    rows = known["rows"] if known.get("parent") == about["parent"] else []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.folder or Path(temporary)
        scratch.mkdir(exist_ok=True, parents=True)
        for case in CASES:
            for processes in PROCESSES:
                if any((row["case"], row["processes"]) == (case, processes) for row in rows):
                    continue
                prepare(scratch, arch)
                rows.append(measured(case, processes, scratch))
                print(rows[-1], flush=True)
                RESULT.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
