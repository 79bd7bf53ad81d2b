"""Offline, one thread, and the small things on disk that many tests read: a model folder and a
folder of texts."""

from __future__ import annotations

import os

# before anything imports the libraries that read them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from minipuzzle import Recipe

torch.set_num_threads(1)
pytest.register_assert_rewrite("family_contract")
# Examples are the same in every run, and no example fails for being slow on a busy machine.
settings.register_profile("house", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
                          database=None)
# for a search by hand: pytest --hypothesis-profile=many tests/test_hostile.py
settings.register_profile("many", deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck), database=None)
settings.load_profile("house")

WORDS = """the state of a hybrid model is small and its memory does not grow with the text that it reads while attention
keeps every token layers are removed one by one and what is left learns again from its parent def return self import
for in range none true false if else raise error value number list dict"""
DOCUMENTS = 400
RECIPE = """
recipe: 1
budget: {memory: 0.7x}
workload: {context: 128}
calibration: {data: DATA, samples: 4, sequence_length: 32}
space: {drop_mamba: [0, 1], drop_ffn: [0, 1], hidden_size: [16, 32, 8], ffn_size: [24, 48, 12]}
search: {measure: 3, finalists: 2}
evaluation: {data: DATA, samples: 4}
surgery: {hidden: rotate}
distillation:
  {data: DATA, tournament_tokens: 128, tokens: 256, sequence_length: 32, batch_tokens: 64, learning_rate: 3.0e-3}
"""


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 small documents: about 8 of them are held out."""
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    chance, words = random.Random(0), WORDS.split()
    for number in range(DOCUMENTS):
        lines = [" ".join(chance.choices(words, weights=range(len(words), 0, -1), k=chance.randint(4, 12)))
                 for _ in range(chance.randint(6, 14))]
        (folder / f"document-{number:03}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE trained on the texts, as tokenizer.json; token 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((f.read_text() for f in sorted(texts.iterdir())), trainer)
    assert tokenizer.get_vocab_size() == 300
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def model_folder(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face folder in bfloat16 with its tokenizer, a licence and a generation
    config."""
    from tiny import ARCH, trained_like, write_folder

    arch = dataclasses.replace(ARCH, vocab_size=300)
    folder = write_folder(tmp_path_factory.mktemp("model") / "tiny", arch, trained_like(arch, dtype=torch.bfloat16),
                          torch_dtype="bfloat16")
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>",
        "pad_token": "<|end|>", "model_max_length": 1024}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "max_new_tokens": 7}))
    (folder / "LICENSE").write_text("A licence that travels.\n")
    return folder


# a small run, for tests of what happens to runs
# ---------------------------------------------------------------------------------------------------


@contextmanager
def neither_gate_nor_page() -> Iterator[None]:
    """They take most of the time of such a run, and are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minipuzzle.stages.finishing.reload_gate", lambda *given: 0.0)
        patch.setattr("minipuzzle.pages.html.render_html", lambda report: "")
        yield


@pytest.fixture(scope="module")
def without_gate_and_page() -> Iterator[None]:
    with neither_gate_nor_page():
        yield


@pytest.fixture(scope="session")
def recipe(texts: Path) -> Recipe:
    """A whole run of the tiny model in seconds, rotated and trained."""
    from minipuzzle import Recipe

    return Recipe.parse(RECIPE.replace("DATA", str(texts)), "test")


@pytest.fixture(scope="session")
def finished(model_folder: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run. Copy it before you change it."""
    from minipuzzle import prune

    with neither_gate_nor_page():
        return prune(model_folder, recipe, tmp_path_factory.mktemp("runs") / "run").path
