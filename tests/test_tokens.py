"""Tokens: made by any number of processes, made before, and of chats."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from distributed import Counted
from safetensors.torch import load_file, save_file

from minipuzzle import Recipe
from minipuzzle.cli import main
from minipuzzle.core.errors import InputError, ResourceError
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.data import encoding
from minipuzzle.data.blocks import TokenBlocks, load_blocks
from minipuzzle.data.held_out import read_tokens, two_parts
from minipuzzle.data.tokenizer import encode, load_tokenizer
from minipuzzle.data.writer import tokenize
from minipuzzle.distill.trainer import Batch
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.world import World

FILES = ("held_out.bin", "tokens.json", "train.bin")
CHATML = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|stop|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
MARKED = """{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|stop|>{% endgeneration %}{{ '\n' }}
{%- else %}{{ m.content }}<|stop|>
{% endif %}{% endfor %}"""
# what an assistant said before the last turn is shortened, as templates do that drop its thoughts
REWRITES = """{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else m.content[:3] }}
{% endfor %}"""


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer(model_folder)


@pytest.fixture(scope="module")
def rows(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 rows: short, empty, long, with what is a token of the vocabulary, and with half an emoji."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = [file.read_text() for file in sorted(texts.iterdir())]
    odd = ["", "a <|end|> b", "cut \ud83d", "naïve 日本 \U0001f600", "\n\n", "word " * 30_000]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*words, *odd, *reversed(words)]))
    return path


@pytest.fixture(scope="module")
def alone(rows: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    tokenize(str(rows), tokenizer, folder, "id")
    return folder


def same(one: Path, other: Path, names: tuple[str, ...] = FILES) -> bool:
    return sorted(p.name for p in one.iterdir() if p.name != ".lock") == sorted(names) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("enough", [None, {"train": 20_000, "held_out": 200}])
def test_tokens_do_not_depend_on_how_many_processes_made_them(
        rows: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: dict[str, int | None] | None) -> None:
    started: list[Any] = []
    start = encoding._start
    monkeypatch.setattr(encoding, "_start", lambda settings: started.append(start(settings)) or started[-1])
    monkeypatch.setattr(encoding, "ALONE", 2**12)
    for workers in (1, 2, 3):
        tokenize(str(rows), tokenizer, tmp_path / str(workers), "id", enough=enough, workers=workers)
        assert same(tmp_path / str(workers), tmp_path / "1")
    assert len(started) == 2 + 3
    assert all(child.poll() is not None for child in started)
    done = json.loads((tmp_path / "1" / "tokens.json").read_text())["documents"]
    assert done == 806 if enough is None else 128 <= done < 500


def test_processes_make_the_tokens_that_transformers_makes(rows: Path, alone: Path, tokenizer: Any) -> None:
    every = [json.loads(line)["text"].encode("utf-8", "replace").decode() for line in rows.open()]
    wanted = encode(tokenizer, every)
    found = np.concatenate([np.fromfile(alone / f"{split}.bin", np.uint16) for split in ("train", "held_out")])
    assert len(found) == sum(map(len, wanted)) + len(wanted)
    assert np.array_equal(np.sort(found), np.sort(np.concatenate([*wanted, [0] * len(wanted)])))


KILLED = """
import os, signal, sys
from pathlib import Path
from minipuzzle.data import encoding, writer
from minipuzzle.data.tokenizer import load_tokenizer
writer._SAVE_EVERY_S, encoding.ALONE = 0.0, 2**12
def progress(documents, tokens, part):
    if documents >= 320:
        os.kill(os.getpid(), signal.SIGKILL)
writer.tokenize(sys.argv[1], load_tokenizer(Path(sys.argv[2])), Path(sys.argv[3]), "id", progress, workers=2)
"""


def test_a_killed_tokenizing_goes_on_with_another_number_of_processes(
        rows: Path, alone: Path, model_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tokens"
    before = children_of_ours()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(rows), str(model_folder), str(out)], timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in out.iterdir()) == [
        "held_out.bin.tmp", "progress.json", "train.bin.tmp", "train.skip.tmp"]
    end = time.monotonic() + 30
    while children_of_ours() - before and time.monotonic() < end:  # they end with their input
        time.sleep(0.05)
    assert not children_of_ours() - before
    heard: list[tuple[int, float]] = []
    monkeypatch.setattr(encoding, "ALONE", 2**12)
    tokenize(str(rows), tokenizer, out, "id", lambda documents, tokens, part: heard.append((documents, part)), workers=3)
    assert same(out, alone)
    assert heard[0][0] >= 320
    assert heard == sorted(heard)
    assert 0.9 < heard[-1][1] <= 1  # of the file


def children_of_ours() -> set[int]:
    """The processes on this machine that tokenise."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"minipuzzle/data/worker.py" in line:
            found.add(int(folder.name))
    return found


