"""Stages: the importance of layers and widths.

    score       calibration samples -> RUN/scores/layers.csv, widths.safetensors, ...
    curves      width scores, the rotation -> RUN/scores/width_curves.csv, together.csv,
                rotation.safetensors
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minipuzzle.core.files import write_json
from minipuzzle.core.scores import DROPPED, TOGETHER, LayerScores
from minipuzzle.evaluate.retrieval import Retrieval, make_probe, measure_variants
from minipuzzle.families.architecture import Architecture
from minipuzzle.importance.curves import measure_curves, measure_cuts
from minipuzzle.importance.layers import Scored, score_iteratively
from minipuzzle.importance.layers import score as score_all
from minipuzzle.importance.racing import Race
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Whole
from minipuzzle.pipeline.plan import Estimate, Plan
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.recipes.schema import Recipe, SpaceSection
from minipuzzle.search.damage import predict
from minipuzzle.search.keep import LOST, keep_retrieval, wants_retrieval
from minipuzzle.search.space import Space, resolve_space
from minipuzzle.search.together import design
from minipuzzle.stages.notes import parent_notes, unreached_note
from minipuzzle.surgery.rotate import find_rotation

_DROPS = tuple(f"space.{name}" for name in SpaceSection.model_fields if name.startswith("drop_"))

# of calibration, for combinations: what they do is far above their noise
TOGETHER_SAMPLES = 16
CURVE_POINTS = 3  # measured widths per axis; between them the search interpolates


def the_race(settings: Recipe, arch: Architecture) -> Race:
    """How many layers of each kind the search will drop, and how sure of the choice it shall be."""
    drops = resolve_space(dict(settings.space), arch).drops
    return Race({unit: (min(drops[name]), max(drops[name])) for name, unit in arch.drops.items()},
                settings.scores.confidence, settings.scores.layer_metric)


def score_settings(recipe: Recipe) -> tuple[str, ...]:
    """Where all layers are scored alike, the search's question does not decide what is measured."""
    always = ("calibration", "scores.racing", "scores.iterative")
    race = ("scores.confidence", "scores.layer_metric", *_DROPS)
    return always + race if recipe.scores.racing or recipe.scores.iterative else always


def score_layers_and_widths(given: Given) -> list[Path]:
    """One-shot, racing or iterative, as the recipe's `scores` says."""
    for note in parent_notes(given.parent.folder):
        given.say(note)
    folder = given.folder / "scores"
    folder.mkdir(exist_ok=True)
    found = _score(given.settings, given.passes(given.calibration_ids()))
    if note := unreached_note(found.widths):
        given.say(note)
    parent, columns = _score_retrieval(given)
    if given.ranks.main:
        replace(found.layers, table=found.layers.table.assign(**columns)).write(folder / "layers.csv")
        found.widths.write(folder / "widths.safetensors")
        write_json(folder / "scoring.json", {"samples": found.samples, "available": found.available,
                                             "layer_forwards": found.forwards, "retrieval": parent})
    return [folder / name for name in ("layers.csv", "interactions.safetensors", "samples.safetensors",
                                       "widths.safetensors", "scoring.json")]


def _score_retrieval(given: Given) -> tuple[Retrieval, dict[str, list[Any]]]:
    """What the parent finds again in its context, and columns of the layers without each of which
    it was measured."""
    source = given.parent.source
    probe, whole = make_probe(source.arch.vocab_size, given.settings.calibration.probe_context), Whole(source)
    parent, *without = measure_variants(probe, whole, whole.variant(),
                                        [whole.variant({i}) for i in range(source.arch.num_layers)],
                                        given.passes(probe.ids_NT, "retrieval", part="retrieval"))
    return parent, {column: [one[key] for one in without] for key, column in
                    (("kl", "retrieval_kl"), ("kl_stderr", "retrieval_kl_stderr"),
                     ("lost", LOST), ("lost_stderr", f"{LOST}_stderr"))}


