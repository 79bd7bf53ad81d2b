"""Candidate: an architecture, what it costs, and its predicted and measured quality side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from minipuzzle.core.budget import human_bytes, human_count
from minipuzzle.costs.cost import Cost
from minipuzzle.families.architecture import Architecture


@dataclass(frozen=True)
class Candidate:
    """A point of the search. `kept_layers` are the parent's 0-based indices.

    predicted: `layers` and `widths` damage (null where not scored), their standard errors, what
    both add `together` where that was measured, and the sum `damage`. measured, before any
    training, on held-out blocks: `loss`, `kl`, `accuracy`, `agreement` and standard errors, and
    `retrieval` (evaluate/retrieval.py). after_distillation: the same after the tournament; of a
    student that diverged `loss` alone, NaN. JSON has null for what is not finite.
    """

    name: str
    architecture: Architecture
    kept_layers: tuple[int, ...]
    cost: Cost
    predicted: dict[str, float | None]
    measured: Mapping[str, Any] | None = None
    after_distillation: Mapping[str, Any] | None = None
    chosen: bool = False

    def __str__(self) -> str:
        return (f"{self.name}: {self.architecture}; {human_count(self.cost.parameters)} parameters, "
                f"{human_bytes(self.cost.memory_bytes)}")

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "architecture": self.architecture.to_json(), "kept_layers": list(self.kept_layers),
                "cost": self.cost.to_json(), "predicted": _finite(self.predicted),
                "measured": _finite(self.measured), "after_distillation": _finite(self.after_distillation),
                "chosen": self.chosen}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Candidate:
        return cls(data["name"], Architecture.from_json(data["architecture"]), tuple(data["kept_layers"]),
                   Cost.from_json(data["cost"]), data["predicted"], data["measured"], data["after_distillation"],
                   data["chosen"])

    def row(self) -> dict[str, Any]:
        """One flat row for candidates.csv."""
        arch, family = self.architecture, self.architecture.family
        out: dict[str, Any] = {"name": self.name, "chosen": self.chosen, "pattern": arch.pattern}
        out |= {f"num_{kind.name}": arch.pattern.count(k) for k, kind in family.kinds.items() if not kind.refuse}
        out |= {n: "/".join(map(str, v)) if isinstance(v, tuple) else v for n, v in arch.sizes().items()
                if n in family.widths}
        out |= self.cost.to_json()
        for prefix, values in (("predicted", self.predicted), ("measured", self.measured or {}),
                               ("after_distillation", self.after_distillation or {})):
            out |= {f"{prefix}_{k}": v for k, v in _flat(values)}
        return out | {"kept_layers": " ".join(map(str, self.kept_layers))}


def _finite(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) with the names of nested ones joined; no lists."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}_{inner}", v) for inner, v in _flat(value))
        elif not isinstance(value, list):
            yield name, value


def to_frame(candidates: list[Candidate]) -> pd.DataFrame:
    """One row per candidate, best first, without the axes that none has."""
    frame = pd.DataFrame([c.row() for c in candidates])
    widths = candidates[0].architecture.family.widths if candidates else {}
    return frame.drop(columns=[name for name in widths if not frame[name].astype(bool).any()])
