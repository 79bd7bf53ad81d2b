"""Does a model fit on a card: weights and cache as an engine allocates them, against its memory."""

from __future__ import annotations

from typing import Any

from minipuzzle.core.budget import Workload, human_bytes
from minipuzzle.core.devices import Device
from minipuzzle.costs.cost import cost, pages_of
from minipuzzle.costs.paging import UTILISATION
from minipuzzle.families.architecture import Architecture


def fit(arch: Architecture, workload: Workload, device: Device, engine: str = "vllm"
        ) -> dict[str, Any]:
    """What `minipuzzle fit --json` prints; all sizes in bytes.

    `ideal`: nothing is lost to pages, and all of the card is there. `vllm`: costs/paging.py and
    0.92 of the card. Both hold the workspace of costs/cost.py beside weights and cache.

    Raises:
        InputError: a cache beyond what can be counted.
    """
    priced = cost(arch, workload)
    out: dict[str, Any] = {"device": device.name, "engine": engine, "workload": workload.to_json(),
                           "weights_bytes": priced.weights_bytes,
                           "ideal_cache_bytes": priced.kv_cache_bytes + priced.mamba_state_bytes}
    if engine == "vllm":
        pages = pages_of(arch, workload)
        cache = int(pages.cache_bytes) * workload.batch
        available = int(device.memory_bytes * UTILISATION)
        out |= {name: int(getattr(pages, name)) for name in
                ("block_tokens", "page_bytes", "group_layers", "padding_layers")}
    else:
        cache, available = out["ideal_cache_bytes"], device.memory_bytes
    needed = priced.weights_bytes + cache + priced.workspace_bytes
    native = workload.precision == "bf16" or workload.precision in device.flops
    return out | {"cache_bytes": cache, "workspace_bytes": priced.workspace_bytes,
                  "needed_bytes": needed, "available_bytes": available,
                  "fits": needed <= available, "computes_natively": native}


def sentences(found: dict[str, Any], device: Device) -> list[str]:
    """The same for people."""
    rows = [("weights", f"{human_bytes(found['weights_bytes'])} at {found['workload']['precision']}"),
            ("cache", human_bytes(found["cache_bytes"])),
            ("workspace", human_bytes(found["workspace_bytes"])),
            ("available", f"{human_bytes(found['available_bytes'])} of {device.label}")]
    if found["engine"] == "vllm":
        rows[1] = ("cache", f"{rows[1][1]} in pages of {found['block_tokens']:,} tokens; "
                            f"{human_bytes(found['ideal_cache_bytes'])} without paging, "
                            f"{found['padding_layers']} empty layers")
        rows[3] = ("available", f"{rows[3][1]} ({UTILISATION:.0%} of it)")
    left = found["available_bytes"] - found["needed_bytes"]
    rows.append(("fits", f"yes, {human_bytes(left)} left" if left >= 0 else
                 f"no, {human_bytes(-left)} too large"))
    if not found["computes_natively"]:
        rows.append(("note", f"{device.label} has no {found['workload']['precision']} arithmetic; "
                             "weights take this room, products run at a higher precision"))
    return [f"{what:<12}{text}" for what, text in rows]


