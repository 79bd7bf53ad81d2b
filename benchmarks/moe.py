"""Which experts to drop: by REAP, by the norm of their weights, by their load, or at random.

    python benchmarks/moe.py [--work DIR]
    python benchmarks/moe.py --tables

The small MoE model of the tests loses 1/4 and 1/2 of the experts of every layer; KL and loss
on held-out text before training and after 200 KD steps of 1k tokens, 3 seeds (a seed draws the
calibration, the training data and what is random). The four of a seed learn together from one
teacher pass. Every finished row is a line of WORK/rows.jsonl and is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipuzzle.core.scores import WidthScores
from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.tokenizer import load_tokenizer
from minipuzzle.data.writer import tokenize
from minipuzzle.distill.loop import TrainSettings, distill_together
from minipuzzle.distill.trained import read_metrics
from minipuzzle.distill.trainer import Pupil
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.importance.widths import score_widths
from minipuzzle.models.module import HybridLM
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.surgery.cut import Cutter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "moe.json"
MODEL = ROOT / "tests" / "data" / "moe"
SEEDS, SAMPLES, LENGTH, BATCH, STEPS, RATE, HELD_OUT = (0, 1, 2), 64, 256, 1024, 200, 2e-3, 64
SHARES = (0.25, 0.5)
METHODS = ("REAP", "norm", "load", "random")
PLACE = "moe_experts"


def expert_scores(model: Model, scores: WidthScores, method: str, seed: int) -> dict[int, np.ndarray]:
    """Layer -> [experts], larger is kept."""
    if method == "REAP":
        return scores.layers[PLACE]
    if method == "load":
        return scores.load[PLACE]
    gen = np.random.default_rng(seed)
    out = {}
    for layer, reap in scores.layers[PLACE].items():
        sides = [t.flatten(1).norm(dim=1).numpy() for name, t in model.layers[layer].items() if t.dim() == 3
                 and "experts" in name]
        assert len(sides) == 2
        out[layer] = sides[0] * sides[1] if method == "norm" else gen.random(len(reap))
    return out


def as_model(student: HybridLM) -> Model:
    tensors = ((n, p.detach()) for n, p in student.parameters_by_name().items())
    return Model.build(student.family, student.arch, tensors)


def run(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "rows.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    folder = open_model(MODEL)
    parent = Model.load(folder)
    tokenize("stdlib", load_tokenizer(MODEL), work / "tokens", folder.fingerprint)
    train = load_blocks(work / "tokens", "train", LENGTH)
    reference = Reference(parent, torch.from_numpy(load_blocks(work / "tokens", "held_out", LENGTH).first(HELD_OUT)))
    whole = measure(parent, reference)
    for seed in SEEDS:
        scores = score_widths(parent, torch.from_numpy(train.batch(100 + seed, 0, SAMPLES)))
        for share in SHARES:
            if any((row["seed"], row["dropped"]) == (seed, share) for row in rows):
                continue
            target = dataclasses.replace(parent.arch, num_experts=round(parent.arch.num_experts * (1 - share)))
            cut = {}
            for method in METHODS:
                layers = scores.layers | {PLACE: expert_scores(parent, scores, method, seed)}
                cutter = Cutter(parent, dataclasses.replace(scores, layers=layers))
                cut[method] = cutter.cut(target, tuple(range(parent.arch.num_layers)))
            pupils = [Pupil(HybridLM(model.family, model.arch, model.by_name()),
                            work / "students" / f"{seed} {share} {method}",
                            evaluate=lambda student: measure(as_model(student), reference))
                      for method, model in cut.items()]
            begin = time.perf_counter()
            distill_together(pupils, parent, train, TrainSettings(STEPS * BATCH, BATCH, RATE, seed=seed),
                             evaluate_every=STEPS)
            for (method, model), pupil in zip(cut.items(), pupils, strict=True):
                before = measure(model, reference)
                after = next(r for r in reversed(read_metrics(pupil.folder)) if "eval_kl" in r)
                row = {"seed": seed, "dropped": share, "method": method, "kl_before": before["kl"],
                       "loss_before": before["loss"], "kl_after": after["eval_kl"], "loss_after": after["eval_loss"],
                       "seconds_of_all_four": round(time.perf_counter() - begin, 1)}
                rows.append(row)
                print(json.dumps(row), flush=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # the four at once
            RESULTS.write_text(json.dumps({
                "what": "dropping experts of tests/data/moe", "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
                "threads": torch.get_num_threads(), "versions": versions(), "corpus_hash": train.corpus_hash,
                "parent_loss": whole["loss"], "settings": {
                    "calibration_samples": SAMPLES, "sequence_length": LENGTH, "batch_tokens": BATCH, "steps": STEPS,
                    "learning_rate": RATE, "held_out_blocks": HELD_OUT}, "rows": rows}, indent=1) + "\n")


def tables() -> str:
    """The table of docs/results.md, from the committed results: means, and half the range over seeds."""
    rows = json.loads(RESULTS.read_text())["rows"]

    def cell(share: float, method: str, key: str) -> str:
        found = [row[key] for row in rows if (row["dropped"], row["method"]) == (share, method)]
        return f"{np.mean(found):.3f} ± {np.ptp(found) / 2:.3f}" if found else ""

    lines = ["| experts by | 1/4 dropped | after 200 steps | 1/2 dropped | after 200 steps |", "|---|---|---|---|---|"]
    for method in METHODS:
        cells = [cell(share, method, key) for share in SHARES for key in ("kl_before", "kl_after")]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the table of the committed results")
    parser.add_argument("--work", type=Path, default=Path("runs/moe"))
    args = parser.parse_args()
    if args.tables:
        print(tables())
    else:
        run(args.work)


if __name__ == "__main__":
    main()
