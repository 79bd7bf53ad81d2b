"""Step `prune`: the bundled model's job with a small budget, on the CPU and on the device, and
stopped and continued.

Scores, the chosen architecture and the losses of the two are compared. A third run on the device
gets a SIGTERM in its long training and is continued: its result must be that of the run that was
left alone. Each run passes the reload gate, in stock transformers, or fails.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from minipuzzle.recipes.schema import Recipe
from minipuzzle.verbs.prune import prune as prune_model

if TYPE_CHECKING:
    from check import Run

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS: dict[str, Any] = {
    "budget": {"memory": "0.6x"},
    "calibration": {"samples": 8},
    "evaluation": {"samples": 16},
    "search": {"measure": 8, "finalists": 2},
    "distillation": {"tournament_tokens": "4k", "tokens": "20k"},
}
TINY: dict[str, Any] = {
    "budget": {"memory": "0.8x"},
    "calibration": {"data": str(ROOT / "docs"), "samples": 2, "sequence_length": 64},
    "evaluation": {"data": str(ROOT / "docs"), "samples": 8},
    "space": {
        "drop_mamba": [0, 2],
        "drop_ffn": [0, 2],
        "drop_attention": [0, 0],
        "ffn_size": ["0.5x", "1x", "0.25x"],
        "hidden_size": ["0.75x", "1x", "0.25x"],
        "mamba_num_heads": ["1x", "1x"],
    },
    "search": {"measure": 2, "finalists": 1, "damage": "additive"},
    "distillation": {
        "data": str(ROOT / "docs"),
        "tournament_tokens": "1k",
        "tokens": "3k",
        "sequence_length": 64,
        "batch_tokens": 256,
        "learning_rate": 3.0e-4,
    },
}
# Two devices add up in another order, and the kernels multiply in TF32: largest relative difference
SCORES, LOSSES = 0.02, 0.01
# The same device twice; a GPU may add up in another order each time
RESUMED = 1e-3


def prune(run: Run) -> None:
    recipe = Recipe.model_validate(TINY if run.tiny else SETTINGS)
    file = run.scratch / "recipe.yaml"
    file.write_text(recipe.dump())
    runs: dict[str, Any] = {}
    folders = {name: run.scratch / name for name in ("cpu", run.device, "resumed")}
    for name in dict.fromkeys(("cpu", run.device)):
        runs[name] = outcome(recipe, folders[name], name)
        run.put(settings=TINY if run.tiny else SETTINGS, runs=runs)
    stopped = stop(file, folders["resumed"], run.device)
    runs["resumed"] = outcome(recipe, folders["resumed"], run.device) | {"stopped": stopped}
    run.put(runs=runs)
    run.check(
        stopped["exit_code"] == 143,
        f"a SIGTERM ended the run with exit code {stopped['exit_code']}, not 143",
    )

    scores = largest_difference(folders["cpu"], folders[run.device])
    run.put(
        against_cpu={
            "scores": scores,
            "limit": SCORES,
            "loss_distilled": difference(runs, "cpu", run.device),
            "loss_limit": LOSSES,
        },
        resumed={"loss_distilled": difference(runs, run.device, "resumed"), "limit": RESUMED},
    )
    run.check(scores <= SCORES, f"scores differ from the CPU's by {scores:.1e}, limit {SCORES:.0e}")
    run.check(
        difference(runs, "cpu", run.device) <= LOSSES,
        "the loss differs from the CPU's: see against_cpu",
    )
    run.check(
        difference(runs, run.device, "resumed") <= RESUMED,
        "the continued run has another loss: see resumed",
    )
    for name in (run.device, "resumed"):
        run.check(
            runs[name]["architecture"] == runs["cpu"]["architecture"],
            f"{name} chose another architecture than cpu",
        )


def outcome(recipe: Recipe, folder: Path, device: str) -> dict[str, Any]:
    """Run or continue the job; what came out, in short."""
    begin = time.perf_counter()
    done = prune_model(None, recipe, folder, device=device)
    result = done.report["result"]
    return {
        "seconds": time.perf_counter() - begin,
        "architecture": result["architecture"],
        "stages": {s["name"]: s["seconds"] for s in done.report["stages"]},
        "warnings": done.report["warnings"],
        "reload_difference": result["reload_difference"],
        "candidate": result["candidate"],
        **{key: result[key] for key in ("loss_sliced", "loss_pruned", "loss_distilled")},
    }


def stop(recipe: Path, folder: Path, device: str) -> dict[str, Any]:
    """Start the job and send SIGTERM once it trains: its exit code, and the steps that were
    trained by then.
    """
    command = [
        sys.executable,
        "-m",
        "minipuzzle.cli",
        "prune",
        "--recipe",
        str(recipe),
        "-o",
        str(folder),
        "--device",
        device,
    ]
    process = subprocess.Popen(command)
    while process.poll() is None and not rows(folder):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    return {
        "exit_code": code,
        "steps": rows(folder),
        "unfinished": not (folder / "report.json").exists(),
    }


def rows(folder: Path) -> int:
    """Steps of training in its files; a file may be half written."""
    return sum(file.read_text().count("\n") for file in folder.glob("distillation/*/metrics.jsonl"))


def largest_difference(one: Path, other: Path) -> float:
    """Of the KL of the layers, relative to the largest."""
    a, b = (pd.read_csv(folder / "scores" / "layers.csv")["kl"] for folder in (one, other))
    return float((a - b).abs().max() / a.max())


def difference(runs: dict[str, Any], one: str, other: str) -> float:
    a, b = (runs[name]["loss_distilled"] for name in (one, other))
    return float(abs(a - b) / abs(a))