def _score(settings: Recipe, run: Pass) -> Scored:
    s = settings.scores
    if s.iterative:
        return score_iteratively(run, the_race(settings, run.source.arch))
    return score_all(run, the_race(settings, run.source.arch) if s.racing else None)


def curve_widths(space: Space, parent: Architecture) -> dict[str, tuple[int, ...]]:
    """The widths of each axis at which curves are measured: spread over the space, its ends among
    them."""
    out = {}
    for axis, values in space.widths.items():
        widths = sorted(w for w in values if w != parent.sizes()[axis])
        count = min(CURVE_POINTS, len(widths))
        places = [round(i * (len(widths) - 1) / max(1, count - 1)) for i in range(count)]
        out[axis] = tuple(widths[p] for p in places)
    return out


def measure_width_curves(given: Given) -> list[Path]:
    """What each width alone costs, and what some cuts do together; before it the rotation of the
    stream, if one is asked for."""
    folder, ids = given.folder / "scores", given.calibration_ids()
    files = [folder / "width_curves.csv"]
    if given.settings.surgery.hidden == "rotate":
        files.append(folder / "rotation.safetensors")
        found = find_rotation(given.parent.source, ids, given.ranks)
        with given.ranks.together():
            if given.ranks.main:
                found.write(files[-1])
    rotation = files[1] if len(files) > 1 else None
    cutter = given.parent.cutter(given.file("scores/widths.safetensors"), rotation)
    arch = given.parent.arch
    space = resolve_space(dict(given.settings.space), arch)
    measured = measure_curves(cutter, curve_widths(space, arch), given.passes(ids))
    names = [*arch.drops, DROPPED, *arch.widths]
    planned = design(arch, space).targets(arch, _orders(given, space))
    few = ids[:: max(1, len(ids) // TOGETHER_SAMPLES)][:TOGETHER_SAMPLES]
    run = given.passes(few, f"{len(planned)} combinations", part="together")
    measured = replace(measured, together=measure_cuts(cutter, planned, run, names))
    if given.ranks.main:
        measured.write(files[0])
    return [*files, folder / TOGETHER]


def _orders(given: Given, space: Space) -> tuple[list[int], ...]:
    """The layers of each kind in the order in which the search lets them go."""
    s, arch = given.settings, given.parent.arch
    kept: LayerScores | None = LayerScores.read(given.file("scores/layers.csv"))
    if hasattr(s, "search"):  # else it keeps nothing, and does not see whether it should
        space, kept = keep_retrieval(s.search.keep_retrieval, s.workload.context, arch, space, kept)
    return predict(arch, space, kept, None, s.scores.layer_metric).orders


def _score_estimate(plan: Plan) -> Estimate:
    walks = plan.parent.num_layers / 2 + 2
    return Estimate((plan.calibration_tokens + plan.retrieval_tokens) * plan.parent_flops * walks,
                    memory_bytes=plan.layers_bytes)


def _curves_estimate(plan: Plan) -> Estimate:
    points = sum(len(w) for w in curve_widths(plan.space, plan.parent).values())
    few = min(TOGETHER_SAMPLES, plan.recipe.calibration.samples) * plan.recipe.calibration.sequence_length
    together = few * (len(design(plan.parent, plan.space).points) + 1)
    return Estimate((plan.calibration_tokens * (points + 1) + together) * plan.parent_flops,
                    memory_bytes=plan.layers_bytes)


SCORE = Stage(
    "score", score_layers_and_widths, _score_estimate, score_settings,
    world=("model", "tokenizer", "calibration.data", "precision"), shared=True)
CURVES = Stage(
    "curves", measure_width_curves, _curves_estimate,
    settings=lambda recipe: (
        "calibration", "surgery.hidden", "scores.layer_metric", "space",
        *(("search.keep_retrieval", "workload.context")
          if wants_retrieval(recipe.search.keep_retrieval, recipe.workload.context) else ())),
    world=("model", "tokenizer", "calibration.data", "precision"), after=("score",), shared=True)
