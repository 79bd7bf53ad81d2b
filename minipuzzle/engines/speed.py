"""Throughput foretold from a roofline: FLOPs against the card's peak, bytes against its bandwidth.

    prefill   FLOPs of the prompt / (peak x COMPUTE)
    a step    max(FLOPs of a token for each sequence / (peak x COMPUTE),
                  (weights that the batch touches + KV cache + state, read and written) / (bandwidth x STREAM))

COMPUTE and STREAM are assumptions, not fitted. Published on H100s at 65,536 tokens in and 1,024 out
(Nemotron-H, arXiv:2504.03624, figure 7): tests/test_fit.py has how far off this is. Ratios of
models on one card are closer than absolute numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipuzzle.core.budget import Workload
from minipuzzle.core.devices import Device
from minipuzzle.core.errors import InputError
from minipuzzle.costs.cost import cost
from minipuzzle.engines.fit import fit
from minipuzzle.families.architecture import Architecture

COMPUTE, STREAM = 0.4, 0.7  # of the peak and of the bandwidth
MOST_BATCH = 1024


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
    batch, peak = workload.batch, device.flops.get(workload.precision, device.flops["bf16"]) * COMPUTE
    read = cost(arch, replace(workload, context=prompt, batch=1))
    prefill = batch * prompt * read.prefill_flops_per_token / peak
    middle = cost(arch, replace(workload, context=workload.context - new_tokens // 2))
    moved = (middle.weights_bytes * _touched(arch, middle.parameters, middle.active_parameters, batch)
             + middle.kv_cache_bytes + 2 * middle.mamba_state_bytes)
    step = max(batch * middle.flops_per_token / peak, moved / (device.bandwidth * STREAM))
    seconds = prefill + new_tokens * step
    return {"prompt_tokens": prompt, "new_tokens": new_tokens, "batch": batch,
            "prefill_tokens_per_second": batch * prompt / prefill,
            "decode_tokens_per_second": batch / step,
            "new_tokens_per_second": batch * new_tokens / seconds,
            "bound_by": "compute" if prefill > new_tokens * step else "bandwidth"}


def sentences(told: dict[str, Any], device: Device) -> list[str]:
    """The same for people."""
    return [f"{'throughput':<12}{told['new_tokens_per_second']:,.0f} new tokens/s (a forecast): "
            f"{told['batch']} sequences of {told['prompt_tokens']:,} + {told['new_tokens']:,} tokens; "
            f"prefill {told['prefill_tokens_per_second']:,.0f}, decoding "
            f"{told['decode_tokens_per_second']:,.0f} tokens/s; at most {told['largest_batch']} fit"]


def _touched(arch: Architecture, parameters: int, active: int, batch: int) -> float:
    """Part of the weights that a step reads: an expert only if a token of the batch goes there, with
    all experts as likely."""
    sizes = arch.sizes()
    experts, used = sizes.get("num_experts") or 0, sizes.get("experts_per_token") or 0
    if parameters == active or used >= experts:
        return 1.0
    idle = parameters - active  # of one token
    return 1 - idle / parameters * (1 - used / experts) ** (batch - 1)


def largest_batch(arch: Architecture, workload: Workload, device: Device, engine: str = "vllm") -> int:
    """The most sequences that fit; 0 if not one does."""
    def fits(batch: int) -> bool:
        return bool(fit(arch, replace(workload, batch=batch), device, engine)["fits"])

    low, high = 0, MOST_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
