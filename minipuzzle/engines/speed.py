"""Throughput foretold for `fit`: costs/speed.py, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipuzzle.core.budget import Workload
from minipuzzle.core.devices import Device
from minipuzzle.core.errors import InputError
from minipuzzle.costs.cost import speed_model
from minipuzzle.costs.speed import MOST_BATCH, times
from minipuzzle.engines.fit import fit
from minipuzzle.families.architecture import Architecture


def foretell(arch: Architecture, workload: Workload, device: Device, new_tokens: int) -> dict[str, Any]:
    """Tokens per second of `workload.batch` sequences, whose last `new_tokens` of the context are
    made: prefill alone, decoding alone, and new tokens over the time of both.

    Raises:
        InputError: as many new tokens as the context has, or more.
    """
    prompt = workload.context - new_tokens
    if prompt < 1 or new_tokens < 1:
        raise InputError(f"{new_tokens:,} new tokens do not fit into a context of {workload.context:,} "
                         "with a prompt; raise --context")
    asked = replace(workload, new_tokens=new_tokens)
    found = times(speed_model(arch, asked), asked, device)
    batch, decode = workload.batch, float(new_tokens * found.step)
    prefill = batch * float(found.prompt)
    return {"prompt_tokens": prompt, "new_tokens": new_tokens, "batch": batch,
            "prefill_tokens_per_second": batch * prompt / prefill,
            "decode_tokens_per_second": batch * new_tokens / decode,
            "new_tokens_per_second": batch * new_tokens / float(found.latency),
            "bound_by": "compute" if prefill > decode else "bandwidth"}


def sentences(told: dict[str, Any], device: Device) -> list[str]:
    """The same for people."""
    return [f"{'throughput':<12}{told['new_tokens_per_second']:,.0f} new tokens/s (a forecast): "
            f"{told['batch']} sequences of {told['prompt_tokens']:,} + {told['new_tokens']:,} tokens; "
            f"prefill {told['prefill_tokens_per_second']:,.0f}, decoding "
            f"{told['decode_tokens_per_second']:,.0f} tokens/s; at most {told['largest_batch']} fit"]


def largest_batch(arch: Architecture, workload: Workload, device: Device, engine: str = "vllm") -> int:
    """The most sequences that fit; 0 if not one does."""
    def fits(batch: int) -> bool:
        return bool(fit(arch, replace(workload, batch=batch), device, engine)["fits"])

    low, high = 0, MOST_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