def test_a_process_that_is_ended_is_one_line(rows: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             ) -> None:
    monkeypatch.setattr(encoding, "ALONE", 0)
    start = encoding._start

    def killed(settings: Any) -> Any:
        child = start(settings)
        os.kill(child.pid, signal.SIGKILL)
        return child

    monkeypatch.setattr(encoding, "_start", killed)
    with pytest.raises(ResourceError, match="a process that tokenises was ended"):
        tokenize(str(rows), tokenizer, tmp_path, "id", workers=2)


# tokens made before
# ----------------------------------------------------------------------------------------------------------


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def made(texts: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tokens"
    result = run("tokenize", model_folder, "--data", texts, "-o", folder, "--workers", "2", "--json")
    assert result.exit_code == 0, result.output
    about = json.loads(result.stdout)
    assert about["documents"] == 400
    assert about["data"] == f"tokens:{folder}"
    assert about["tokens"]["train"] > 40 * about["tokens"]["held_out"] > 0
    return folder


def test_a_run_on_tokens_is_the_run_on_their_texts(made: Path, recipe: Recipe, model_folder: Path, finished: Path,
                                                   tmp_path: Path, without_gate_and_page: None) -> None:
    """The same blocks, held out and not, to the last digit; and nothing is written among the tokens."""
    from minipuzzle import prune

    before = {p.name: p.stat().st_mtime_ns for p in made.iterdir()}
    prune(model_folder, recipe.with_overrides(data=f"tokens:{made}"), tmp_path / "run")
    for name in ("scores/layers.csv", "search/measured.json", "candidates.csv"):
        assert (tmp_path / "run" / name).read_text() == (finished / name).read_text(), name
    kls = [[json.loads(line)["kl"] for line in (run / "metrics.jsonl").open()] for run in (tmp_path / "run", finished)]
    assert kls[0] == kls[1]
    assert len(kls[0]) == 4
    assert {p.name: p.stat().st_mtime_ns for p in made.iterdir()} == before
    assert not (tmp_path / "run" / "tokens").exists()


def test_verbs_and_blends_read_tokens(made: Path, texts: Path, model_folder: Path) -> None:
    small = ("--set", "calibration.sequence_length=32", "--set", "evaluation.samples=4", "--json")
    found = [json.loads(run("evaluate", model_folder, "--data", data, *small).stdout)
             for data in (str(texts), f"tokens:{made}", f"tokens:{made}=0.5,{texts}=0.5")]
    assert found[0] == found[1]
    assert found[2]["loss"] == pytest.approx(found[0]["loss"], rel=0.5)
    assert found[2]["tokens"] == found[0]["tokens"]


def test_the_same_command_finds_its_tokens_and_another_is_refused(made: Path, texts: Path, model_folder: Path, tmp_path: Path,
                                                                  ) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in made.iterdir() if p.suffix != ".lock"}
    assert run("tokenize", model_folder, "--data", texts, "-o", made).exit_code == 0
    assert {p.name: p.stat().st_mtime_ns for p in made.iterdir() if p.suffix != ".lock"} == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "note.txt").write_text("mine")
    for args, message in ((("--data", "stdlib", "-o", made), "tokens of other settings (data)"),
                          (("--data", texts, "--tokens", "1k", "-o", made), "tokens of other settings (--tokens)"),
                          (("--data", texts, "-o", tmp_path / "foreign"), "something else in it (note.txt)"),
                          (("--data", f"tokens:{made}", "-o", tmp_path / "x"), "one source of text"),
                          (("--data", f"{texts}=0.5,stdlib=0.5", "-o", tmp_path / "x"), "one source of text"),
                          (("--data", "hf:owner/name", "-o", tmp_path / "x"), "Add --tokens")):
        result = run("tokenize", model_folder, *args)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert message in result.stderr
    assert not (tmp_path / "x").exists()
    result = run("tokenize", model_folder, "--data", texts, "-o", tmp_path / "some", "--tokens", "2k", "--json")
    whole = json.loads((made / "tokens.json").read_text())["tokens"]["train"]
    assert 2000 <= json.loads(result.stdout)["tokens"]["train"] < whole / 3


