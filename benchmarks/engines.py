"""The folders in llama.cpp: `make test-engines` builds it once and runs this.

The bundled model, what a short prune makes of it, and the small model with experts are converted to
GGUF. In float32 llama.cpp must say the same as we do: the log-probability of every next token to
1e-3, and the perplexity to 1e-4 of itself. What q8_0 and q4_k_m cost is told beside it.
-> benchmarks/results/engines.json
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from minipuzzle import Recipe, prune
from minipuzzle.data.tokenizer import load_tokenizer
from minipuzzle.engines import gguf
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.verbs.source import bundled_model

ROOT = Path(__file__).parents[1]
SAMPLES, TOKENS = 8, 256
LIMIT = 1e-3
SHORT = {"calibration.samples": 16, "evaluation.samples": 8, "search.measure": 4, "search.finalists": 1,
         "distillation.tokens": "20k", "distillation.tournament_tokens": "10k"}


def compare(folder: Path, work: Path) -> dict[str, Any]:
    text = "\n".join(p.read_text() for p in sorted((ROOT / "minipuzzle").rglob("*.py"))[:30])
    ids = torch.tensor(load_tokenizer(folder)(text)["input_ids"][: SAMPLES * TOKENS]).reshape(SAMPLES, TOKENS)
    model = Model.load(open_model(folder))
    every = torch.log_softmax((final_hidden(model, ids) @ model.head.T).double(), -1)
    ours = every[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    out: dict[str, Any] = {"tokens": ids.numel(), "perplexity": math.exp(-ours.mean())}
    for kind in gguf.TYPES:
        begin, file = time.perf_counter(), work / f"{kind}.gguf"
        gguf.convert(folder, file, kind)
        said = gguf.log_probabilities(file, ids.tolist())
        theirs, last = (torch.tensor(said[name], dtype=torch.float64) for name in ("tokens", "last"))
        out[kind] = {"bytes": file.stat().st_size, "perplexity": math.exp(-theirs.mean()),
                     "largest_difference": float((ours - theirs).abs().max()),
                     "largest_difference_of_a_whole_row": float((every[:, -1] - last).abs().max()),
                     "seconds": round(time.perf_counter() - begin, 1)}
    exact = out["f32"]
    assert exact["largest_difference"] < LIMIT, exact
    assert exact["largest_difference_of_a_whole_row"] < LIMIT, exact
    assert abs(exact["perplexity"] / out["perplexity"] - 1) < 1e-4, exact
    return out


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        pruned = prune(None, Recipe().with_overrides(settings=SHORT), work / "run").model_path
        folders = {"bundled": bundled_model(), "bundled, pruned to half": pruned,
                   "with experts": ROOT / "tests/data/moe"}
        for name, folder in folders.items():
            found[name] = compare(Path(folder), work)
            print(name, found[name], flush=True)
    about = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
             "versions": versions() | {"llama-cpp-python": gguf.VERSION}, "cache": "float32", "models": found}
    path = ROOT / "benchmarks" / "results" / "engines.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
