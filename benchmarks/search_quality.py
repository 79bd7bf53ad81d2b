"""What each part of the search is worth after training, at equal tokens.

    python benchmarks/search_quality.py [--work DIR] [--only WORD ...]
    python benchmarks/search_quality.py --tables

A row is one `minipuzzle prune`: a model, a budget, a change of the search, a seed; 200k tokens in
all, those of every finalist included. Rows of one model share the scores, and the measured candidates
where budget and search agree. A finished row is in benchmarks/results/search_quality.json
and is not made again; --only makes those whose name holds one of the words.

Loss and KL are of the reported held-out blocks. `vs_today` is the loss minus today's of the same
model, budget and seed, with the standard error over blocks (paired); it does not hold the noise of
training, which seeds show.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from minipuzzle.core.rundir import read_about
from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.held_out import two_parts
from minipuzzle.models.logits import token_metrics
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.recipes.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "search_quality.json"
MODELS = {"bundled": [], "moe": [str(ROOT / "tests" / "data" / "moe")]}
# steps of 1024 tokens: 138 of the winner, 19 of each of three other finalists, 199,680 tokens in all
TOKENS = {"distillation.tokens": "141k", "distillation.tournament_tokens": "19k"}
TODAY = {"search.tournament": "equal", "search.moves": 0}
CHANGES: dict[str, dict[str, Any]] = {
    "today": {}, "sums": {"search.damage": "quadratic"}, "halving": {"search.tournament": "halving"},
    "moves": {"search.moves": 48}, "all": {"search.tournament": "halving", "search.moves": 48}}
PLAN = [(model, "0.5x", change, 0) for model in MODELS for change in CHANGES]
PLAN += [(model, budget, change, 0) for budget in ("0.7x", "0.35x") for model in MODELS
         for change in ("today", "moves")]
PLAN += [(model, "0.5x", change, seed) for seed in (1, 2) for model in MODELS
         for change in ("today", "moves")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "search_quality")
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--tables", action="store_true", help="print the table of the committed results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for model, budget, change, seed in () if args.tables else PLAN:
        name = f"{model} {budget} {change} {seed}"
        if any(row["name"] == name for row in rows) or not any(word in name for word in args.only):
            continue
        rows.append({"name": name, **one(args.work, model, budget, change, seed)})
        about = {"what": "prune with another search, at equal tokens in all", "tokens_all": 200_000,
                 "settings": TOKENS, "changes": CHANGES, "rows": rows}
        RESULTS.write_text(json.dumps(about).replace('{"name": "', '\n{"name": "') + "\n")
        print(table(rows), flush=True)
    if args.tables:
        print(table(rows))


def one(work: Path, model: str, budget: str, change: str, seed: int) -> dict[str, Any]:
    """The run of a row."""
    work.mkdir(parents=True, exist_ok=True)
    base, folder = work / model, work / f"{model}-{budget}-{change}-{seed}"
    shared = base.is_dir()
    if shared and not folder.is_dir():
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("distillation", "model", "report.*"), symlinks=True)
    settings = TODAY | TOKENS | CHANGES[change]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "minipuzzle", "prune", *MODELS[model], "--seed", str(seed), "--budget",
         f"memory={budget}", "--redo", *(f"{k}={v}" for k, v in settings.items()), "-o", str(folder)],
        check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    hours = (time.perf_counter() - begin) / 3600
    if not shared:
        shutil.copytree(folder, base, symlinks=True)
    return {
        "model": model, "budget": budget, "change": change, "seed": seed, "scores": "shared" if shared else "own",
        "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
        "load": os.getloadavg()[0], "minipuzzle": versions()["minipuzzle"], "hours": round(hours, 4),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        **judge(folder)}


def judge(run: Path) -> dict[str, Any]:
    """What its report says, and the loss on each reported block."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    result, found = report["result"], report["candidates"]
    finalists = [c for c in found if c["after_distillation"]]
    trained = report["distillation"]["tournament"]
    first = {t["candidate"]: next(row["eval_loss"] for row in t["curve"] if "eval_loss" in row)
             for t in trained if t["curve"]}
    return {
        "loss": result["loss_distilled"], "kl": result["kl_distilled"], "kl_pruned": result["kl_pruned"],
        "loss_minus_parent": report["paired"]["loss_minus_parent"], "stderr": report["paired"]["stderr"],
        "tokens_all": report["distillation"]["tokens_all"], "parameters": result["parameters"],
        "winner": shape(result["architecture"]), "measured": report["search"]["measured"],
        "rank_correlation": report["rank_correlation"],
        "order_after": order([(c["measured"]["kl"], first[c["name"]]) for c in finalists if c["name"] in first]),
        "finalists": [[c["name"], shape(c["architecture"]), round(c["measured"]["kl"], 4),
                       round(c["after_distillation"]["loss"] or np.nan, 4)] for c in finalists],
        "seconds": {s["name"]: s["seconds"] for s in report["stages"]},
        "block_losses": block_losses(run)}


def order(pairs: list[tuple[float, float]]) -> float | None:
    """Spearman's correlation of the KL before training and the loss where finalists are first compared."""
    return round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 3) if len(pairs) > 2 else None


def shape(arch: dict[str, Any]) -> str:
    """Layers and widths, in short."""
    kinds = "".join(f"{arch['pattern'].count(k)}{k}" for k in dict.fromkeys(arch["pattern"]))
    widths = [arch.get(k) for k in ("hidden_size", "ffn_size", "mamba_num_heads", "num_experts", "moe_ffn_size",
                                    "shared_ffn_size")]
    return f"{kinds} " + "/".join(str(w) for w in widths if w)


def block_losses(run: Path) -> list[float]:
    """Of RUN/model, in the blocks that choose nothing."""
    recipe = Recipe.from_json(read_about(run)["recipe"], str(run))
    tokens = next(p for p in (run / "tokens").iterdir() if (p / "held_out.bin").is_file())
    held_out = load_blocks(tokens, "held_out", recipe.calibration.sequence_length)
    ids = torch.from_numpy(two_parts(held_out, recipe.evaluation.samples)[1])
    model = Model.load(open_model(run / "model"))
    return [round(float(token_metrics([final_hidden(model, one[None])], model.head, one[None])[0].loss), 5)
            for one in ids]


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/results.md."""
    lines = ["| model, budget, seed | search | loss | minus today's | KL | tokens in all | before / after | CPU s |",
             "|---|---|---|---|---|---|---|---|"]
    todays = {(r["model"], r["budget"], r["seed"]): r for r in rows if r["change"] == "today"}
    for row in rows:
        where = row["model"], row["budget"], row["seed"]
        today = todays.get(where)
        versus = ""
        if today is not None and today is not row:
            gap = np.array(row["block_losses"]) - np.array(today["block_losses"])
            versus = f"{gap.mean():+.4f} ± {gap.std(ddof=1) / len(gap) ** 0.5:.4f}"
        lines.append(f"| {', '.join(map(str, where))} | {row['change']} | {row['loss']:.4f} | {versus} | "
                     f"{row['kl']:.4f} | {row['tokens_all']:,} | {row['rank_correlation']['measured'] or 0:.2f} / "
                     f"{row['order_after']} | {row['cpu_seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
