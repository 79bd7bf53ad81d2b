"""Use each extra that installs without CUDA once; `make test-extras` runs this in an environment of
its own.

    eval        lm-eval on a task file that needs no network (tests/data/lm_eval): evaluate, and prune by it
    track       a short distillation that tensorboard and wandb (offline) write down, read again
    quantize    modelopt takes the bundled model to FP8 (simulated on a CPU) and its loss hardly moves
    docs        pdoc writes pages

cuda and fp8 need a CUDA build of torch at install time: they are not here.
-> benchmarks/results/extras.json
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.verbs.source import bundled_model

ROOT = Path(__file__).parents[1]
PACKAGES = ("lm_eval", "accelerate", "tensorboard", "wandb", "nvidia-modelopt", "pdoc")
BIN = Path(sys.executable).parent
MODEL = str(bundled_model())


def run(*command: str, **env: str) -> str:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, env=os.environ | env, capture_output=True,
                          text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def evaluate(work: Path) -> dict[str, Any]:
    """--tasks FILE."""
    task = "tests/data/lm_eval/continuation.yaml"
    found = json.loads(run("minipuzzle", "evaluate", MODEL, "--data", "docs", "--set", "evaluation.samples=4",
                           "--tasks", task, "--json"))["tasks"]
    accuracy = found["results"]["continuation"]["acc,none"]
    assert accuracy >= 0.75, found  # of 8; chance is 0.5
    small = [f"--set={key}" for key in ("evaluation.samples=4", "calibration.samples=4", "distillation.tokens=0",
                                        "search.measure=4", "evaluation.task_candidates=2", "search.rank=tasks")]
    report = json.loads(run("minipuzzle", "prune", MODEL, "--data", "docs", "-o", str(work / "run"), "--json", "-q",
                            f"--set=evaluation.tasks=[{task}]", *small))
    scores = {name: one["of"]["continuation"] for name, one in report["tasks"].items()}
    assert scores["parent"]["value"] == accuracy, scores
    candidates = [c["measured"] for c in report["candidates"] if c["measured"]]
    assert sum("tasks" in c for c in candidates) == 2 < len(candidates)
    return {"task": task, "samples": found["n_samples"], "accuracy": accuracy, "pruned": scores}


def track(work: Path) -> dict[str, Any]:
    """distill --track, by both trackers: what they kept is the loss of metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from wandb.proto import wandb_internal_pb2

    def distill(name: str, **env: str) -> tuple[Path, list[float]]:
        out = work / name
        run("minipuzzle", "distill", MODEL, "--teacher", MODEL, "--data", "docs", "--set", "evaluation.samples=4",
            "--set", "distillation.tokens=8k", "--set", "distillation.batch_tokens=1k", "--track", name, "-o", str(out),
            **env)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return out, [row["loss"] for row in rows]

    out, losses = distill("tensorboard")
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    kept = [event.value for event in events.Scalars("loss")]
    assert len(kept) == len(losses) > 2
    assert all(abs(a - b) < 1e-5 for a, b in zip(kept, losses, strict=True))

    _, losses = distill("wandb", WANDB_MODE="offline", WANDB_DIR=str(work))
    [file] = work.glob("wandb/offline-run-*/*.wandb")
    again = []
    for data in wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        again += [float(item.value_json) for item in record.history.item if "loss" in (item.key, *item.nested_key)]
    assert len(again) == len(losses)
    assert all(abs(a - b) < 1e-5 for a, b in zip(again, losses, strict=True))
    return {"steps": len(losses), "tensorboard": len(kept), "wandb_offline": len(again)}


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run: 7 bytes, then LevelDB's log format in blocks of 32 KiB (wandb
    ships no reader)."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if left < 7 or kind == 0:  # padding
            at += left
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def quantize(work: Path) -> dict[str, Any]:
    """modelopt's FP8 of all linear layers, simulated."""
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    text = (ROOT / "benchmarks" / "extras.py").read_text()
    ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt")["input_ids"][:, :512]

    @torch.no_grad()
    def loss() -> float:
        return float(model(ids, labels=ids, use_cache=False).loss)

    before = loss()
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(ids, use_cache=False))
    after = loss()
    assert 0 < abs(after - before) < 0.05, (before, after)
    return {"loss_before": before, "loss_fp8": after}


def docs(work: Path) -> dict[str, Any]:
    run("pdoc", "-o", str(work / "docs"), "-d", "google", "minipuzzle.core.budget", "minipuzzle.recipes.schema")
    pages = sorted(p.name for p in (work / "docs").rglob("*.html"))
    assert "schema.html" in pages, pages
    return {"pages": len(pages)}


def main() -> None:
    steps: tuple[tuple[str, Callable[[Path], dict[str, Any]]], ...] = (
        ("eval", evaluate), ("track", track), ("quantize", quantize), ("docs", docs))
    found = {}
    for name, step in steps:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            found[name] = step(Path(work)) | {"seconds": round(time.perf_counter() - begin, 1)}
        print(name, found[name], flush=True)
    absent = [name for name in ("torchvision", "torchaudio", "mamba-ssm") if _version(name)]
    assert not absent, absent  # none of the extras here brings what would bring CUDA
    about = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
             "versions": versions() | {name: _version(name) for name in PACKAGES}, "extras": found}
    path = ROOT / "benchmarks" / "results" / "extras.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(path)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
