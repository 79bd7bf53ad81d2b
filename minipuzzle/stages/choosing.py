"""Stages: from scores to the candidate that is distilled. Each writes what it adds.

    search      scores, budget -> RUN/search/predicted.json: the candidates, with predicted damage
    measure     the promising ones, their neighbours and random ones, cut -> RUN/search/measured.json,
                moves.json, controls.json
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minipuzzle.core.files import write_json
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.evaluate import retrieval
from minipuzzle.evaluate.quality import measure_variants
from minipuzzle.evaluate.retrieval import make_probe
from minipuzzle.pipeline.plan import Estimate, Plan, budget_of
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.damage import predict
from minipuzzle.search.grid import random_architectures
from minipuzzle.search.keep import keep_retrieval
from minipuzzle.search.moves import ROUNDS, Neighbourhood, improved
from minipuzzle.search.rank import diverse, rank
from minipuzzle.search.space import resolve_space
from minipuzzle.stages.candidates import find_candidates, read_candidates, write_candidates
from minipuzzle.stages.student import cutter_of
from minipuzzle.stages.tasks import ask_weights

BlockKL = dict[str, list[float]]
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
    """The best predicted candidates, cut and measured on the blocks that select; neighbours of the
    best of them; and random ones, which cannot win, to judge the prediction by."""
    chosen, controls = diverse(read_candidates(given.files), given.settings.search.measure), _draw_controls(given)
    measured, kls = _measured(given, [*chosen, *controls])
    best, others = measured[: len(chosen)], measured[len(chosen) :]
    moves = _follow(given, best, kls) if given.settings.search.moves else []
    tasks = _asked(given, [*best, *moves])
    best, moves = ([replace(c, measured={**(c.measured or {}), **tasks.get(c.name, {})}) for c in some]
                   for some in (best, moves))
    folder = given.folder / "search"
    files = [folder / "measured.json", folder / "controls.json", folder / "moves.json"]
    if given.ranks.main:
        write_json(files[0], {c.name: c.measured for c in best})
        write_candidates(files[1], others)
        write_candidates(files[2], moves)
    return files


def _measured(given: Given, candidates: list[Candidate], part: str = "") -> tuple[list[Candidate], BlockKL]:
    """Each in two passes, one for what it finds again in the context; with the KL of each block by
    name."""
    arch, cutter = given.parent.arch, cutter_of(given)
    variants = [cutter.variant(c.architecture, c.kept_layers) for c in candidates]
    whole = cutter.variant(arch, tuple(range(arch.num_layers)))
    run = given.passes(given.selection_ids(), f"{len(candidates)} candidates", part)
    found = measure_variants(cutter, whole, variants, run, by_block=True, teacher=given.other_teacher)
    probe = make_probe(arch.vocab_size, given.settings.calibration.probe_context)
    again = given.passes(probe.ids_NT, f"retrieval of {len(candidates)} candidates", f"{part}retrieval")
    retrieved = retrieval.measure_variants(probe, cutter, whole, variants, again)[1:]
    out, kls = list[Candidate](), BlockKL()
    for c, quality, seen in zip(candidates, found, retrieved, strict=True):
        kls[c.name] = quality.pop("kls")
        del quality["losses"]
        out.append(replace(c, measured=quality | {"retrieval": seen}))
    return out, kls


def _asked(given: Given, measured: list[Candidate]) -> dict[str, dict[str, Any]]:
    """What the best by KL answer, in the main process: name -> `tasks`."""
    asked, cutter, out = given.settings.evaluation, cutter_of(given), dict[str, dict[str, Any]]()
    with given.ranks.together():
        some = rank(measured)[: asked.task_candidates] if asked.tasks and given.ranks.main else []
        for i, c in enumerate(some):
            given.update(i / len(some), f"{c.name} is asked {', '.join(asked.tasks)}")
            found = ask_weights(given, c.architecture, cutter.pieces(c.architecture, c.kept_layers))
            out[c.name] = {"tasks": found}
    return out


def _follow(given: Given, measured: list[Candidate], kls: BlockKL) -> list[Candidate]:
    """Local moves from the best, measured: at most search.moves, in rounds, until the best is no
    better beyond its error."""
    r, arch, out = given.settings, given.parent.arch, list[Candidate]()
    layers, curves = _scores(given)
    space, kept = keep_retrieval(r.search.keep_retrieval, r.workload.context, arch,
                                 resolve_space(dict(r.space), arch), layers)
    damage = predict(arch, space, kept, curves, r.scores.layer_metric, r.search.damage)
    where = Neighbourhood(arch, space, budget_of(r, arch), r.workload.build(), damage,
                          frozenset() if kept is None else kept.keep)
    for number in range(1, ROUNDS + 1):
        before = rank([*measured, *out])
        near = where.around(before, r.search.moves * number // ROUNDS - len(out))
        if not near:
            break
        found, more = _measured(given, [replace(c, name=f"m{len(out) + i}") for i, c in enumerate(near, 1)],
                                f"moves-{number}")
        out, kls = out + found, kls | more
        if not improved(kls[rank([*measured, *out])[0].name], kls[before[0].name]):
            break
    return out


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
    search = plan.recipe.search
    students = min(search.measure + CONTROLS, plan.feasible) + search.moves
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
              "search.measure", "search.moves", "search.keep_retrieval", "surgery.hidden", "evaluation.samples",
              "evaluation.tasks", "evaluation.task_candidates", "evaluation.task_questions",
              "calibration.sequence_length", "calibration.retrieval_context"),
    world=("model", "teacher", "tokenizer", "evaluation.data", "seed", "precision", "tasks"),
    after=(*_LAYERS_AND_WIDTHS, "search"), shared=True)