def other_tokenizer(folder: Path) -> None:
    about = json.loads((folder / "tokens.json").read_text())
    reseal(folder, about | {"tokenizer": "0123456789abcdef"})


def another_byte(folder: Path) -> None:
    data = bytearray((folder / "train.bin").read_bytes())
    data[1000] ^= 1
    (folder / "train.bin").write_bytes(data)


def one_split(folder: Path) -> None:
    about = json.loads((folder / "tokens.json").read_text())
    reseal(folder, about | {name: {"held_out": about[name]["held_out"]} for name in ("tokens", "largest", "bytes")})


def odd_values(folder: Path) -> None:
    reseal(folder, json.loads((folder / "tokens.json").read_text()) | {"dtype": "object"})


def large_token(folder: Path) -> None:
    about = json.loads((folder / "tokens.json").read_text())
    reseal(folder, about | {"largest": {"train": 5000, "held_out": 5000}})


def reseal(folder: Path, about: dict[str, Any]) -> None:
    from minipuzzle.core.files import write_sealed

    write_sealed(folder / "tokens.json", {k: v for k, v in about.items() if k != "sha256"})


@pytest.mark.parametrize(("change", "code", "message"), [
    (other_tokenizer, 2, "another tokenizer (300 words, hash 0123456789abcdef)"),
    (another_byte, 5, "train.bin was changed after it was written; make them again: minipuzzle tokenize"),
    (lambda folder: os.truncate(folder / "train.bin", 100), 5, "train.bin was changed"),
    (lambda folder: (folder / "held_out.bin").unlink(), 5, "held_out.bin was changed"),
    (one_split, 2, "has no split train"), (large_token, 2, "makes token 5000, the model has 300"),
    (lambda folder: (folder / "tokens.json").write_text("{}"), 5, "tokens.json"), (odd_values, 5, "not the manifest of tokens"),
    (lambda folder: (folder / "tokens.json").unlink(), 2, "no tokens there; 'minipuzzle tokenize"),
    (lambda folder: (folder / "tokens.json").rename(folder / "progress.json"), 2, "they are not finished")])
