"""Whether a refactor changed a number: hashes of all that some small runs compute.

    python benchmarks/same_numbers.py --out before.json
    ... change the code ...
    python benchmarks/same_numbers.py --against before.json

Runs `minipuzzle prune` as a user does, on one thread: a tiny random model with a loud SSM in three
ways, and the bundled model with few tokens. Hashes scores, candidates, training losses and the
written model; seconds and versions are left out. Two machines may differ in the last bit, so
compare on one.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "minipuzzle" / "bundled" / "model"
SIZES = {
    "hybrid_override_pattern": "M-M*-MM*-M-", "num_hidden_layers": 11, "hidden_size": 32,
    "intermediate_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
    "ssm_state_size": 8, "conv_kernel": 4, "chunk_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}
FEW = {"calibration.samples": "8", "calibration.sequence_length": "64", "evaluation.samples": "6",
       "search.measure": "6", "search.finalists": "2", "distillation.sequence_length": "64",
       "distillation.batch_tokens": "256", "distillation.tournament_tokens": "1024",
       "distillation.tokens": "3072", "budget.memory": "0.6x"}
WORDS = "layer state head channel for in def return self import none true false model"
# name -> (settings, whether the bundled model is pruned, and not the tiny one)
CASES: dict[str, tuple[dict[str, str], bool]] = {
    "tiny": ({}, False),
    "tiny, iterative, selected": ({"scores.iterative": "true", "surgery.hidden": "select",
                                   "scores.layer_metric": "mse"}, False),
    "tiny, racing, refitted": ({"scores.racing": "true", "surgery.refit": "ridge",
                                "search.damage": "additive"}, False),
    "bundled": ({"calibration.sequence_length": "128", "calibration.samples": "16",
                 "evaluation.samples": "8", "search.measure": "8",
                 "distillation.sequence_length": "128", "distillation.batch_tokens": "1024",
                 "distillation.tournament_tokens": "4096", "distillation.tokens": "12288"}, True),
}


def write_tiny(folder: Path) -> None:
    """A model whose blocks all move the stream, with the bundled model's tokenizer."""
    folder.mkdir()
    config = json.loads((TOKENIZER / "config.json").read_text()) | SIZES
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    from transformers import NemotronHConfig, NemotronHForCausalLM

    shapes = {n: p.shape for n, p in NemotronHForCausalLM(NemotronHConfig(**config)).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in sorted(shapes.items()):
        value = torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            value = value.abs() + 0.5
        elif name.endswith("dt_bias"):
            value = value - 3.0
        elif "norm" in name or name.endswith(".D"):
            value = 1.0 + 0.3 * value
        elif len(shape) > 1 and "embeddings" not in name:
            value = value * 1.2 * shape[-1] ** -0.5
        weights[name.replace("model.", "backbone.", 1)] = value.bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_texts(folder: Path) -> None:
    folder.mkdir()
    chance = random.Random(0)
    words = WORDS.split()
    for i in range(300):
        lines = [" ".join(chance.choices(words, range(1, len(words) + 1), k=9)) for _ in range(12)]
        (folder / f"{i:03}.txt").write_text("\n".join(lines) + "\n")


def prune(name: str, scratch: Path) -> Path:
    """Run a case as a user does; its folder."""
    settings, bundled = CASES[name]
    out = scratch / name.replace(", ", "-")
    command = [sys.executable, "-m", "minipuzzle", "prune", "-q", "-o", str(out)]
    command += [] if bundled else [str(scratch / "tiny-model"), "--data", str(scratch / "texts")]
    for key, value in (FEW | settings).items():
        command += ["--set", f"{key}={value}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    return out


def hashes(run: Path) -> dict[str, str]:
    """What the run computed -> a short hash."""
    report = json.loads((run / "report.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in row.items() if "second" not in k and k != "time"} for row in metrics]
    with (run / "candidates.csv").open() as file:
        candidates = list(csv.DictReader(file))
    result = {k: v for k, v in report["result"].items() if isinstance(v, (int, float))}
    return {
        "layer scores": _hash((run / "scores" / "layers.csv").read_text()),
        "width scores": _hash(_tensors(run / "scores" / "widths.safetensors")),
        "width curves": _hash((run / "scores" / "width_curves.csv").read_text()),
        "candidates": _hash(candidates),
        "training": _hash(losses),
        "weights": _hash({f.name: _tensors(f) for f in sorted((run / "model").glob("*.safetensors"))}),
        "config": _hash(json.loads((run / "model" / "config.json").read_text())),
        "result": _hash(result),
    }


def _tensors(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return {name: _hash((str(file.get_tensor(name).dtype), file.get_tensor(name).double().tolist()))
                for name in sorted(file.keys())}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Where the hashes go; left out: stdout.")
    parser.add_argument("--against", type=Path, help="Hashes to compare with; exit 1 if some differ.")
    parser.add_argument("--only", choices=sorted(CASES), action="append", help="This case. Repeatable.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_tiny(scratch / "tiny-model")
        write_texts(scratch / "texts")
        found = {case: hashes(prune(case, scratch)) for case in args.only or CASES}
    text = json.dumps(found, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    elif not args.against:
        print(text)
    if args.against:
        before = json.loads(args.against.read_text())
        wrong = [f"{case}: {what}" for case, values in found.items() for what, value in values.items()
                 if before[case].get(what) != value]
        print("\n".join(wrong) or f"the same numbers in {len(found)} runs")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
