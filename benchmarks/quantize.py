"""`minipuzzle quantize` with the real modelopt; `make test-quantize` runs this in an environment of
its own.

The bundled model to each precision, on the standard library, nvfp4 again after quantisation-aware
distillation, and the small model with experts. With names of cases only these are made again.
Each run passes the gate, and its size is explained to the byte; both raise otherwise. What is
asserted here is that every precision stays close to 16 bit, and that training helps.
-> benchmarks/results/quantize.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from minipuzzle import Recipe
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.verbs.quantize import quantize
from minipuzzle.verbs.source import bundled_model

ROOT = Path(__file__).parents[1]
CASES: dict[str, dict[str, Any]] = {
    "fp8": {"precision": "fp8"},
    "fp8, KV cache too": {"precision": "fp8", "kv_precision": "fp8"},
    "fp8, four layers at each end at 16 bit": {"precision": "fp8", "keep_ends": 4},
    "nvfp4": {"precision": "nvfp4"},
    "nvfp4, trained": {"precision": "nvfp4", "distill": "200k"},
    "int4": {"precision": "int4"},
    "fp8, with experts": {"precision": "fp8", "kv_precision": "fp8"},
}
MOST_KL = {"fp8": 0.02, "nvfp4": 0.06, "int4": 0.06}  # nats


def main() -> None:
    path = ROOT / "benchmarks" / "results" / "quantize.json"
    names = sys.argv[1:] or list(CASES)
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())["models"] if sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            begin = time.perf_counter()
            settings = {f"quantization.{key}": value for key, value in CASES[name].items()}
            settings |= {"distillation.learning_rate": 1e-4, "workload.keep_16bit": ["embedding", "lm_head"]}
            folder = ROOT / "tests" / "data" / "moe" if "experts" in name else bundled_model()
            data = quantize(folder, Recipe().with_overrides(settings=settings), Path(work) / name)
            found[name] = {key: data[key] for key in ("quant_algo", "before", "after", "gate_difference", "size",
                                                      "distilled_tokens", "notes")}
            found[name]["seconds"] = round(time.perf_counter() - begin, 1)
            print(name, found[name], flush=True)
            assert 0 < data["after"]["kl"] < MOST_KL[data["precision"]], data["after"]
    assert found["nvfp4, trained"]["after"]["kl"] < found["nvfp4"]["after"]["kl"]
    about = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
             "versions": versions() | {"nvidia-modelopt": metadata.version("nvidia-modelopt")}, "models": found}
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