def test_tokens_that_will_not_do(made: Path, model_folder: Path, tmp_path: Path, change: Callable[[Path], None],
                                 code: int, message: str) -> None:
    """One line with what to do; the folder is left as it is."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in made.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy)
    left = sorted(p.name for p in copy.iterdir())
    result = run("evaluate", model_folder, "--data", f"tokens:{copy}", "--set", "calibration.sequence_length=32")
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in copy.iterdir()) == left


def test_too_few_tokens_are_refused_and_left(made: Path, model_folder: Path) -> None:
    result = run("evaluate", model_folder, "--data", f"tokens:{made}", "--set", "calibration.sequence_length=8k")
    assert result.exit_code == 2
    assert "less than one block of 8192" in result.stderr
    assert (made / "train.bin").is_file()


def test_held_out_parts_read_no_more_than_they_need() -> None:
    """Of tokens made before the held-out part may be gigabytes."""
    tokens = np.resize(np.array([*range(1, 40), 0], np.uint16), 2**24).view(Counted)
    Counted.taken = 0
    selection, final = two_parts(TokenBlocks(tokens, 64, "s", "h", 1, 0), 16)
    assert selection.shape == final.shape == (16, 64)
    assert read_tokens(16, 64) == Counted.taken == 2**20
    blocks = TokenBlocks(tokens, 64, "s", "h", 1, 0)
    Counted.taken = 0
    blocks.first(8)
    blocks.block(70_000)
    assert Counted.taken == 9 * 64


# chats
# ----------------------------------------------------------------------------------------------------------


def chat(*said: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}


@pytest.fixture
def talker(model_folder: Path) -> Callable[[str | None], Any]:
    """The tokenizer with this chat template."""
    def make(template: str | None) -> Any:
        tokenizer = load_tokenizer(model_folder)
        tokenizer.chat_template = template
        return tokenizer

    return make


def learnt(folder: Path, tokenizer: Any) -> list[tuple[str, str]]:
    """Of each document: its text, and the text of the tokens that are learnt."""
    blocks = load_blocks(folder, "train", 1, "assistant")
    whole = TokenBlocks(blocks.tokens, len(blocks.tokens), "s", "h", 1, blocks.end_token, skip=blocks.skip)
    ids = whole.block(0)
    mask, ends = whole.mask(0, ids), np.flatnonzero(ids == blocks.end_token)
    out = []
    for begin, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
        own = ids[begin : end + 1]
        out.append((tokenizer.decode(own[:-1]), tokenizer.decode(own[1:][mask[begin:end]])))
    return out


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["added", "marked"])
def test_of_chats_the_assistants_words_are_learnt(talker: Callable[[str], Any], tmp_path: Path, template: str) -> None:
    """Beside plain text, of which all is; whichever way the template tells it."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [
        {"text": "plain words first"}, chat("how many?", "three of them", "why?", "nobody knows"), chat("hello"),
        {"text": "plain words last"}] + [{"text": "more"}] * 8))
    tokenizer = talker(template)
    tokenize(str(data), tokenizer, tmp_path / "out", "id")
    found = learnt(tmp_path / "out", tokenizer)
    end = "" if template is MARKED else "\n"
    conversation = ("<|user|>\nhow many?<|stop|>\n<|assistant|>\nthree of them<|stop|>\n"
                    "<|user|>\nwhy?<|stop|>\n<|assistant|>\nnobody knows<|stop|>\n")
    said = dict(found)
    assert said["plain words first"].endswith("words first<|end|>")
    assert said["plain words last"].endswith("words last<|end|>")
    assert said[conversation].replace("<|end|>", "") == f"three of them<|stop|>{end}nobody knows<|stop|>{end}"
    assert said["<|user|>\nhello<|stop|>\n"] == ""
    about = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert (about["chats"], about["unmarked"]) == (2, "")
    every = load_blocks(tmp_path / "out", "train", 8)
    assert every.skip is None
    assert len(every.tokens) == (tmp_path / "out" / "train.skip").stat().st_size


