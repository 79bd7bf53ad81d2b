"""Layer ablation: the wavefront against the loop that scripts of peers use, and what racing saves.

    python benchmarks/ablation.py [--samples 8]

The loop: a forward hook on one layer after the other gives back the layer's input, and the model
runs once for each.
Both sides: the same blocks and SSM scan, samples, threads and samples at a time; float32. mse
alone, and with kl and loss, whose LM heads cost both sides the same. In turns, the best of each.
Writes benchmarks/results/ablation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipuzzle.core.published import find_config
from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.writer import tokenize
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.registry import family_of
from minipuzzle.importance.layers import score
from minipuzzle.importance.racing import Race, toss_ups
from minipuzzle.models.logits import token_metrics
from minipuzzle.models.module import HybridLM
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Model, Whole, layer_forwards, walk
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.verbs.source import bundled_model

ROOT = Path(__file__).resolve().parent.parent


def loop(module: HybridLM, ids: torch.Tensor, with_logits: bool) -> tuple[np.ndarray, float]:
    """([layer] mse, seconds) the straightforward way: hooks, one full forward per layer."""
    begin = time.perf_counter()
    with torch.no_grad():
        full = module(ids)
        if with_logits:
            token_metrics([full], module.head, ids)
        out = []
        for block in module.blocks:
            hook = block.register_forward_hook(lambda _, inputs, output: inputs[0])
            hidden = module(ids)
            hook.remove()
            out.append((hidden - full).double().square().mean().item())
            if with_logits:
                token_metrics([hidden], module.head, ids, full, module.head)
    return np.array(out), time.perf_counter() - begin


def wavefront(model: Model, ids: torch.Tensor, with_logits: bool) -> tuple[np.ndarray, float]:
    """The same by one walk."""
    begin, whole = time.perf_counter(), Whole(model)
    variants = [whole.variant(), *(whole.variant({i}) for i in range(model.arch.num_layers))]
    full, *without = walk(whole, variants, ids)
    out = [(hidden - full).double().square().mean().item() for hidden in without]
    if with_logits:
        token_metrics([full], model.head, ids)
        token_metrics(without, model.head, ids, full, model.head)
    return np.array(out), time.perf_counter() - begin


def compare(model: Model, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    module = HybridLM(model.family, model.arch, model.by_name())
    whole, layers = Whole(model), model.arch.num_layers
    variants = [whole.variant(), *(whole.variant({i}) for i in range(layers))]
    out: dict[str, Any] = {"layers": layers, "samples": len(ids), "tokens": ids.shape[1],
                           "layer_forwards": {"loop": (layers + 1) * layers, "wavefront": layer_forwards(variants),
                                              "least": layers * (layers + 1) // 2}}
    for name, with_logits in (("mse", False), ("mse, kl and loss", True)):
        times: dict[str, list[float]] = {"loop": [], "wavefront": []}
        for _ in range(rounds):
            a, seconds = loop(module, ids, with_logits)
            times["loop"].append(seconds)
            b, seconds = wavefront(model, ids, with_logits)
            times["wavefront"].append(seconds)
        assert np.abs(a / b - 1).max() < 1e-4, "equal numbers"
        best = {k: min(v) for k, v in times.items()}
        out[name] = {"seconds": times, "faster": best["loop"] / best["wavefront"],
                     "largest relative difference": float(np.abs(a / b - 1).max())}
        print(layers, name, {k: round(v, 2) for k, v in best.items()}, f"{out[name]['faster']:.2f}x", flush=True)
    return out


def racing(model: Model, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Layer-forwards for a search's question, and whether the same layers are chosen."""
    layers, pattern, out = model.arch.num_layers, model.arch.pattern, []
    without = score(Pass(model, ids))
    loop_forwards = len(ids) * (layers + 1) * layers
    for drops in ({"M": (3, 3), "-": (3, 3), "*": (0, 0)}, {"M": (4, 4), "-": (5, 5), "*": (1, 1)},
                  {"M": (0, 5), "-": (0, 8), "*": (0, 1)}):
        race = Race(drops, 0.95, "kl")
        found = score(Pass(model, ids), race)
        same = []
        for kind, (low, high) in drops.items():
            tables = [s.layers.table[s.layers.table["kind"] == kind] for s in (without, found)]
            same += [set(tables[0].nsmallest(c, "kl")["layer"]) == set(tables[1].nsmallest(c, "kl")["layer"])
                     for c in range(low, high + 1)]
        row = {"drops": {k: list(v) for k, v in drops.items()}, "samples": found.samples, "forwards": found.forwards,
               "fewer than the loop": loop_forwards / found.forwards,
               "fewer than the wavefront": without.forwards / found.forwards, "sets": len(same),
               "sets equal": sum(same), "toss-ups": toss_ups(found.layers.samples["kl"].T, pattern, race)}
        print(pattern, row, flush=True)
        out.append(row)
    return out


def random_model(layers: str) -> Model:
    """Widths of the bundled model, 52 layers in the order of the 8B; random weights, scaled so that
    blocks matter."""
    small = open_model(bundled_model()).arch
    arch = Architecture(**{f: getattr(small, f) for f in small.__dataclass_fields__} | {"pattern": layers})
    generator = torch.Generator().manual_seed(0)
    family = family_of(arch.model_type)
    weights = {}
    for name, shape in arch.shapes().items():
        value = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        weights[name] = value.exp() if name.endswith(("norm.weight", "norm_f.weight", "A_log", ".D")) else value
    return Model.build(family, arch, weights.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--race-samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    folder = ROOT / "runs" / "tokens"
    tokenize("stdlib", AutoTokenizer.from_pretrained(bundled_model(), model_max_length=2**62), folder, "bundled")
    ids = torch.from_numpy(load_blocks(folder, "train", 256).first(args.race_samples))
    bundled = Model.load(open_model(bundled_model()))
    wide = random_model(Architecture.from_config(find_config("nemotron-h-8b")).pattern)
    out = {"what": "layer ablation: wavefront against a loop with hooks; racing", "date": time.strftime("%Y-%m-%d"),
           "hardware": hardware(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
           "versions": versions(), "bundled": compare(bundled, ids[: args.samples], args.rounds),
           "52 layers": compare(wide, ids[: args.samples // 2], args.rounds), "racing": racing(bundled, ids)}
    path = ROOT / "benchmarks" / "results" / "ablation.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
