"""Distilling the pruned model against training the same architecture from nothing, with the same
loop.

    python benchmarks/distillation_vs_scratch.py --run RUN --work FOLDER [--times 10 20 40]

RUN is a finished `minipuzzle prune` of the bundled model: its winner is cut again and distilled
with the recipe's settings. From nothing (the Mamba-2 authors' initialisation): next-token loss
alone, a few peak learning rates on the same number of tokens, then the best of them on 10x, 20x,
... as many, each with a cosine of its own, until one is as good as the distilled model. The same
command continues: a finished run is a line of FOLDER/rows.jsonl and is not made again. Writes
benchmarks/results/distillation_vs_scratch.json.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from train_bundled_model import initial_weights  # noqa: E402

from minipuzzle.core.scores import WidthScores  # noqa: E402
from minipuzzle.data.blocks import load_blocks  # noqa: E402
from minipuzzle.distill.loop import distill_model  # noqa: E402
from minipuzzle.distill.settings import TrainSettings  # noqa: E402
from minipuzzle.distill.trained import read_metrics  # noqa: E402
from minipuzzle.evaluate.quality import Reference, measure  # noqa: E402
from minipuzzle.models.module import HybridLM  # noqa: E402
from minipuzzle.models.walk import Model  # noqa: E402
from minipuzzle.models.weights import open_model  # noqa: E402
from minipuzzle.pipeline.machine import hardware, versions  # noqa: E402
from minipuzzle.recipes.schema import Recipe  # noqa: E402
from minipuzzle.search.candidate import Candidate  # noqa: E402
from minipuzzle.surgery.cut import Cutter  # noqa: E402
from minipuzzle.surgery.rotate import Rotation  # noqa: E402
from minipuzzle.verbs.source import bundled_model  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "distillation_vs_scratch.json"
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def as_written(student):
    """The student rounded to bf16, as its folder will hold it."""
    return Model.build(student.family, student.arch,
                       ((n, p.detach().bfloat16().float()) for n, p in student.parameters_by_name().items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--times", type=int, nargs="+", default=[10, 20, 40])
    args = parser.parse_args()
    recipe = Recipe.load("default")
    d = recipe.distillation
    tokens = next(f.parent for f in sorted((args.run / "tokens").glob("*/tokens.json")))
    blocks = load_blocks(tokens, "train", d.sequence_length)
    held = torch.from_numpy(load_blocks(tokens, "held_out", 256).first(recipe.evaluation.samples))
    folder = open_model(bundled_model())
    teacher = Model.load(folder)
    reference = Reference(teacher, held)
    found = [Candidate.from_json(c) for c in json.loads((args.run / "candidates.json").read_text())["candidates"]]
    winner = next(c for c in found if c.chosen)
    scores = args.run / "scores"
    cutter = Cutter(teacher, WidthScores.read(scores / "widths.safetensors"),
                    Rotation.read(scores / "rotation.safetensors"))
    arch = winner.architecture
    result = {"what": __doc__.splitlines()[0], "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
              "versions": versions(), "architecture": arch.pattern, "parameters": winner.cost.parameters,
              "train_tokens_in_corpus": len(blocks.tokens), "corpus_hash": blocks.corpus_hash,
              "held_out_tokens": held.numel(), "teacher_loss": measure(teacher, reference)["loss"],
              "note": "one seed; the learning rate of the runs from nothing is the best of those listed at 1x; "
                      "distillation's is the default recipe's", "runs": []}

    finished = args.work / "rows.jsonl"
    done = [json.loads(line) for line in finished.read_text().splitlines()] if finished.is_file() else []

    def train(name, student, settings, parent):
        for row in done:
            if (row["name"], row["learning_rate"]) == (name, settings.learning_rate):
                result["runs"].append(row)
                return row["loss"]
        looks = max(1, settings.schedule(d.sequence_length).steps // 20)
        begin = time.perf_counter()
        distill_model(student, parent, blocks, settings, args.work / name, evaluate_every=looks,
                      evaluate=lambda s: {"loss": measure(as_written(s), reference)["loss"]},
                      progress=lambda done, loss: None)
        rows = read_metrics(args.work / name)
        row = {"name": name, "tokens": rows[-1]["tokens"], "learning_rate": settings.learning_rate,
               "loss": rows[-1]["eval_loss"], "seconds_of_this_call": round(time.perf_counter() - begin, 1),
               "curve": [[r["tokens"], round(r["eval_loss"], 4)] for r in rows if "eval_loss" in r]}
        result["runs"].append(row)
        with finished.open("a") as file:
            file.write(json.dumps(row) + "\n")
        result["load_average"] = os.getloadavg()
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k != "curve"}), flush=True)
        return row["loss"]

    base = TrainSettings(d.tokens, d.batch_tokens, d.learning_rate, d.temperature)
    goal = train("distilled", HybridLM(folder.family, arch, cutter.cut(arch, winner.kept_layers).by_name()), base,
                 teacher)

    def scratch(name, times, rate):
        settings = dataclasses.replace(base, tokens=times * d.tokens, learning_rate=rate, kl_weight=0.0,
                                       lm_loss_weight=1.0)
        return train(name, HybridLM(folder.family, arch, initial_weights(arch)), settings, None)

    best = min(RATES, key=lambda rate: scratch(f"scratch 1x {rate:g}", 1, rate))
    for times in args.times:
        loss = scratch(f"scratch {times}x", times, best)
        result["answer"] = f"caught up at {times}x" if loss <= goal else f"not within {times}x: {loss:.4f} / {goal:.4f}"
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        if loss <= goal:
            break


if __name__ == "__main__":
    main()
