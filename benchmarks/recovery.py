"""Recovery before training: select, rotate, refit and both, before and after distillation, at equal
parameters.

    python benchmarks/recovery.py [--phase before sums short gentle long] [--cases ...] [--methods
    ...] [--work DIR]

Cuts of the bundled model; every method makes the same architecture of the same layers. `before`: KL
and loss before
training, 3 calibration seeds. `sums`: the rotation by differently weighted sums. `short`: 200 KD
steps of 1k tokens,
looked at every 25. `gentle`: the same with a quarter of the learning rate. `long`: 600 steps of 1k
tokens (the budget of the default recipe). `full`: 1000 steps of 4k tokens, for as many --seeds as
asked for (the seed draws the calibration and the training data); the methods of a case learn
together from one teacher pass. Every finished row is a line of WORK/rows.jsonl, and is not made
again; benchmarks/results/recovery.json is written from them after every phase.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import tempfile
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from minipuzzle.core.budget import Workload
from minipuzzle.core.scores import LayerScores
from minipuzzle.costs.cost import cost
from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.writer import tokenize
from minipuzzle.distill.loop import TrainSettings, distill_model, distill_together
from minipuzzle.distill.trained import read_metrics
from minipuzzle.distill.trainer import Pupil
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.families.architecture import Architecture
from minipuzzle.importance.layers import score_layers
from minipuzzle.importance.widths import score_widths
from minipuzzle.models.forward import block, embed
from minipuzzle.models.module import HybridLM
from minipuzzle.models.walk import Model, batches, floats_per_sample
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.surgery import refit
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.refit import GAIN
from minipuzzle.surgery.rotate import Rotation, find_rotation
from minipuzzle.verbs.source import bundled_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "recovery.json"
SEEDS, SAMPLES, LENGTH, BATCH, RATE = (0, 1, 2), 64, 256, 1024, 2e-3
SHORT, LONG, EVERY, HELD_OUT = 200, 600, 25, 32
FULL, FULL_BATCH = 1000, 4096
# the layers that the default recipe kept (benchmarks/results/main_job.json); it narrows the FFN too
CHOSEN = (0, 1, 2, 4, 9, 11, 13, 14, 19, 21)
# widths, and how many layers go (the lowest by KL), or which stay
CASES: dict[str, tuple[dict[str, int], int | tuple[int, ...]]] = {
    "hidden 3/4": ({"hidden_size": 72}, 0),
    "all at half the memory": ({"hidden_size": 72, "ffn_size": 384, "mamba_num_heads": 12}, 6),
    "12 layers removed": ({}, CHOSEN),
    "4 layers removed": ({}, 4),
    "FFN 1/2": ({"ffn_size": 256}, 0),
    "FFN 1/4": ({"ffn_size": 128}, 0),
    "Mamba heads 3/4": ({"mamba_num_heads": 12}, 0),
    "hidden 7/8": ({"hidden_size": 84}, 0),
    "hidden 5/8": ({"hidden_size": 60}, 0),
    "FFN 3/4": ({"ffn_size": 384}, 0),
}
METHODS = ("select", "rotate", "refit", "rotate + refit", "scalar", "rotate + scalar")
# the ridge with the least held-out error, in place of the largest that keeps most of the gain; only
# if asked for
LEAST = ("refit, least error", "rotate + refit, least error")
SUMS = ("equal", "energy", "readers")


class Bench:
    """The bundled model, its data, and the rows made so far."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.path = work, work / "rows.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []
        folder = open_model(bundled_model())
        self.parent = Model.load(folder)
        tokenize("stdlib", AutoTokenizer.from_pretrained(str(folder.path), model_max_length=2**62), work / "tokens",
                 folder.fingerprint)
        self.train = load_blocks(work / "tokens", "train", LENGTH)
        self.held_out = torch.from_numpy(load_blocks(work / "tokens", "held_out", LENGTH).first(HELD_OUT))
        self.cutters: dict[tuple[int, bool], Cutter] = {}

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.parent, self.held_out)

    @cached_property
    def layer_scores(self) -> np.ndarray:
        path = self.work / "layers.csv"
        if not path.is_file():
            score_layers(self.parent, torch.from_numpy(self.train.first(SAMPLES))).write(path)
        return LayerScores.read(path).metric("kl")

    def case(self, name: str) -> tuple[Architecture, tuple[int, ...]]:
        widths, layers = CASES[name]
        if isinstance(layers, int):
            gone = np.argsort(self.layer_scores, kind="stable")[:layers].tolist()
            layers = tuple(i for i in range(self.parent.arch.num_layers) if i not in gone)
        return dataclasses.replace(self.parent.arch.keep(layers), **widths), layers

    def calibration(self, seed: int) -> torch.Tensor:
        """64 blocks drawn by a seed that training does not use."""
        return torch.from_numpy(self.train.batch(100 + seed, 0, SAMPLES))

    def cutter(self, seed: int, rotates: bool) -> Cutter:
        if (seed, rotates) not in self.cutters:
            ids = self.calibration(seed)
            scores = score_widths(self.parent, ids)
            self.cutters[seed, False] = Cutter(self.parent, scores)
            self.cutters[seed, True] = Cutter(self.parent, scores, find_rotation(self.parent, ids))
        return self.cutters[seed, rotates]

    def make(self, case: str, method: str, seed: int) -> tuple[Model, dict[str, Any]]:
        """The cut model before training, and what to write about it."""
        target, kept = self.case(case)
        cutter = self.cutter(seed, "rotate" in method)
        begin = time.process_time()
        about: dict[str, Any] = {}
        if "refit" in method:
            refit.GAIN = 1.0 if method in LEAST else GAIN
            model, fits = cutter.refitted(target, kept, self.calibration(seed))
            about = {"refused": sum(f.ridge is None for f in fits), "ridges": [f.ridge for f in fits]}
        else:
            model = cutter.cut(target, kept)
            if "scalar" in method:
                model = scaled(self.parent, model, kept, self.calibration(seed))
        return model, about | {"cpu_seconds": round(time.process_time() - begin, 2)}

    def add(self, key: dict[str, Any], values: dict[str, Any]) -> None:
        row = key | values
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k not in ("curve", "ridges")}), flush=True)

    def has(self, key: dict[str, Any]) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)


