"""Budgets and workloads: human units in, exact integers out.

    memory=31.7GiB   params=4.5B   kv_cache=0.5x      (0.5x: half of the parent, at the same workload)

Sizes are binary (KiB to TiB), parameters and tokens of training decimal (k, M, B), contexts binary
(k = 1024, M = 1024^2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from minipuzzle.core.devices import find_device
from minipuzzle.core.errors import InputError

# budget key -> (the cost it limits, the units it is written in)
BUDGET_KEYS = {
    "memory": ("memory_bytes", "bytes"),
    "params": ("parameters", "decimal"),
    "active_params": ("active_parameters", "decimal"),
    "kv_cache": ("kv_cache_bytes", "bytes"),
    "flops_per_token": ("flops_per_token", "decimal"),
    "latency": ("latency_ps", "seconds"),
    "throughput": ("token_ps", "rate"),  # at least; counted as the time for each new token
}
FORETOLD = ("latency", "throughput")  # budgets that need a card
_UNITS = {
    "bytes": {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
    "decimal": {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12},
    "binary": {"": 1, "k": 2**10, "m": 2**20},
    "seconds": {"s": 10**12, "ms": 10**9},  # in picoseconds
    "rate": {"tok/s": 1, "ktok/s": 1000},
}
# The exponent has two digits: 1e1000000000 is a number that takes all memory to write out
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,2})?)\s*([A-Za-z/]*)\s*")
LONGEST, LARGEST = 64, 2**63 - 1  # characters of a size, and its value
# Bits of a weight, or of an element of the KV cache. NVFP4: 4 bits + an 8-bit scale for each 16;
# INT4, of weights alone: 4 bits + a 16-bit scale for each 128.
BITS = {"bf16": Fraction(16), "fp8": Fraction(8), "nvfp4": Fraction(9, 2), "int4": Fraction(33, 8)}
KV_BITS = {name: bits for name, bits in BITS.items() if name != "int4"}
ENGINES = ("ideal", "vllm")
STATE_BITS = {"fp32": 32, "bf16": 16}
MOST_SERVED = 10**18  # tokens of context, and sequences at once


def parse_quantity(text: str | int | float, units: str) -> int:
    """An integer from `text` in `units`: bytes, decimal or binary. Rounds down. Raises InputError:
    not a number, above LARGEST, or with a unit of another kind."""
    match = _NUMBER.fullmatch(_short(text))
    unit = match[2].lower() if match else ""
    if match is None or unit not in _UNITS[units]:
        names = {"bytes": "B, KiB, MiB, GiB, TiB", "decimal": "k, M, B, T", "binary": "k, M", "seconds": "s, ms",
                 "rate": "tok/s, ktok/s"}[units]
        raise InputError(f"{text!r} is not a size; write a number with one of the units {names}")
    exact = Fraction(match[1]) * _UNITS[units][unit]
    if units == "rate":  # the time for each token
        exact = 10**12 / exact if exact else Fraction(LARGEST)
    value = int(exact)
    if value > LARGEST:
        raise InputError(f"{text!r} is too large; at most {LARGEST:,} can be counted")
    return value


def _short(text: str | int | float) -> str:
    """The text of a size; InputError if it is longer than LONGEST."""
    written = str(text) if not isinstance(text, int) or abs(text) <= LARGEST else "x" * (LONGEST + 1)
    if len(written) > LONGEST:
        raise InputError(f"a size of more than {LONGEST} characters cannot be read")
    return written


@dataclass(frozen=True)
class Workload:
    """What is served: precisions of weights, KV cache and SSM state, context in tokens, batch."""

    precision: str = "bf16"
    kv_precision: str = "bf16"
    state_precision: str = "fp32"
    keep_16bit: tuple[str, ...] = ()
    context: int = 1024
    batch: int = 1
    engine: str = "ideal"
    device: str | None = None  # a card, that speed is foretold for
    new_tokens: int | None = None  # of the context; an eighth if None

    @property
    def made(self) -> int:
        """Tokens of the context that are generated; the rest is the prompt."""
        return self.new_tokens or max(1, self.context // 8)

    def __post_init__(self) -> None:
        for what, value, known in (("precision", self.precision, BITS), ("kv_precision", self.kv_precision, KV_BITS),
                                   ("state_precision", self.state_precision, STATE_BITS),
                                   ("engine", self.engine, ENGINES)):
            if value not in known:
                raise InputError(f"{what} {value!r}: one of {', '.join(known)}")
        unknown = sorted(set(self.keep_16bit) - set(QUANTISED))
        if unknown:
            raise InputError(f"keep_16bit {', '.join(unknown)}: known are {', '.join(QUANTISED)}")
        for what, number in (("context", self.context), ("batch", self.batch)):
            if not 1 <= number <= MOST_SERVED:
                raise InputError(f"{what} {number} must be 1 to {MOST_SERVED:,}")
        if self.device is not None:
            find_device(self.device)
        if (self.device is not None or self.new_tokens) and not 0 < self.made < self.context:
            raise InputError(f"new_tokens {self.made:,} leave no prompt in a context of {self.context:,}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"keep_16bit": list(self.keep_16bit)}


# The weights that `precision` applies to. Norms, conv, A_log, D, dt_bias, router gates always stay
# 16 bit.
QUANTISED = ("embedding", "lm_head", "mamba", "attention", "ffn", "moe")


@dataclass(frozen=True)
class Budget:
    """Upper bounds of costs: (budget key, integer limit) pairs, and the texts they came from."""

    limits: tuple[tuple[str, int], ...]
    texts: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, texts: Mapping[str, str | int | float], parent_cost: Mapping[str, int]) -> Budget:
        """Read `{"memory": "0.5x"}`; `parent_cost` has the parent's costs at the same workload.

        Raises:
            InputError: an unknown key, a bad number, a factor outside (0, 1], or no budget at all.
        """
        if not texts:
            raise InputError("no budget; give one, for example --budget memory=0.5x")
        limits = []
        for key, text in texts.items():
            if key not in BUDGET_KEYS:
                raise InputError(f"unknown budget {key!r}; known: {', '.join(BUDGET_KEYS)}")
            cost, units = BUDGET_KEYS[key]
            factor = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x\s*", _short(text))
            if factor and key == "throughput":
                if Fraction(factor[1]) < 1:
                    raise InputError(f"budget {key}={text}: at least the parent's is 1x or more")
                limits.append((key, int(parent_cost[cost] / Fraction(factor[1]))))
            elif factor:
                if not 0 < Fraction(factor[1]) <= 1:
                    raise InputError(f"budget {key}={text}: a part of the parent is above 0 and at most 1x")
                limits.append((key, int(Fraction(factor[1]) * parent_cost[cost])))
            elif units in ("bytes", "decimal") and re.fullmatch(r"\s*0?\.[0-9]*[1-9][0-9]*\s*", str(text)):
                raise InputError(f"budget {key}={text} is less than one; write {str(text).strip()}x for a part of the "
                                  "parent, or a unit")
            else:
                limits.append((key, parse_quantity(text, units)))
        return cls(tuple(limits), tuple((k, str(v)) for k, v in texts.items()))

    def exceeded(self, cost: Mapping[str, int]) -> list[str]:
        """The budget keys that `cost` breaks."""
        return [key for key, limit in self.limits if cost[BUDGET_KEYS[key][0]] > limit]

    def to_json(self) -> dict[str, Any]:
        return {key: {"limit": limit, "asked": dict(self.texts)[key]} for key, limit in self.limits}


def split_sweep(text: str) -> list[str]:
    """The values of a budget, each once: "0.5x, 0.6x" -> ["0.5x", "0.6x"]; InputError if none."""
    values = [value for value in dict.fromkeys(part.strip() for part in text.split(",")) if value]
    if not values:
        raise InputError(f"budget {text!r} has no value; write for example 0.5x, or 0.5x,0.6x for a sweep")
    return values


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    return f"{count:.0f} B" if abs(count) < 1024 else _human(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def human_count(count: float) -> str:
    """4489223040 -> '4.489B'."""
    return _human(count, 1000, ("", "k", "M", "B"))


def _human(count: float, step: int, units: tuple[str, ...]) -> str:
    *smaller, largest = units
    for unit in smaller:
        if abs(count) < step:
            return f"{count:.4g}{unit}"
        count /= step
    return f"{count:.4g}{largest}"


def human_length(tokens: int) -> str:
    """8192 -> '8k'."""
    return f"{tokens:,}" if tokens % 1024 else f"{tokens // 1024:,}k"


def human_budget(key: str, value: int) -> str:
    """A budget's value in its own units."""
    if key == "latency":
        return f"{value / 1e12:.4g} s" if value >= 10**12 else f"{value / 1e9:.4g} ms"
    if key == "throughput":
        return f"{1e12 / max(value, 1):.4g} tok/s"
    return human_bytes(value) if BUDGET_KEYS[key][1] == "bytes" else human_count(value)