def test_a_template_that_rewrites_what_was_said_needs_marks(talker: Callable[[str], Any], tmp_path: Path) -> None:
    """Where the text of the first messages does not begin that of all, it is not known what the
    assistant said; all of it can still be learnt."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(chat("q", text, "q", "answer")) + "\n" for text in ["yes"] * 10 + ["certainly"] * 10))
    tokenize(str(data), talker(REWRITES), out, "id")
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    assert len(load_blocks(out, "train", 8)) > 10
    with pytest.raises(InputError, match=r"rows\.jsonl, line 11: the chat template does not mark .* distillation\.loss_on=all"):
        load_blocks(out, "train", 8, "assistant")


REFUSING = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}{{ messages[0].content }}"


@pytest.mark.parametrize(("template", "row", "message"), [
    (None, chat("a", "b"), r"line 2: messages need a chat template, and the tokenizer of .*tiny has none; put a chat_template\.jinja"),
    (CHATML, {"messages": []}, "line 2: messages is empty"),
    (CHATML, {"messages": ["hello"]}, "line 2: message 0 is no object"),
    (CHATML, {"messages": [{"content": "x"}]}, "line 2: message 0 has no role"),
    (CHATML, {"messages": [{"role": "user", "content": None}]}, "line 2: message 0 has no content that is text"),
    (CHATML, chat("a") | {"tools": "none"}, "line 2: tools is no list of objects"),
    (REFUSING, {"messages": [{"role": "tool", "content": "x"}]}, r"line 2: the chat template refuses these .* \(begin with the user"),
    (CHATML, {"messages": "hello"}, "line 2: no text; .* or messages a chat")])
def test_rows_that_are_no_chats(talker: Callable[[str | None], Any], tmp_path: Path, template: str | None, row: dict[str, Any],
                                message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"rows\.jsonl, {message}"):
        tokenize(str(tmp_path / "rows.jsonl"), talker(template), tmp_path / "out", "id")
    assert list((tmp_path / "out").iterdir()) == []


def test_chats_by_several_processes(talker: Callable[[str], Any], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    ) -> None:
    """The same tokens and marks, beside plain rows; and after a stop."""
    words = [file.read_text()[:300] for file in sorted(texts.iterdir())]
    rows = [chat(*words[i : i + 1 + i % 4]) if i % 3 else {"text": words[i]} for i in range(390)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, tokenizer, names = str(tmp_path / "rows.jsonl"), talker(CHATML), (*FILES, "train.skip")
    monkeypatch.setattr(encoding, "ALONE", 2**12)

    def stop(documents: int, *rest: Any) -> None:
        if documents >= 192:
            raise Interrupted(15)

    tokenize(source, tokenizer, tmp_path / "1", "id")
    tokenize(source, tokenizer, tmp_path / "2", "id", workers=2)
    with pytest.raises(Interrupted):
        tokenize(source, tokenizer, tmp_path / "stopped", "id", stop, workers=2)
    tokenize(source, tokenizer, tmp_path / "stopped", "id", workers=3)
    assert same(tmp_path / "2", tmp_path / "1", names)
    assert same(tmp_path / "stopped", tmp_path / "1", names)
    skip = np.fromfile(tmp_path / "1" / "train.skip", np.uint8)
    assert 0.2 < skip.mean() < 0.6
    assert set(skip.tolist()) == {0, 1}


def test_the_loss_is_of_the_assistants_words(model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             ) -> None:
    """By the verb: the KL of the first step is the mean over the places that `loss_on` names."""
    monkeypatch.setattr("minipuzzle.verbs.distill.reload_gate", lambda *given: 0.0)
    folder, student = tmp_path / "model", tmp_path / "student"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    noisy(folder, student)
    words = [file.read_text()[:200] for file in sorted(texts.iterdir())]
    rows = [chat(words[i], words[i + 1], words[i + 2], words[i + 3]) for i in range(0, 396, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"tokens:{tmp_path / 'tokens'}"
    assert run("tokenize", folder, "--data", tmp_path / "rows.jsonl", "-o", tmp_path / "tokens").exit_code == 0
    world = World(open_model(folder), Recipe().with_overrides(data=data), 0, torch.device("cpu"), tmp_path / "none")
    masks = {}
    for loss_on in ("all", "assistant"):
        blocks = world.blocks("distillation", "train", 32, loss_on)
        batch = Batch.make(blocks, blocks.numbers(0, 0, 16), Ranks(torch.device("cpu")))
        assert batch.kl_count == int(batch.mask_BT.sum())
        masks[loss_on] = batch.mask_BT
    assert bool((masks["all"] | ~masks["assistant"]).all())
    assert 0.2 < masks["assistant"].float().mean() < 0.7 < masks["all"].float().mean()
    log_p, log_q = (torch.log_softmax(final_hidden(m, batch.ids_BT) @ m.head.T, -1)
                    for m in (Model.load(open_model(f), torch.device("cpu"), torch.float32) for f in (folder, student)))
    kl_BT = (log_p.exp() * (log_p - log_q)).sum(-1)
    args = ("--teacher", folder, "--data", data, "distillation.loss_on=assistant", "distillation.tokens=512",
            "distillation.batch_tokens=512", "distillation.sequence_length=32", "calibration.sequence_length=32",
            "evaluation.samples=2")
    result = run("distill", student, *args, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])["kl"]
    assert found == pytest.approx(float(kl_BT[masks["assistant"]].mean()), rel=1e-4)
    assert abs(found - float(kl_BT[masks["all"]].mean())) > 1e-3 * found
    (folder / "chat_template.jinja").write_text(MARKED)
    changed = run("distill", student, *args, "-o", tmp_path / "new")
    assert changed.exit_code == 2
    assert "made with another tokenizer" in changed.stderr


def noisy(folder: Path, target: Path) -> None:
    """The model, with other weights of one layer."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    name = next(name for name in weights if name.endswith("out_proj.weight"))
    save_file(weights | {name: weights[name] * 0.5}, target / "model.safetensors", metadata={"format": "pt"})
