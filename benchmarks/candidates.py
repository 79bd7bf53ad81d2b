"""Measuring candidates: one walk over shared beginnings, against writing and evaluating each with
transformers.

    python benchmarks/candidates.py [--count 100] [--samples 8]

Candidates of the MiniPuzzle kind: kept layers per kind and one FFN width, all in 0.7x of the
bundled model's memory, best predicted first. The other side writes each as a Hugging Face folder,
loads it and runs it, with the parent's logits computed once: what a script does that has no engine.
Same samples and threads, losses equal to 1e-4.
Also: trie nodes over summed depth, as the number of candidates grows. Writes
benchmarks/results/candidates.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from minipuzzle.core.budget import Budget
from minipuzzle.costs.cost import cost
from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.writer import tokenize
from minipuzzle.evaluate.quality import measure_variants
from minipuzzle.importance.curves import measure_curves
from minipuzzle.importance.layers import score
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Model, layer_forwards
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.grid import search_architectures
from minipuzzle.search.space import resolve_space
from minipuzzle.surgery.cut import Cutter
from minipuzzle.verbs.source import bundled_model

ROOT = Path(__file__).resolve().parent.parent
SPACE = {"hidden_size": "1x", "mamba_num_heads": "1x", "mamba_head_dim": "1x", "ffn_size": ["0.25x", "1x", "0.125x"]}


def one_by_one(folder: Any, cutter: Cutter, found: list[Candidate], ids: torch.Tensor
               ) -> tuple[list[float], float, int]:
    """(loss of each, seconds, layers applied for a sample): written, loaded, run."""
    def load(path: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))
        return model

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(x, use_cache=False).logits[:, :-1].log_softmax(-1) for x in ids.split(4)])

    begin, losses, layers = time.perf_counter(), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        parent = logits(load(folder.path))
        for candidate in found:
            there, names = Path(scratch) / candidate.name, folder.dtypes(candidate.kept_layers)
            small = cutter.cut(candidate.architecture, candidate.kept_layers)
            write_model(there, candidate.architecture.to_config(folder.config),
                        ((n, t.to(names[n])) for n, t in small.by_name().items()))
            log_q = logits(load(there))
            (parent.exp() * (parent - log_q)).sum(-1).mean()
            losses.append(float(-log_q.gather(-1, ids[:, 1:, None]).double().mean()))
            layers += len(candidate.kept_layers)
    return losses, time.perf_counter() - begin, layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens = ROOT / "runs" / "tokens"
    tokenize("stdlib", AutoTokenizer.from_pretrained(bundled_model(), model_max_length=2**62), tokens, "bundled")
    folder = open_model(bundled_model())
    model, recipe = Model.load(folder), Recipe()
    calibration = torch.from_numpy(load_blocks(tokens, "train", 256).first(16))
    ids = torch.from_numpy(load_blocks(tokens, "held_out", 256).first(args.samples))
    scored = score(Pass(model, calibration))
    every = tuple(range(folder.arch.num_layers))
    cutter = Cutter(model, scored.widths, None, folder.dtypes(every))
    space = resolve_space(recipe.space.model_dump() | SPACE, folder.arch)
    curves = measure_curves(cutter, {"ffn_size": (128, 256, 384)}, Pass(model, calibration))
    workload = recipe.workload.build()
    budget = Budget.parse({"memory": "0.7x"}, cost(folder.arch, workload).to_json())
    found = search_architectures(folder.arch, space, budget, workload, scored.layers, curves, "kl").candidates
    variants = {c.name: cutter.variant(c.architecture, c.kept_layers) for c in found}
    sharing = []
    for count in (10, 25, 50, 100, 200, 400, 800):
        some = [variants[c.name] for c in found[:count]]
        depth = sum(len(c.kept_layers) for c in found[:count])
        sharing.append({"candidates": len(some), "nodes": layer_forwards(some), "summed depth": depth,
                        "widths": len({c.architecture.ffn_size for c in found[:count]}),
                        "sharing": depth / layer_forwards(some)})
        print(sharing[-1], flush=True)
    chosen = found[: args.count]
    run = Pass(model, ids)
    begin = time.perf_counter()
    measured = measure_variants(cutter, cutter.variant(folder.arch, every), [variants[c.name] for c in chosen], run)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"trie {seconds:.1f} s", flush=True)
    losses, other, layers = one_by_one(folder, cutter, chosen, ids)
    print(f"one by one {other:.1f} s", flush=True)
    difference = max(abs(m["loss"] - loss) for m, loss in zip(measured, losses, strict=True))
    assert difference < 1e-4, difference
    out = {"what": "candidates measured in one walk, against written and evaluated one by one in transformers",
           "date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "threads": torch.get_num_threads(),
           "load": os.getloadavg()[0], "versions": versions(), "candidates": len(chosen), "samples": len(ids),
           "feasible": len(found), "trie seconds": seconds, "one by one seconds": other, "faster": other / seconds,
           "nodes": layer_forwards([variants[c.name] for c in chosen]), "summed depth": layers,
           "largest difference of losses": difference, "peak_rss_bytes": {
               "trie": peak, "both": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}, "sharing": sharing}
    path = ROOT / "benchmarks" / "results" / "candidates.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
