"""Stages: texts to tokens; the importance of layers and widths.

    tokenize    data -> RUN/tokens/
    score       calibration samples -> RUN/scores/layers.csv, widths.safetensors, ...
    curves      width scores, the rotation -> RUN/scores/width_curves.csv, rotation.safetensors
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from minipuzzle.core.errors import InputError
from minipuzzle.core.files import write_json
from minipuzzle.data.blocks import load_blocks, spread_tokens, tokenize
from minipuzzle.data.corpus import has_end, parse_blend
from minipuzzle.data.held_out import two_parts
from minipuzzle.families.architecture import Architecture
from minipuzzle.importance.curves import measure_curves
from minipuzzle.importance.layers import Scored, score_iteratively
from minipuzzle.importance.layers import score as score_all
from minipuzzle.importance.racing import Race
from minipuzzle.models.passes import Pass
from minipuzzle.models.weights import ModelFolder
from minipuzzle.pipeline.plan import Estimate, Plan, refit_samples
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.recipes.schema import DATA_SECTIONS, Recipe, SpaceSection
from minipuzzle.search.space import Space, resolve_space
from minipuzzle.surgery.refit import check_samples
from minipuzzle.surgery.rotate import find_rotation

_DROPS, _WIDTHS = (tuple(f"space.{name}" for name in SpaceSection.model_fields if name.startswith("drop_") is drop)
                   for drop in (True, False))

HELD_OUT_TOKENS = 2**20  # of a source
CURVE_POINTS = 3  # measured widths per axis; between them the search interpolates

# tokens ----------------------------------------------------------------------------------------


def tokenize_stage(sections: tuple[str, ...] = DATA_SECTIONS) -> Stage:
    """Tokenise what these sections of the recipe read. Only that of all sections is recorded: what
    a verb makes for itself is found again by the next one (data/blocks.py)."""
    return Stage(
        "tokenize", partial(make_tokens, sections=sections), lambda plan: Estimate(seconds=5.0),
        settings=("calibration.samples", "calibration.sequence_length", "evaluation.samples", "surgery.refit",
                  "distillation.tokens", "distillation.batch_tokens", "distillation.sequence_length"),
        world=("model", "tokenizer", *(f"{name}.data" for name in sections)),
        recorded=sections == DATA_SECTIONS)


def tokens_needed(settings: Recipe, parent: Architecture,
                  data: Mapping[str, str]) -> dict[str, dict[str, int | None]]:
    """source -> split -> tokens that do for what is read; None: all there are. `data`: section of
    the recipe -> what it reads. Training goes over all of a source that has an end; calibration and
    evaluation spread their blocks over the first `spread_tokens` and HELD_OUT_TOKENS of it."""
    c, d = settings.calibration, settings.distillation
    # two parts, and a quarter more: documents are shared out whole
    held_out = 5 * settings.evaluation.samples * c.sequence_length // 2
    samples = max(c.samples, refit_samples(settings, parent))
    whole = {"calibration": spread_tokens(samples, c.sequence_length), "distillation": None}
    train = {"calibration": samples * c.sequence_length,
             "distillation": d.tokens + d.batch_tokens + d.sequence_length}
    out: dict[str, dict[str, int | None]] = {}
    for section, name in data.items():
        for source in parse_blend(name) if section != "distillation" or d.tokens else ():
            ends, limits = has_end(source), out.setdefault(source, {})
            limits["held_out"] = max(HELD_OUT_TOKENS, 2 * held_out) if ends else held_out
            if section in train:
                limits["train"] = whole[section] if ends else (limits.get("train") or 0) + train[section]
    return out


def make_tokens(given: Given, sections: tuple[str, ...]) -> list[Path]:
    """Of each source the splits that are read.

    Raises:
        InputError: a part of the data is too short, or the tokenizer is not the model's.
    """
    settings, files = given.settings, []
    needed = tokens_needed(settings, given.parent.arch, {n: given.source(n) for n in sections})
    for i, (source, limits) in enumerate(sorted(needed.items())):
        def say(done: int, i: int = i, source: str = source) -> None:
            given.update(i / len(needed), f"{source}: {done} documents")

        folder = given.token_folder(source)
        tokenize(source, given.tokenizer, folder, given.tokenizer_hash, say,
                 enough=limits, least=2 * settings.calibration.sequence_length)
        files += [folder / "tokens.json", *(folder / f"{split}.bin" for split in limits)]
    for section in sections:
        if section != "distillation" or settings.distillation.tokens:
            _check_tokens(given, section)
    return files


def _check_tokens(given: Given, section: str) -> None:
    """Raise InputError if the section's data do not do; what was made of them is removed."""
    settings, arch = given.settings, given.parent.arch
    length = (settings.distillation if section == "distillation" else settings.calibration).sequence_length
    split = "held_out" if section == "evaluation" else "train"
    for source in parse_blend(given.source(section)):
        folder = given.token_folder(source)
        try:
            blocks = load_blocks(folder, split, length)
            if split == "held_out":
                two_parts(blocks, 1)
            largest = int(blocks.tokens.max())
            if largest >= arch.vocab_size:
                raise InputError(f"the tokenizer of {given.parent.folder.path} makes token {largest}, the model has "
                                  f"{arch.vocab_size}; put the model's own tokenizer there")
        except InputError:
            shutil.rmtree(folder)
            raise
    if section == "calibration" and settings.surgery.refit == "ridge":
        check_samples(arch, len(given.blocks(section, split, length)), length)


