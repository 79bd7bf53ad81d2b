"""Stages: from scores to the candidate that is distilled. Each writes what it adds.

    search      scores, budget -> RUN/search/predicted.json: the candidates, with predicted damage
    measure     the promising ones and random ones, cut -> RUN/search/measured.json, controls.json
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minipuzzle.core.files import write_json
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.evaluate import retrieval
from minipuzzle.evaluate.quality import measure_variants
from minipuzzle.evaluate.retrieval import make_probe
from minipuzzle.pipeline.plan import Estimate, Plan, budget_of
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.grid import random_architectures
from minipuzzle.search.keep import keep_retrieval
from minipuzzle.search.rank import diverse
from minipuzzle.search.space import resolve_space
from minipuzzle.stages.candidates import find_candidates, read_candidates, write_candidates
from minipuzzle.stages.student import cutter_of
from minipuzzle.stages.tasks import ask_weights

CONTROLS = 8  # random architectures that are measured beside the best predicted, to judge the prediction


def search(given: Given) -> list[Path]:
    """All architectures of the space within the budget, ranked by predicted damage."""
    r, arch = given.settings, given.parent.arch
    found = find_candidates(r, arch, resolve_space(dict(r.space), arch), budget_of(r, arch),
                            r.workload.build(), *_scores(given))
    given.update(1, f"{found.points:,} architectures, {found.feasible:,} within the budget")
    folder = given.folder / "search"
    folder.mkdir(exist_ok=True)
    write_candidates(folder / "predicted.json", found.candidates)
    write_json(folder / "space.json", {"points": found.points, "feasible": found.feasible})
    return [folder / "predicted.json", folder / "space.json"]


def _scores(given: Given) -> tuple[LayerScores, WidthCurves]:
    return (LayerScores.read(given.file("scores/layers.csv")),
            WidthCurves.read(given.file("scores/width_curves.csv")))


def measure_candidates(given: Given) -> list[Path]:
    """The best predicted candidates, cut and measured on the blocks that select; and some random
    ones, which cannot win, to judge the prediction by."""
    arch, cutter = given.parent.arch, cutter_of(given)
    chosen = diverse(read_candidates(given.files), given.settings.search.measure)
    controls = _draw_controls(given)
    variants = [cutter.variant(c.architecture, c.kept_layers) for c in (*chosen, *controls)]
    run = given.passes(given.selection_ids(), f"{len(chosen)} candidates")
    whole = cutter.variant(arch, tuple(range(arch.num_layers)))
    found = measure_variants(cutter, whole, variants, run)
    probe = make_probe(arch.vocab_size, given.settings.calibration.probe_context)
    again = given.passes(probe.ids_NT, f"retrieval of {len(chosen)} candidates", part="retrieval")
    retrieved = retrieval.measure_variants(probe, cutter, whole, variants, again)[1:]
    measured = [{**quality, "retrieval": found} for quality, found in zip(found, retrieved, strict=True)]
    asked = given.settings.evaluation
    with given.ranks.together():
        best = sorted(zip(measured, chosen, strict=False), key=lambda pair: (pair[0]["kl"], pair[1].name))
        for i, (quality, c) in enumerate(best[: asked.task_candidates] if asked.tasks and given.ranks.main else []):
            given.update(i / asked.task_candidates, f"{c.name} is asked {', '.join(asked.tasks)}")
            quality["tasks"] = ask_weights(given, c.architecture, cutter.pieces(c.architecture, c.kept_layers))
    folder = given.folder / "search"
    files = [folder / "measured.json", folder / "controls.json"]
    if given.ranks.main:
        write_json(files[0], {c.name: m for c, m in zip(chosen, measured[: len(chosen)], strict=True)})
        write_candidates(files[1], [replace(c, measured=m)
                          for c, m in zip(controls, measured[len(chosen):], strict=True)])
    return files


def _draw_controls(given: Given) -> list[Candidate]:
    """Random architectures within the budget; none where the search does not enumerate them."""
    r, arch = given.settings, given.parent.arch
    if r.search.strategy != "grid":
        return []
    layers, curves = _scores(given)
    space, kept = keep_retrieval(r.search.keep_retrieval, r.workload.context, arch,
                                 resolve_space(dict(r.space), arch), layers)
    return random_architectures(arch, space, budget_of(r, arch), r.workload.build(), kept, curves,
                                r.scores.layer_metric, r.search.damage, CONTROLS, given.seed)


def _measure_estimate(plan: Plan) -> Estimate:
    students = min(plan.recipe.search.measure + CONTROLS, plan.feasible)
    tokens = plan.held_out_tokens + plan.retrieval_tokens
    return Estimate(tokens * (plan.parent_flops + plan.student_flops * students),
                    memory_bytes=plan.layers_bytes)


_LAYERS_AND_WIDTHS = ("score", "curves")
SEARCH = Stage(
    "search", search, lambda plan: Estimate(seconds=1.0),
    settings=("budget", "workload", "space", "scores.layer_metric", "search.damage", "search.keep",
              "search.keep_retrieval"),
    world=("model",), after=_LAYERS_AND_WIDTHS)
MEASURE = Stage(
    "measure", measure_candidates, _measure_estimate,
    settings=("budget", "workload", "space", "scores.layer_metric", "search.strategy", "search.damage",
              "search.measure", "search.keep_retrieval", "surgery.hidden", "evaluation.samples",
              "evaluation.tasks", "evaluation.task_candidates", "evaluation.task_questions",
              "calibration.sequence_length", "calibration.retrieval_context"),
    world=("model", "tokenizer", "evaluation.data", "seed", "precision", "tasks"),
    after=(*_LAYERS_AND_WIDTHS, "search"), shared=True)
