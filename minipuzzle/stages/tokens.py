"""Stage: texts to tokens.

    tokenize    data -> RUN/tokens/
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from minipuzzle.core.errors import InputError
from minipuzzle.data.blocks import load_blocks, spread_tokens, tokenize
from minipuzzle.data.corpus import has_end, parse_blend
from minipuzzle.data.held_out import two_parts
from minipuzzle.families.architecture import Architecture
from minipuzzle.pipeline.plan import Estimate, Plan, refit_samples
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.recipes.schema import DATA_SECTIONS, Recipe
from minipuzzle.surgery.refit import check_samples

HELD_OUT_TOKENS = 2**20  # of a source
TOKENS_PER_SECOND = 10**6  # of one process, about


def tokenize_stage(sections: tuple[str, ...] = DATA_SECTIONS) -> Stage:
    """Tokenise what these sections of the recipe read. Only that of all sections is recorded: what
    a verb makes for itself is found again by the next one (data/blocks.py)."""
    return Stage(
        "tokenize", partial(make_tokens, sections=sections), _estimate,
        settings=("calibration.samples", "calibration.sequence_length", "evaluation.samples", "surgery.refit",
                  "distillation.tokens", "distillation.batch_tokens", "distillation.sequence_length",
                  "quantization.distill"),
        world=("model", "tokenizer", *(f"{name}.data" for name in sections)),
        recorded=sections == DATA_SECTIONS)


def _estimate(plan: Plan) -> Estimate:
    """Of sources that go on, what is asked of them; of a file it is not known before it is read."""
    data = {name: getattr(plan.recipe, name).data for name in DATA_SECTIONS}
    limits = tokens_needed(plan.recipe, plan.parent, data)
    tokens = sum(n or 0 for source, splits in limits.items() if not has_end(source)
                 for n in splits.values())
    return Estimate(seconds=5.0 + tokens / TOKENS_PER_SECOND,
                    disk_bytes=tokens * (2 if plan.parent.vocab_size <= 2**16 else 4))


def tokens_needed(settings: Recipe, parent: Architecture,
                  data: Mapping[str, str]) -> dict[str, dict[str, int | None]]:
    """source -> split -> tokens that do for what is read; None: all there are. `data`: section of
    the recipe -> what it reads. Training goes over all of a source that has an end; calibration and
    evaluation spread their blocks over the first `spread_tokens` and HELD_OUT_TOKENS of it."""
    c, d = settings.calibration, settings.distillation
    # two parts, and a quarter more: documents are shared out whole
    held_out = 5 * settings.evaluation.samples * c.sequence_length // 2
    samples = max(c.samples, refit_samples(settings, parent))
    trained = max(d.tokens, settings.quantization.distill)
    whole = {"calibration": spread_tokens(samples, c.sequence_length), "distillation": None}
    train = {"calibration": samples * c.sequence_length,
             "distillation": trained + d.batch_tokens + d.sequence_length}
    out: dict[str, dict[str, int | None]] = {}
    for section, name in data.items():
        for source in parse_blend(name) if section != "distillation" or trained else ():
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
        if section != "distillation" or settings.distillation.tokens or settings.quantization.distill:
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