def methods(case: str) -> list[str]:
    """Rotation does nothing where the hidden size stays; the scalar is for removed layers."""
    widths, layers = CASES[case]
    out = ["select", "rotate", "refit", "rotate + refit"] if "hidden_size" in widths else ["select", "refit"]
    out += LEAST[: len(out) // 2]
    return [*out, "rotate + scalar" if "hidden_size" in widths else "scalar"] if layers else out


@torch.no_grad()
def streams(model: Model, ids_NT: torch.Tensor) -> torch.Tensor:
    """[L + 1, tokens] norm of the stream before each layer and at the end."""
    parts = []
    for ids in batches(ids_NT, floats_per_sample(model.arch, ids_NT.shape[1])):
        x = embed(model.family, model.top, ids)
        norms = [x.norm(dim=-1).flatten()]
        for kind, weights in zip(model.arch.pattern, model.layers, strict=True):
            x = x + block(model.arch, kind, weights, x)
            norms.append(x.norm(dim=-1).flatten())
        parts.append(torch.stack(norms))
    return torch.cat(parts, 1)


@torch.no_grad()
def second_moments(model: Model, ids_NT: torch.Tensor) -> np.ndarray:
    """[L + 1, D, D] of the normalised stream at each norm, as `find_rotation` sums them up."""
    out = torch.zeros(model.arch.num_layers + 1, model.arch.hidden_size, model.arch.hidden_size, dtype=torch.float64)
    for ids in batches(ids_NT, floats_per_sample(model.arch, ids_NT.shape[1])):
        x = embed(model.family, model.top, ids)
        for i in range(len(out)):
            n = x.flatten(0, 1).double()
            n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + model.arch.norm_eps)
            out[i] += n.T @ n
            if i < model.arch.num_layers:
                x = x + block(model.arch, model.arch.pattern[i], model.layers[i], x)
    return (out / ids_NT.numel()).numpy()


