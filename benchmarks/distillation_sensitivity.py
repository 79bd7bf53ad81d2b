"""What the settings of a short distillation do on the bundled model, and what a tournament in
lock-step saves.

    python benchmarks/distillation_sensitivity.py --run RUN --work FOLDER [--tokens 60000]

RUN is a finished `minipuzzle prune` of the bundled model: its winner and finalists are cut again.
Every row changes one setting of the default recipe; one seed, the same data. Times are CPU seconds
of one thread. The same command continues. Writes benchmarks/results/distillation_sensitivity.json.
"""

import argparse
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import torch

from minipuzzle.core.scores import WidthScores
from minipuzzle.data.blocks import load_blocks
from minipuzzle.distill.loop import distill_together
from minipuzzle.distill.loss import kl_loss
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.trainer import Pupil
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.models.module import HybridLM
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.candidate import Candidate
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.rotate import Rotation
from minipuzzle.verbs.source import bundled_model

RESULT = Path(__file__).resolve().parent / "results" / "distillation_sensitivity.json"
ROWS = [{}, *({"temperature": t} for t in (0.5, 2.0, 4.0)), *({"lm_loss_weight": w} for w in (0.1, 1.0)),
        *({"learning_rate": r} for r in (1e-3, 4e-3)), *({"top_k": k} for k in (1, 4, 16, 64, 256)),
        *({"precision": p} for p in ("bf16", "fp8"))]
TOURNAMENT_TOKENS = 10_000
CHUNKS = (16, 64, 256, 1024, 2048)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=60_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.load("default")
    d = recipe.distillation
    tokens = next(f.parent for f in sorted((args.run / "tokens").glob("*/tokens.json")))
    blocks = load_blocks(tokens, "train", d.sequence_length)
    held = torch.from_numpy(load_blocks(tokens, "held_out", 256).first(32))
    folder = open_model(bundled_model())
    teacher = Model.load(folder)
    reference = Reference(teacher, held)
    found = [Candidate.from_json(c) for c in json.loads((args.run / "candidates.json").read_text())["candidates"]]
    finalists = sorted((c for c in found if c.after_distillation), key=lambda c: not c.chosen)
    scores = args.run / "scores"
    cutter = Cutter(teacher, WidthScores.read(scores / "widths.safetensors"),
                    Rotation.read(scores / "rotation.safetensors"))
    base = TrainSettings(args.tokens, d.batch_tokens, d.learning_rate)

    def pupil(candidate, place):
        model = cutter.cut(candidate.architecture, candidate.kept_layers)
        return Pupil(HybridLM(folder.family, model.arch, model.by_name()), place)

    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    out = {"what": __doc__.splitlines()[0], "date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "threads": 1,
           "versions": versions(), "tokens": args.tokens, "seed": 0, "held_out_tokens": held.numel(),
           "default": dataclasses.asdict(base), "architecture": finalists[0].architecture.pattern,
           "rows": [r for r in known.get("rows", []) if known["tokens"] == args.tokens]}

    def write():
        RESULT.write_text(json.dumps(out | {"load_average": os.getloadavg()}, indent=1) + "\n")

    # the loss alone, by chunk
    ids = torch.from_numpy(blocks.batch(0, 0, 8))
    hidden = final_hidden(teacher, ids).flatten(0, 1)
    out["chunk_seconds"] = {}
    for chunk in CHUNKS:
        times = []
        for _ in range(3):
            h, w = hidden.clone().requires_grad_(), teacher.head.clone().requires_grad_()
            begin = time.process_time()
            kl_loss(h, w, hidden, teacher.head, chunk=chunk).backward()
            times.append(time.process_time() - begin)
        out["chunk_seconds"][str(chunk)] = round(min(times), 4)

    # the tournament, one after the other and in lock-step
    short = dataclasses.replace(base, tokens=TOURNAMENT_TOKENS)
    for name, groups in (("one_after_the_other", [[c] for c in finalists]), ("lock_step", [finalists])):
        begin = time.process_time()
        for group in groups:
            for c in group:
                shutil.rmtree(args.work / name / c.name, ignore_errors=True)
            distill_together([pupil(c, args.work / name / c.name) for c in group], teacher, blocks, short)
        out[f"tournament_{name}_cpu_seconds"] = round(time.process_time() - begin, 2)
    out["tournament"] = {"finalists": len(finalists), "tokens_each": TOURNAMENT_TOKENS}
    write()

    for change in ROWS:
        if any(row["change"] == change for row in out["rows"]):
            continue
        name = "-".join(f"{k}={v}" for k, v in change.items()) or "default"
        shutil.rmtree(args.work / name, ignore_errors=True)
        student = pupil(finalists[0], args.work / name)
        begin = time.process_time()
        distill_together([student], teacher, blocks, dataclasses.replace(base, **change))
        seconds = time.process_time() - begin
        trained = student.student
        model = Model.build(folder.family, trained.arch, ((n, p.detach().bfloat16().float())
                                                          for n, p in trained.parameters_by_name().items()))
        result = measure(model, reference)
        row = {"change": change, "kl": round(result["kl"], 4), "kl_stderr": round(result["kl_stderr"], 4),
               "loss": round(result["loss"], 4), "cpu_seconds": round(seconds, 1)}
        if "top_k" in change:
            row["cache_bytes_per_token"] = 4 * change["top_k"] + 2
        out["rows"].append(row)
        write()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