# importance ------------------------------------------------------------------------------------


def the_race(settings: Recipe, arch: Architecture) -> Race:
    """How many layers of each kind the search will drop, and how sure of the choice it shall be."""
    drops = resolve_space(dict(settings.space), arch).drops
    return Race({unit: (min(drops[name]), max(drops[name])) for name, unit in arch.family.drops.items()},
                settings.scores.confidence, settings.scores.layer_metric)


def score_settings(recipe: Recipe) -> tuple[str, ...]:
    """Where all layers are scored alike, the search's question does not decide what is measured."""
    always = ("calibration", "scores.racing", "scores.iterative")
    race = ("scores.confidence", "scores.layer_metric", *_DROPS)
    return always + race if recipe.scores.racing or recipe.scores.iterative else always


def score_layers_and_widths(given: Given) -> list[Path]:
    """One-shot, racing or iterative, as the recipe's `scores` says."""
    if warning := zero_warning(given.parent.folder):
        given.say(warning)
    folder = given.folder / "scores"
    folder.mkdir(exist_ok=True)
    found = _score(given.settings, given.passes(given.calibration_ids()))
    if given.ranks.main:
        found.layers.write(folder / "layers.csv")
        found.widths.write(folder / "widths.safetensors")
        write_json(folder / "scoring.json", {"samples": found.samples, "available": found.available,
                                             "layer_forwards": found.forwards})
    return [folder / name for name in ("layers.csv", "interactions.safetensors", "samples.safetensors",
                                       "widths.safetensors", "scoring.json")]


def zero_warning(folder: ModelFolder) -> str:
    """Names the parent's matrices that are all zero; empty if there are none.

    Raises:
        CorruptArtifact: all are.
    """
    zero = folder.zero_matrices()
    if not zero:
        return ""
    names = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
    return f"all zero in the parent: {names}; look whether its weights are whole"


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
    """What each width alone costs; before it the rotation of the stream, if one is asked for."""
    folder, ids = given.folder / "scores", given.calibration_ids()
    files = [folder / "width_curves.csv"]
    if given.settings.surgery.hidden == "rotate":
        files.append(folder / "rotation.safetensors")
        if given.ranks.main:
            find_rotation(given.parent.source, ids).write(files[-1])
        given.ranks.barrier()
    rotation = files[1] if len(files) > 1 else None
    cutter = given.parent.cutter(given.file("scores/widths.safetensors"), rotation)
    space = resolve_space(dict(given.settings.space), given.parent.arch)
    measured = measure_curves(cutter, curve_widths(space, given.parent.arch), given.passes(ids))
    if given.ranks.main:
        measured.write(files[0])
    return files


def _score_estimate(plan: Plan) -> Estimate:
    walks = plan.parent.num_layers / 2 + 2
    return Estimate(plan.calibration_tokens * plan.parent_cost.flops_per_token * walks, memory_bytes=plan.layers_bytes)


def _curves_estimate(plan: Plan) -> Estimate:
    points = sum(len(w) for w in curve_widths(plan.space, plan.parent).values())
    return Estimate(plan.calibration_tokens * plan.parent_cost.flops_per_token * (points + 1),
                    memory_bytes=plan.layers_bytes)


SCORE = Stage(
    "score", score_layers_and_widths, _score_estimate, score_settings,
    world=("model", "tokenizer", "calibration.data"), shared=True)
CURVES = Stage(
    "curves", measure_width_curves, _curves_estimate,
    settings=("calibration", "surgery.hidden", *_WIDTHS),
    world=("model", "tokenizer", "calibration.data"), after=("score",), shared=True)