def weighted_rotation(moments_LDD: np.ndarray, weights_L: np.ndarray) -> Rotation:
    """`find_rotation` with a weight for each norm in the sum."""
    values, vectors = np.linalg.eigh(np.tensordot(weights_L, moments_LDD, 1))
    basis = vectors[:, np.argsort(-values, kind="stable")]
    return Rotation(basis, np.einsum("dk,lde,ek->lk", basis, moments_LDD, basis))


def scaled(parent: Model, small: Model, kept: tuple[int, ...], ids_NT: torch.Tensor) -> Model:
    """One scalar for each cut (Prune&Comp, arXiv:2507.18212): what is removed would have made the
    stream alpha times as long, so everything that was written before the cut is made alpha times as
    large."""
    norms = streams(parent, ids_NT)
    factor = torch.ones(len(kept) + 1)  # of the writers of student block j; [0] is the embeddings'
    ends = (*kept, parent.arch.num_layers)
    for j in range(len(ends)):
        before = ends[j - 1] + 1 if j else 0
        if ends[j] > before:  # layers before .. ends[j] - 1 are gone
            factor[: j + 1] *= (norms[ends[j]] / norms[before]).mean()
    top = dict(small.top)
    name = "backbone.embeddings.weight"
    top[name] = top[name] * factor[0]
    layers = []
    for j, (kind, weights) in enumerate(zip(small.arch.pattern, small.layers, strict=True)):
        writers = [name for name, _ in small.family.kinds[kind].writes]
        layers.append({**weights, **{name: weights[name] * factor[j + 1] for name in writers}})
    return dataclasses.replace(small, top=top, layers=tuple(layers))


def before(bench: Bench, cases: list[str], chosen: list[str]) -> None:
    for case in cases:
        parameters = cost(bench.case(case)[0], Workload()).parameters
        for method in (m for m in methods(case) if m in chosen):
            for seed in SEEDS:
                key = {"phase": "before", "case": case, "method": method, "seed": seed}
                if not bench.has(key):
                    model, about = bench.make(case, method, seed)
                    assert sum(t.numel() for t in model.by_name().values()) == parameters
                    bench.add(key, {"parameters": parameters} | measure(model, bench.reference) | about)


def sums(bench: Bench, cases: list[str], chosen: list[str]) -> None:
    """The rotation's sum over norms weighted equally, by the stream's energy, and by the readers'
    norms."""
    family, arch = bench.parent.family, bench.parent.arch
    for seed in SEEDS:
        ids = bench.calibration(seed)
        plain = bench.cutter(seed, False).scores
        readers = [sum(float((w[n] * w[norm]).square().sum()) for norm, names in table.items() for n in names)
                   for w, table in [*((w, family.kinds[k].reads)
                                      for w, k in zip(bench.parent.layers, arch.pattern, strict=True)),
                                    (bench.parent.top, family.top_readers())]]
        energies = streams(bench.parent, ids).square().mean(1).double().numpy()
        weights = {"equal": np.ones(len(readers)), "energy": energies, "readers": np.array(readers)}
        moments = second_moments(bench.parent, ids)
        for name in SUMS:
            rotation = weighted_rotation(moments, weights[name])
            for hidden in (84, 72, 60):
                for refits in (False, True):
                    key = {"phase": "sums", "sum": name, "hidden_size": hidden, "refit": refits, "seed": seed}
                    if bench.has(key) or (refits and seed):
                        continue
                    cutter = Cutter(bench.parent, plain, rotation)
                    target, kept = dataclasses.replace(arch, hidden_size=hidden), tuple(range(arch.num_layers))
                    model = cutter.refitted(target, kept, ids)[0] if refits else cutter.cut(target, kept)
                    bench.add(key, measure(model, bench.reference))


