"""One MoE layer: families/experts.py against transformers' own implementations of its experts,
forward and backward.

    python benchmarks/moe_layer.py

At the shapes of the trained small model and at an eighth of Nemotron 3 Nano's (its ratio of sizes,
all 128 experts); same weights, inputs and threads, in turns, the best of some rounds each. "eager"
is transformers' loop over experts, "grouped_mm" its default. Writes
benchmarks/results/moe_layer.json.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from minipuzzle.core.published import find_config
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.mixers import moe
from minipuzzle.pipeline.machine import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
NANO = {"hidden_size": 336, "moe_intermediate_size": 232, "moe_shared_expert_intermediate_size": 464}
TOKENS, ROUNDS = 2048, 4


def seconds(run: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """(forward, forward and backward), once."""
    begin = time.perf_counter()
    with torch.no_grad():
        run()
    between = time.perf_counter()
    run().square().mean().backward()
    return between - begin, time.perf_counter() - between


def compare(config: dict[str, object]) -> dict[str, object]:
    arch, torch_config = Architecture.from_config(config), NemotronHConfig(**config)
    torch.manual_seed(0)
    mixer = NemotronHMoE(torch_config).float()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    weights = {(f"experts.{{num_experts}}.{n.split('.')[1]}.weight" if n.startswith("experts.") else n): t
               for n, t in (*mixer.named_parameters(), *mixer.named_buffers())}
    x = torch.randn(8, TOKENS // 8, arch.hidden_size)

    def theirs(name: str) -> torch.Tensor:
        torch_config._experts_implementation = name
        return mixer(x)

    runs: dict[str, Callable[[], torch.Tensor]] = {
        "minipuzzle": lambda: moe(arch, weights, x, None), "grouped_mm": lambda: theirs("grouped_mm"),
        "eager": lambda: theirs("eager")}
    with torch.no_grad():
        plain = runs["eager"]()
        difference = float((runs["minipuzzle"]() - plain).abs().max() / plain.abs().max())
    best = {name: (float("inf"), float("inf")) for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            forward, both = seconds(run)
            best[name] = min(best[name][0], forward), min(best[name][1], both)
    return {"experts": arch.num_experts, "experts_per_token": arch.experts_per_token, "hidden": arch.hidden_size,
            "expert_width": arch.moe_ffn_size, "difference": difference,
            "seconds": {name: {"forward": a, "forward_backward": b} for name, (a, b) in best.items()}}


def main() -> None:
    small = json.loads((ROOT / "tests" / "data" / "moe" / "config.json").read_text())
    nano = find_config("nemotron-3-nano-30b-a3b") | NANO
    drop = ("model_type", "architectures", "_provenance", "d_head", "torch_dtype")
    found = {name: compare({k: v for k, v in config.items() if k not in drop} | {"model_type": "nemotron_h"})
             for name, config in (("small", small), ("nano/8", nano))}
    result = {"tokens": TOKENS, "threads": torch.get_num_threads(), "shapes": found, "hardware": hardware(),
              "versions": versions(), "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0]}
    path = ROOT / "benchmarks" / "results" / "moe_layer.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
