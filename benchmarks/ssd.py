"""One Mamba-2 block: the lean scan of families/ssd.py against the torch path of transformers,
forward and backward.

    python benchmarks/ssd.py

At the bundled model's shapes and at the 8B's; same weights, inputs and threads; transformers at its
best chunk size of
several. Saved bytes: of the tensors that autograd keeps for the backward, weights left out.
Equality to a float64 recurrence, token by token, is checked in the tests. Writes
benchmarks/results/ssd.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.utils import logging

from minipuzzle.core.published import find_config
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.mixers import mamba2
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.verbs.source import bundled_model

ROOT = Path(__file__).resolve().parent.parent


def measure(run: Callable[[], torch.Tensor], weights: set[int], rounds: int) -> dict[str, float]:
    """Seconds forward, forward and backward (the best of `rounds`), bytes saved for the
    backward."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = run()
        count = sum(saved.values())
    del out
    forward, both = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        with torch.no_grad():
            run()
        forward.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        run().square().mean().backward()
        both.append(time.perf_counter() - begin)
    return {"forward": min(forward), "forward and backward": min(both), "saved bytes": count}


def compare(arch: Architecture, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    config = NemotronHConfig(
        vocab_size=8, hidden_size=arch.hidden_size, mamba_num_heads=arch.mamba_num_heads,
        mamba_head_dim=arch.mamba_head_dim, n_groups=arch.n_groups, ssm_state_size=arch.state_size,
        hybrid_override_pattern="M-M*-", conv_kernel=arch.conv_kernel, chunk_size=64, use_bias=False)
    torch.manual_seed(0)
    mixer = NemotronHMamba2Mixer(config, layer_idx=0)
    mixer.time_step_limit = (0.0, float("inf"))
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    weights = dict(mixer.named_parameters())
    x = torch.randn(batch, tokens, arch.hidden_size)
    known = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    out: dict[str, Any] = {"heads": arch.mamba_num_heads, "head channels": arch.mamba_head_dim, "groups": arch.n_groups,
                           "state": arch.state_size, "samples": batch, "tokens": tokens}
    lean = mamba2(arch, weights, x, None)
    out["minipuzzle"] = measure(lambda: mamba2(arch, weights, x, None), known, rounds)
    for chunk in (32, 64, 128):
        mixer.chunk_size = chunk
        theirs = mixer(x)
        difference = float((theirs - lean).detach().abs().max() / lean.detach().abs().max())
        assert difference < 1e-4, difference
        out[f"transformers, chunk {chunk}"] = measure(lambda: mixer(x), known, rounds)
    others = [v for k, v in out.items() if k.startswith("transformers")]
    out["better than the best of transformers by"] = {
        k: min(o[k] for o in others) / out["minipuzzle"][k] for k in out["minipuzzle"]}
    print(json.dumps(out, indent=1), flush=True)
    return out


def main() -> None:
    logging.set_verbosity_error()
    small = open_model(bundled_model()).arch
    large = dataclasses.replace(Architecture.from_config(find_config("nemotron-h-8b")), use_bias=False)
    out = {"what": "one Mamba-2 block, minipuzzle against the torch path of transformers", "versions": versions(),
           "date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "threads": torch.get_num_threads(),
           "load": os.getloadavg()[0], "bundled": compare(small, 8, 256, 7), "8B": compare(large, 1, 512, 3)}
    path = ROOT / "benchmarks" / "results" / "ssd.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