def train(bench: Bench, cases: list[str], chosen: list[str], phase: str, steps: int, rate: float = RATE) -> None:
    for case in cases:
        for method in (m for m in methods(case) if m in chosen):
            key = {"phase": phase, "case": case, "method": method, "seed": 0}
            if bench.has(key):
                continue
            model, _ = bench.make(case, method, 0)
            student = HybridLM(model.family, model.arch, model.by_name())
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as scratch:
                distill_model(student, bench.parent, bench.train, TrainSettings(steps * BATCH, BATCH, rate),
                              Path(scratch), evaluate=lambda s: measure(as_model(s), bench.reference),
                              evaluate_every=EVERY * steps // SHORT)
                values = curve_of(model, bench, read_metrics(Path(scratch)))
            bench.add(key, values | {"seconds": round(time.perf_counter() - begin, 1)})


def full(bench: Bench, cases: list[str], chosen: list[str], seeds: list[int]) -> None:
    """The long training. Continues in WORK/full; the methods of a case and seed are trained in
    lock-step."""
    for seed, case in itertools.product(seeds, cases):
        keys = {method: {"phase": "full", "case": case, "method": method, "seed": seed}
                for method in methods(case) if method in chosen}
        keys = {method: key for method, key in keys.items() if not bench.has(key)}
        if not keys:
            continue
        models = [bench.make(case, method, seed)[0] for method in keys]
        pupils = [Pupil(HybridLM(model.family, model.arch, model.by_name()),
                        bench.work / "full" / f"{case} {method} {seed}".replace("/", "of"),
                        evaluate=lambda s: measure(as_model(s), bench.reference)) for model, method in
                  zip(models, keys, strict=True)]
        distill_together(pupils, bench.parent, bench.train,
                         TrainSettings(FULL * FULL_BATCH, FULL_BATCH, RATE, seed=seed), evaluate_every=EVERY)
        for model, pupil, key in zip(models, pupils, keys.values(), strict=True):
            bench.add(key, curve_of(model, bench, read_metrics(pupil.folder)))


def curve_of(model: Model, bench: Bench, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The looks of a training that began with `model`, and the last of them."""
    begin = {k: v for k, v in measure(model, bench.reference).items() if k in ("loss", "kl")}
    curve = [{"step": 0, "tokens": 0} | begin]
    curve += [{"step": r["step"], "tokens": r["tokens"], "loss": r["eval_loss"], "kl": r["eval_kl"]}
              for r in metrics if "eval_loss" in r]
    return {"curve": curve, "loss": curve[-1]["loss"], "kl": curve[-1]["kl"]}


def as_model(student: HybridLM) -> Model:
    tensors = ((n, p.detach()) for n, p in student.parameters_by_name().items())
    return Model.build(student.family, student.arch, tensors)


def reach(curve: list[dict[str, Any]], loss: float) -> float | None:
    """Tokens at which the curve first comes down to `loss`, linear between looks; None if it does
    not."""
    for a, b in itertools.pairwise(curve):
        if a["loss"] <= loss:
            return float(a["tokens"])
        if b["loss"] <= loss:
            return float(a["tokens"] + (b["tokens"] - a["tokens"]) * (a["loss"] - loss) / (a["loss"] - b["loss"]))
    return None


def write(bench: Bench) -> None:
    def run(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["phase"], row["case"], row["seed"]

    plain = {run(r): r["loss"] for r in bench.rows if "curve" in r and r["method"] == "select"}
    rows = [r | {"tokens_to_plain": reach(r["curve"], plain[run(r)])}
            if "curve" in r and run(r) in plain else r for r in bench.rows]
    whole = measure(bench.parent, bench.reference)
    out = {"what": "recovery before training, bundled model", "date": time.strftime("%Y-%m-%d"),
           "hardware": hardware(), "threads": torch.get_num_threads(), "versions": versions(),
           "corpus_hash": bench.train.corpus_hash,
           "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
           "parent": {"loss": whole["loss"], "parameters": cost(bench.parent.arch, Workload()).parameters},
           "settings": {"calibration_samples": SAMPLES, "sequence_length": LENGTH, "batch_tokens": BATCH,
                        "learning_rate": RATE, "short_steps": SHORT, "long_steps": LONG, "full_steps": FULL,
                        "full_batch_tokens": FULL_BATCH, "held_out_blocks": HELD_OUT},
           "cases": {n: {"architecture": t.to_json(), "kept_layers": list(k)}
                     for n, (t, k) in ((n, bench.case(n)) for n in CASES)},
           "rows": rows}
    RESULTS.write_text(json.dumps(out, indent=1) + "\n")


def tables() -> str:
    """The tables of docs/results.md, from the committed results."""
    rows = json.loads(RESULTS.read_text())["rows"]

    def find(**key: Any) -> list[dict[str, Any]]:
        return [row for row in rows if all(row.get(k) == v for k, v in key.items())]

    def spread(found: list[dict[str, Any]]) -> str:
        kl = [row["kl"] for row in found]
        return "" if not kl else f"{np.mean(kl):.3f}" + (f" ± {np.ptp(kl) / 2:.3f}" if len(kl) > 1 else "")

    lines = []
    for phase in ("before", "short", "gentle", "long", "full"):
        looks = {"before": [], "long": [75, 150, 300], "full": [100, 250, 500]}.get(phase, [50, 100])
        lines += [f"\n{phase}\n", "| cut | parameters | method | KL before | "
                  + "".join(f"KL at {step} | " for step in looks) + ("KL at the end | loss | tokens to plain's end |"
                                                                     if looks else "loss |"),
                  "|" + "---|" * (5 + len(looks) + 2 * bool(looks))]
        for case in CASES:
            for method in (*METHODS, *LEAST):
                found = find(phase=phase, case=case, method=method)
                if not found:
                    continue
                loss = f"{np.mean([row['loss'] for row in found]):.3f}"
                size = next(iter(row["parameters"] for row in find(phase="before", case=case)), 0)
                cells = [case, f"{size / 1e6:.2f}M", method]
                if looks:
                    points = [point for row in found for point in row["curve"]]
                    at = [spread([p for p in points if p["step"] == step]) for step in (0, *looks)]
                    reached = [row.get("tokens_to_plain") for row in found]
                    cells += [*at, spread(found), loss, ", ".join("not reached" if tokens is None else
                                                                  f"{tokens / 1000:.0f}k" for tokens in reached)]
                else:
                    cells += [spread(found), loss]
                lines.append("| " + " | ".join(cells) + " |")
    lines += ["\nsums\n", "| sum over norms | hidden 7/8 | 3/4 | 5/8 | 3/4, refitted |", "|---|---|---|---|---|"]
    for name in SUMS:
        lines.append("| " + " | ".join([name, *(spread(find(phase="sums", sum=name, hidden_size=h, refit=False))
                                                for h in (84, 72, 60)),
                                        spread(find(phase="sums", sum=name, hidden_size=72, refit=True))]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = {"before": before, "sums": sums, "short": partial(train, phase="short", steps=SHORT),
              "gentle": partial(train, phase="gentle", steps=SHORT, rate=RATE / 4),
              "long": partial(train, phase="long", steps=LONG)}
    parser.add_argument("--phase", nargs="*", choices=[*phases, "full"], default=list(phases))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *LEAST), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the phase `full`")
    parser.add_argument("--tables", action="store_true", help="print the tables of the committed results")
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    args = parser.parse_args()
    if args.tables:
        print(tables())
        return
    phases["full"] = partial(full, seeds=args.seeds)
    bench = Bench(args.work)
    for phase in args.phase:
        phases[phase](bench, args.cases, args.methods)
        write(bench)


if __name__ == "__main__":
    main()
