"""Stage: texts to tokens.

    tokenize    data -> RUN/tokens/
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from minipuzzle.core.budget import human_count
from minipuzzle.core.errors import InputError
from minipuzzle.core.files import read_sealed
from minipuzzle.data.blocks import AGAIN, load_blocks, spread_tokens
from minipuzzle.data.corpus import has_end, made_before, parse_blend
from minipuzzle.data.encoding import cores
from minipuzzle.data.held_out import read_tokens, two_parts
from minipuzzle.data.writer import check_made, tokenize
from minipuzzle.families.architecture import Architecture
from minipuzzle.pipeline.plan import Estimate, Plan, refit_samples
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.recipes.schema import DATA_SECTIONS, Recipe
from minipuzzle.surgery.refit import check_samples

TOKENS_PER_SECOND = 7 * 10**5  # of one core, about: benchmarks/results/tokenizing.json


def tokenize_stage(sections: tuple[str, ...] = DATA_SECTIONS) -> Stage:
    """Tokenise what these sections of the recipe read. Only that of all sections is recorded: what
    a verb makes for itself is found again by the next one (data/blocks.py)."""
    return Stage(
        "tokenize", partial(make_tokens, sections=sections), _estimate,
        settings=("calibration.samples", "calibration.sequence_length", "evaluation.samples", "surgery.refit",
                  "distillation.data", "distillation.tokens", "distillation.batch_tokens",
                  "distillation.sequence_length", "distillation.loss_on", "distillation.phases.tokens",
                  "distillation.phases.batch_tokens", "distillation.phases.sequence_length", "quantization.distill"),
        world=("model", "tokenizer", *(f"{name}.data" for name in sections)),
        recorded=sections == DATA_SECTIONS)


def _estimate(plan: Plan) -> Estimate:
    """Of sources that go on, what is asked of them; of a file it is not known before it is read."""
    limits = tokens_needed(plan.recipe, plan.parent,
                           {name: getattr(plan.recipe, name).data for name in DATA_SECTIONS})
    tokens = sum(n or 0 for source, splits in limits.items() if not has_end(source)
                 for n in splits.values())
    return Estimate(seconds=5.0 + tokens / TOKENS_PER_SECOND / cores(),
                    disk_bytes=tokens * (2 if plan.parent.vocab_size <= 2**16 else 4))


def tokens_needed(settings: Recipe, parent: Architecture,
                  data: Mapping[str, str]) -> dict[str, dict[str, int | None]]:
    """source of text -> split -> tokens that do for what is read; None: all there are. `data`:
    section of the recipe -> its data. Training goes over all of a source that has an end;
    calibration and evaluation spread their blocks over the first `spread_tokens` and `read_tokens`
    of it."""
    c = settings.calibration
    # two parts, and a quarter more: documents are shared out whole
    held_out = 5 * settings.evaluation.samples * c.sequence_length // 2
    samples = max(c.samples, refit_samples(settings, parent))
    # data, the tokens to train on of a source that has an end, and of one that goes on
    reads: list[tuple[str, int | None, int | None]] = []
    if "calibration" in data:
        reads.append((data["calibration"], spread_tokens(samples, c.sequence_length), samples * c.sequence_length))
    if "evaluation" in data:
        reads.append((data["evaluation"], None, None))
    if "distillation" in data:
        reads += [(name, None, tokens) for name, _, tokens in trained_on(settings, data["distillation"])]
    out: dict[str, dict[str, int | None]] = {}
    for name, whole, tokens in reads:
        for source in parse_blend(name):
            if made_before(source):
                continue
            ends, limits = has_end(source), out.setdefault(source, {})
            limits["held_out"] = (
                read_tokens(settings.evaluation.samples, c.sequence_length) if ends else held_out)
            if tokens is not None:
                limits["train"] = whole if ends else (limits.get("train") or 0) + tokens
    return out


def trained_on(settings: Recipe, data: str) -> list[tuple[str, int, int]]:
    """(data, length of a sequence, tokens and a batch more) of each phase of the training and of
    that with rounded weights. `data`: of the section."""
    d, q = settings.distillation, settings.quantization
    parts = d.parts("data", "sequence_length", "tokens", "batch_tokens") if d.tokens else []
    rounded = (data, d.sequence_length, q.distill, d.batch_tokens)
    if q.distill and (d.phases or q.distill > d.tokens):
        parts = [*parts, rounded] if d.phases else [rounded]
    return [(name, length, tokens + batch + length) for name, length, tokens, batch in parts]


def make_tokens(given: Given, sections: tuple[str, ...]) -> list[Path]:
    """Of each source the splits that are read; tokens made before are compared, and stay where they
    are.

    Raises:
        InputError: a part of the data is too short, or the tokenizer is not the model's.
        CorruptArtifact: tokens made before were changed.
    """
    settings, files = given.settings, []
    needed = tokens_needed(settings, given.parent.arch, {n: given.source(n) for n in sections})
    for i, (source, limits) in enumerate(sorted(needed.items())):
        def say(documents: int, tokens: int, part: float, i: int = i, source: str = source) -> None:
            given.update((i + part) / len(needed), f"{source}: {documents:,} documents, {human_count(tokens)} tokens")

        folder = given.token_folder(source)
        # the main process alone is here: the others leave it the machine's cores
        tokenize(source, given.tokenizer, folder, given.tokenizer_hash, say,
                 enough=limits, least=2 * settings.calibration.sequence_length, workers=cores())
        names = read_sealed(folder / "tokens.json", AGAIN)["hashes"]
        files += [folder / "tokens.json", *(folder / name for name in names)]
    made = {source for name in _names(given, sections) for source in parse_blend(name) if made_before(source)}
    for source in sorted(made):
        check_made(given.token_folder(source), given.tokenizer_hash, len(given.tokenizer), given.parent.folder.path)
    for section in sections:
        if section == "distillation":
            for data, length, _ in trained_on(settings, given.source(section)):
                _check_tokens(given, section, data, length)
        else:
            _check_tokens(given, section, given.source(section), settings.calibration.sequence_length)
    return files


def _names(given: Given, sections: tuple[str, ...]) -> list[str]:
    """What the data of these sections are called, those of phases too."""
    names = [given.source(section) for section in sections]
    return names + ([data for data, _, _ in trained_on(given.settings, given.source("distillation"))]
                    if "distillation" in sections else [])


def _check_tokens(given: Given, section: str, data: str, length: int) -> None:
    """Raise InputError if the section's data do not do; what was made of them is removed."""
    settings, arch = given.settings, given.parent.arch
    split = "held_out" if section == "evaluation" else "train"
    for source in parse_blend(data):
        folder = given.token_folder(source)
        try:
            blocks = load_blocks(folder, split, length,
                                 settings.distillation.loss_on if section == "distillation" else "all")
            if split == "held_out":
                two_parts(blocks, 1)
            largest = read_sealed(folder / "tokens.json", AGAIN)["largest"][split]
            if largest >= arch.vocab_size:
                raise InputError(f"the tokenizer of {given.parent.folder.path} makes token {largest}, the model has "
                                  f"{arch.vocab_size}; put the model's own tokenizer there")
        except InputError:
            if not made_before(source):
                shutil.rmtree(folder)
            raise
    if section == "calibration" and settings.surgery.refit == "ridge":
        check_samples(arch, len(given.blocks(section, split, length)), length)
