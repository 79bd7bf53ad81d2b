"""What `inspect` shows on a screen: tables, and the layer string in the colours of the kinds."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minipuzzle.core.budget import Workload, human_bytes, human_count
from minipuzzle.families import registry
from minipuzzle.families.architecture import Architecture

COLORS = dict(zip(registry.kinds(), cycle(("bright_blue", "dark_orange", "green", "magenta")), strict=False))
MEMORY = (("weights", "weights_bytes"), ("KV cache", "kv_cache_bytes"), ("Mamba state", "mamba_state_bytes"))


def layer_string(pattern: str) -> Text:
    """M-M*-, each letter in the colour of its kind."""
    return Text.assemble(*((kind, f"bold {COLORS.get(kind, '')}") for kind in pattern))


def print_inspection(arch: Architecture, workload: Workload, data: dict[str, Any]) -> None:
    """`costs.cost.inspect` as tables on stdout; colours only on a terminal."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{arch.model_type}: {arch}"))
    console.print(layer_string(arch.pattern), "\n")
    counts, memory = data["parameters"], data["memory"]
    kinds = {kind.name: letter for letter, kind in registry.kinds().items()}
    table = _table("parameters", "layers", "count", "share")
    for name, count in counts.items():
        if count and name not in ("total", "active", "mtp"):
            kind = kinds.get(name, "")
            layers = str(arch.pattern.count(kind)) if kind else ""
            table.add_row(Text(name, COLORS.get(kind, "")), layers, f"{count:,}", f"{count / counts['total']:.1%}")
    table.add_row("total", str(arch.num_layers), f"{counts['total']:,}", "", style="bold")
    console.print(table)
    if counts["active"] < counts["total"]:
        console.print(f" {counts['active']:,} active, that is used for one token")
    if counts["mtp"]:
        console.print(f" apart from it {counts['mtp']:,} for multi-token prediction")
    table = _table("memory", "size", "share")
    for label, key in MEMORY:
        table.add_row(label, human_bytes(memory[key]), f"{memory[key] / memory['total_bytes']:.1%}")
    table.add_row("total", human_bytes(memory["total_bytes"]), "", style="bold")
    console.print("", table)
    console.print(f" at {workload.precision}, KV {workload.kv_precision}, state {workload.state_precision}, context "
                  f"{workload.context:,}, batch {workload.batch}; workspace {human_bytes(data['workspace_bytes'])} on "
                  "top, at the peak")
    console.print(f" FLOPs: {human_count(data['flops_per_token'])} to decode a token at the end of the context, "
                  f"{human_count(data['prefill_flops_per_token'])} a token of the prompt")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold", show_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
