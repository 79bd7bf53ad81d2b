"""Data: what is a document, what is held out, and which block comes when."""

from __future__ import annotations

import json
import os
import random
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.data import corpus
from minipuzzle.data.blend import ROUND, BlendedBlocks
from minipuzzle.data.blocks import TokenBlocks, load_blocks
from minipuzzle.data.corpus import (
    HELD_OUT_EVERY,
    SKIPPED_FOLDERS,
    absolute,
    check_sources,
    documents,
    has_end,
    identity,
    is_held_out,
    parse_blend,
)
from minipuzzle.data.writer import tokenize

TEXTS = [f"document {i}: {'word ' * (i % 7 + 1)}é 𝄞\n" for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_folder))


def write(folder: Path, kind: str) -> Path:
    """The same texts in a file or a folder of this kind."""
    match kind:
        case "folder":
            for i, text in enumerate(TEXTS):
                file = folder / "deep" / f"{i % 3}" / f"{i:03}{('.txt', '.md', '.py', '.rst')[i % 4]}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            (folder / "deep" / "image.png").write_bytes(b"\x89PNG")
            return folder / "deep"
        case "jsonl":
            path = folder / "rows.jsonl"
            path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" + "\n" * (i % 2) for i, t in enumerate(TEXTS)))
        case "content":
            path = folder / "rows.jsonl"
            path.write_text("".join(json.dumps({"content": t}, ensure_ascii=False) + "\n" for t in TEXTS), encoding="utf-8")
        case "parquet":
            path = folder / "rows.parquet"
            pq.write_table(pa.table({"document": TEXTS, "n": list(range(300))}), path, row_group_size=64)
        case _:
            raise AssertionError
    return path


@pytest.mark.parametrize("kind", ["folder", "jsonl", "content", "parquet"])
def test_documents(tmp_path: Path, kind: str) -> None:
    found = list(documents(str(write(tmp_path, kind))))
    assert sorted(text for _, text in found) == sorted(TEXTS)
    names = [name for name, _ in found]
    assert len(set(names)) == 300
    assert found == list(documents(str(write(tmp_path, kind))))  # the same order again
    assert not any(name.startswith("/") for name in names)  # names do not depend on where the data lies
    held = [name for name in names if is_held_out(name)]
    assert 0 < len(held) < 30


def test_a_long_text_is_several_documents(tmp_path: Path) -> None:
    chance = random.Random(0)
    text = "".join("x" * chance.randint(0, 300) + "\n" for _ in range(2000))
    (tmp_path / "long.txt").write_text(text)
    found = list(documents(str(tmp_path / "long.txt")))
    assert "".join(piece for _, piece in found) == text
    assert len(found) > 10
    assert len({name for name, _ in found}) == len(found)
    assert all(piece.endswith("\n") for _, piece in found)
    assert all(len(piece) <= 2 * corpus.PIECE + 300 for _, piece in found)


@pytest.mark.parametrize("text", ["a line\n" * 1000, "words " * 1000, "words " * 20_000, "y" * 100_000])
def test_a_text_that_is_all_there_is_has_a_part_to_hold_out(tmp_path: Path, text: str) -> None:
    """Also on one line, and also where it is short; beside other files a short one stays whole."""
    (tmp_path / "text.txt").write_text(text)
    for source in (tmp_path / "text.txt", tmp_path):
        found = list(documents(str(source)))
        assert "".join(piece for _, piece in found) == text
        assert len({name for name, _ in found}) == len(found) >= 3
        assert max(len(piece) for _, piece in found) <= 2 * corpus.PIECE
        assert all(piece[-1] in " \ny" for _, piece in found)
    (tmp_path / "more.txt").write_text("another")
    assert (len(list(documents(str(tmp_path)))) == 2) == (len(text) < 2 * corpus.PIECE)


def test_the_standard_library() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = documents("stdlib")
    names, size = [], 0
    for name, text in found:
        names.append(name)
        size += len(text)
    assert len(names) == len(set(names)) > 500
    assert size > 5_000_000
    assert "json/decoder.py" in names
    assert (root / names[0]).is_file()
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert len(SKIPPED_FOLDERS) >= 4
    assert not parts & SKIPPED_FOLDERS
    assert names == [name for name, _ in documents("stdlib")]
    assert 0.2 < sum(map(is_held_out, names)) / (len(names) / HELD_OUT_EVERY) < 3


def test_held_out_is_what_it_always_was() -> None:
    """Changing the choice would let a model be tested on what an earlier one was trained on."""
    names = [f"file-{i}.txt" for i in range(500)]
    assert [i for i in range(500) if is_held_out(names[i])] == [6, 50, 59, 93, 105, 106, 198, 291, 345, 378, 418]
    share = sum(is_held_out(f"{i}") for i in range(100_000)) / 100_000
    assert share == pytest.approx(1 / HELD_OUT_EVERY, rel=0.1)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", b"\xff\xfe\x00bad", "not UTF-8"), ("a.jsonl", b'{"text": "good"}\n{"text": \n', "line 2: not JSON"),
    ("a.jsonl", b'{"text": "good"}\n\n[1]\n', "line 3: no text"), ("a.jsonl", b'{"body": "x"}\n', "line 1: no text"),
    ("a.jsonl", b'{"text": 5}\n', "line 1: no text"), ("a.jsonl", b'{"text": "\xff"}\n', "UTF-8"),
    ("a.parquet", b"PAR1 no parquet PAR1", "parquet"), ("a.parquet", b"", "parquet")])
def test_unreadable_data(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str) -> None:
    """One line that names the file, and nothing left behind."""
    data, out = tmp_path / "data", tmp_path / "tokens"
    data.mkdir()
    (data / name).write_bytes(content)
    for source in (data, data / name):
        with pytest.raises(InputError, match=message) as error:
            tokenize(str(source), tokenizer, out, "id")
        assert name in str(error.value)
        assert [f.name for f in out.glob("*")] == []


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for source in (str(tmp_path / "missing"), "./missing.txt", "a/b/c"):
        with pytest.raises(InputError, match="no such file or folder"):
            list(documents(source))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.txt"):
        list(documents(str(tmp_path / "empty")))


def test_only_hf_goes_to_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo is a path that is not there, with what may have been meant."""
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options["revision"], options["split"], options["trust_remote_code"]))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for source, message in (("texst", r"no such file or folder \(did you mean texts\?\)"), ("stdlb", "did you mean stdlib"),
                            ("squad", "no such file"), ("owner/name", "Hub is written hf:owner/name"), ("", "data is empty"),
                            ("hf:squad", r"written hf:owner/name\[:config\]"), ("hf:a/b#", "written hf:"), ("hf:", "written hf:"),
                            ("tokens:old", "no tokens there; 'minipuzzle tokenize"), ("tokens:", "write tokens:FOLDER"), ("stdlib=1,texst=2", "did you mean texts"),
                            ("a" * 300, "File name too long"), ("a\0b", "NUL character")):
        for read in (check_sources, lambda name: [list(documents(part)) for part in parse_blend(name) if part != "stdlib"]):
            if source.startswith("tokens:") and read is not check_sources:
                continue
            with pytest.raises(InputError, match=message):
                read(source)
    assert asked == []
    check_sources("hf:owner/name")
    assert asked == []
    assert [text for _, text in documents("hf:owner/name")] == ["one", "two"]
    list(documents("hf:owner/name:config.a@refs/pr/1#validation"))
    assert asked == [("owner/name", None, None, "train", False),
                     ("owner/name", "config.a", "refs/pr/1", "validation", False)]
    assert not has_end("hf:owner/name")
    assert has_end("texts")
    assert absolute("hf:owner/name") == identity("hf:owner/name") == "hf:owner/name"


def test_a_stream_that_breaks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        yield {"text": "one"}
        raise RuntimeError("the network\nis gone")

    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(InputError, match=r"hf:a/b.*\(RuntimeError: the network\)"):
        list(documents("hf:a/b"))


@pytest.mark.parametrize("inside", [False, True])
def test_only_regular_files_are_data(tmp_path: Path, inside: bool) -> None:
    """No FIFO is waited for, and a link that leads nowhere is no missing document."""
    for name, make in {"fifo.txt": os.mkfifo, "loop.txt": lambda p: p.symlink_to(p),
                       "dangling.txt": lambda p: p.symlink_to("nothing"), "null.txt": lambda p: p.symlink_to("/dev/null"),
                       "zero.jsonl": lambda p: p.symlink_to("/dev/zero")}.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        make(folder / name)
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            check_sources(str(folder if inside else folder / name))
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / os.fsdecode(b"\xff.txt")).write_text("text")
    with pytest.raises(InputError, match="not UTF-8; rename"):
        check_sources(str(odd))


@pytest.mark.parametrize("row", ["[" * 100_000, '{"text": "a", "n": ' + "9" * 5000 + "}"], ids=["deep", "digits"])
def test_rows_that_python_cannot_hold(tmp_path: Path, row: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + row + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: not JSON"):
        list(documents(str(tmp_path / "rows.jsonl")))


def test_half_a_character_does_not_stop_the_run(tmp_path: Path, tokenizer: Any) -> None:
    """JSON may hold one half of a surrogate pair: cut emojis are common in scraped text."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i} \ud83d"}) + "\n" for i in range(200)))
    tokenize(str(tmp_path / "rows.jsonl"), tokenizer, tmp_path / "tokens", "id")
    assert len(load_blocks(tmp_path / "tokens", "train", 8)) > 50


# tokens
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenised(texts: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "here"
    tokenize(str(texts), tokenizer, folder, "id")
    return folder


def test_splits_are_disjoint_and_whole(tokenised: Path, texts: Path, tokenizer: Any) -> None:
    """Each document, with its end, lies in exactly one of the two files; none is lost, none is in
    both."""
    about = json.loads((tokenised / "tokens.json").read_text())
    found: dict[str, list[str]] = {}
    for split in ("train", "held_out"):
        ids = np.fromfile(tokenised / f"{split}.bin", dtype=about["dtype"])
        assert len(ids) == about["tokens"][split]
        ends = np.flatnonzero(ids == tokenizer.eos_token_id)
        starts = [0, *(ends[:-1] + 1)]
        found[split] = [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]
        assert about["bytes"][split] == sum(len(t.encode()) for t in found[split])
    originals = {f.name: f.read_text() for f in texts.iterdir()}
    assert about["documents"] == len(originals) == 400
    assert sorted(found["held_out"]) == sorted(t for n, t in originals.items() if is_held_out(n))
    assert sorted(found["train"]) == sorted(t for n, t in originals.items() if not is_held_out(n))
    assert len(found["held_out"]) >= 3
    blocks = load_blocks(tokenised, "held_out", 32)
    assert blocks.bytes_per_token == pytest.approx(about["bytes"]["held_out"] / about["tokens"]["held_out"])


def test_a_small_corpus_still_has_something_held_out(tmp_path: Path, tokenizer: Any) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        (data / f"{i}.txt").write_text("some words of a text " * 9)
    assert not any(is_held_out(f"{i}.txt") for i in range(4))
    tokenize(str(data), tokenizer, tmp_path / "tokens", "id")
    about = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    assert about["documents"] == 4
    assert about["tokens"]["train"] == 3 * about["tokens"]["held_out"] > 0


@pytest.mark.parametrize(("least", "documents_held_out"), [(1, 1), (147, 2), (293, 4), (1000, 8), (100_000, 8)])
def test_a_small_corpus_holds_out_a_block_if_it_can(tmp_path: Path, tokenizer: Any, least: int, documents_held_out: int,
                                                    ) -> None:
    """20 rows of equal length: one, two, four or eight go to the held-out part, in the order of
    their hashes."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "some words of a text " * 9}) + "\n" for _ in range(20)))
    assert not any(is_held_out(f"rows.jsonl:{i}") for i in range(20))
    source, out = str(tmp_path / "rows.jsonl"), tmp_path / "tokens"
    tokenize(source, tokenizer, out, "id", least=least)
    counts = json.loads((out / "tokens.json").read_text())["tokens"]
    assert counts["held_out"] * 20 == sum(counts.values()) * documents_held_out
    again = Counting(tokenizer)
    tokenize(source, again, out, "id", least=least)
    assert again.seen == 0
    tokenize(source, again, out, "id", least=2)
    assert again.seen == 0
    if least < 1000:
        tokenize(source, again, out, "id", least=1000)
        assert json.loads((out / "tokens.json").read_text())["tokens"]["held_out"] == 8 * 146


def test_tokens_are_made_once(tokenised: Path, texts: Path, tokenizer: Any, tmp_path: Path) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("tokenised again")

    never.eos_token_id = 0  # type: ignore[attr-defined]
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in tokenised.iterdir()}
    tokenize(str(texts), never, tokenised, "id")  # type: ignore[arg-type]
    assert {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in tokenised.iterdir()} == before
    assert sorted(before) == ["held_out.bin", "tokens.json", "train.bin"]
    heard: list[int] = []
    tokenize(str(texts), tokenizer, tmp_path / "other", "id", lambda done, *rest: heard.append(done))
    assert heard[-1] == 400
    assert heard == sorted(heard)
    for name in ("held_out.bin", "train.bin", "tokens.json"):
        assert (tmp_path / "other" / name).read_bytes() == before[name][0]
    tokenize(str(texts), tokenizer, tmp_path / "other", "another tokenizer", lambda done, *rest: heard.append(done))  # made again
    assert len(heard) == 2 * heard.index(400) + 2
    assert json.loads((tmp_path / "other" / "tokens.json").read_text())["tokenizer"] == "another tokenizer"


def test_stopped_in_the_middle(texts: Path, tokenizer: Any, tokenised: Path, tmp_path: Path) -> None:
    def stop(done: int, *rest: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(str(texts), tokenizer, tmp_path / "tokens", "id", stop)
    assert not (tmp_path / "tokens" / "tokens.json").exists()
    tokenize(str(texts), tokenizer, tmp_path / "tokens", "id")
    assert sorted(f.name for f in (tmp_path / "tokens").iterdir()) == ["held_out.bin", "tokens.json", "train.bin"]
    assert (tmp_path / "tokens" / "train.bin").read_bytes() == (tokenised / "train.bin").read_bytes()


class Counting:
    """A tokenizer that counts the documents it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seen, self.eos_token_id = inner, 0, inner.eos_token_id

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, text: list[str], **options: Any) -> Any:
        self.seen += len(text)
        return self.inner(text, **options)


def test_stopped_tokens_go_on_where_they_were(texts: Path, tokenizer: Any, tokenised: Path, tmp_path: Path) -> None:
    def stop(done: int, *rest: Any) -> None:
        if done >= 192:
            raise Interrupted(15)

    out = tmp_path / "tokens"
    with pytest.raises(Interrupted):
        tokenize(str(texts), tokenizer, out, "id", stop)
    with (out / "train.bin.tmp").open("ab") as file:
        file.write(b"written after the last save")
    rest = Counting(tokenizer)
    tokenize(str(texts), rest, out, "id")
    assert rest.seen == 400 - 192
    assert sorted(f.name for f in out.iterdir()) == ["held_out.bin", "tokens.json", "train.bin"]
    for name in ("held_out.bin", "train.bin", "tokens.json"):
        assert (out / name).read_bytes() == (tokenised / name).read_bytes()


@pytest.mark.parametrize("change", ["text", "fewer", "tokenizer", "file"])
def test_what_was_begun_of_other_data_is_begun_again(texts: Path, tokenizer: Any, tmp_path: Path, change: str) -> None:
    def stop(done: int, *rest: Any) -> None:
        if done >= 128:
            raise Interrupted(15)

    data, out = tmp_path / "data", tmp_path / "tokens"
    shutil.copytree(texts, data)
    with pytest.raises(Interrupted):
        tokenize(str(data), tokenizer, out, "id", stop)
    if change == "text":
        (data / "document-003.txt").write_text("other words\n")
    elif change == "fewer":
        for i in range(100, 400):
            (data / f"document-{i:03}.txt").unlink()
    elif change == "file":
        (out / "train.bin.tmp").unlink()
    identity = "another" if change == "tokenizer" else "id"
    tokenize(str(data), tokenizer, out, identity)
    tokenize(str(data), tokenizer, tmp_path / "straight", identity)
    for name in ("held_out.bin", "train.bin", "tokens.json"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_source_without_an_end_is_read_as_far_as_needed(texts: Path, tokenizer: Any, tmp_path: Path) -> None:
    counted, enough = Counting(tokenizer), {"train": 3000, "held_out": 50}
    tokenize(str(texts), counted, tmp_path, "id", enough=enough)
    about = json.loads((tmp_path / "tokens.json").read_text())
    assert counted.seen < about["documents"] < 400  # what is more of a split than enough is not tokenised
    assert all(about["tokens"][split] >= count for split, count in enough.items())
    again = Counting(tokenizer)
    tokenize(str(texts), again, tmp_path, "id", enough={"train": 2000, "held_out": 50})
    assert again.seen == 0  # what is there does for less
    tokenize(str(texts), again, tmp_path, "id", enough={"train": about["tokens"]["train"] + 1, "held_out": 50})
    assert again.seen > counted.seen  # and is made again for more
    tokenize(str(texts), again, tmp_path, "id")
    assert json.loads((tmp_path / "tokens.json").read_text())["documents"] == 400


def test_held_out_alone_is_what_it_is_beside_train(texts: Path, tokenised: Path, tokenizer: Any,
                                                   tmp_path: Path) -> None:
    """`evaluate` tokenises no training document, and reads the blocks that `prune` reads."""
    counted = Counting(tokenizer)
    tokenize(str(texts), counted, tmp_path, "id", enough={"held_out": None})
    assert 0 < counted.seen < 30  # of 400
    assert (tmp_path / "held_out.bin").read_bytes() == (tokenised / "held_out.bin").read_bytes()
    assert not (tmp_path / "train.bin").exists()
    tokenize(str(texts), tokenizer, tmp_path, "id")
    assert (tmp_path / "train.bin").read_bytes() == (tokenised / "train.bin").read_bytes()


def test_the_first_blocks_of_a_source_without_an_end_do_not_depend_on_how_much_was_read(
        texts: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration is the same for `score`, which reads little, as for a `prune` that will train on
    much."""
    monkeypatch.setattr("minipuzzle.data.writer.has_end", lambda source: False)
    found = []
    for limit in (2000, 8000):
        tokenize(str(texts), tokenizer, tmp_path / str(limit), "id", enough={"train": limit, "held_out": 50})
        found.append(load_blocks(tmp_path / str(limit), "train", 32).first(20))
    assert np.array_equal(*found)


def test_places_that_read_an_end_are_masked(tokenised: Path, tokenizer: Any) -> None:
    blocks = load_blocks(tokenised, "train", 64)
    assert blocks.end_token == tokenizer.eos_token_id is not None
    ids = np.stack([blocks.block(i) for i in range(8)])
    mask = np.stack([blocks.mask(i, ids[i]) for i in range(8)])
    assert 0 < (~mask).sum() < 40
    assert np.array_equal(mask, ids != tokenizer.eos_token_id)
    assert numbered(5).mask(0, ids[0]).all()  # nothing is known of ends


def test_blocks_too_long_or_files_too_short(tokenised: Path, tmp_path: Path) -> None:
    about = json.loads((tokenised / "tokens.json").read_text())
    count = about["tokens"]["held_out"]
    assert len(load_blocks(tokenised, "held_out", count)) == 1
    with pytest.raises(InputError, match=f"held_out part has {count} tokens, less than one block of {count + 1}"):
        load_blocks(tokenised, "held_out", count + 1)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tokenised.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    os.truncate(copy / "train.bin", 100)
    with pytest.raises(CorruptArtifact, match=f"100 bytes for {about['tokens']['train']} tokens"):
        load_blocks(copy, "train", 8)


# blocks
# ----------------------------------------------------------------------------------------------------------


def numbered(blocks: int, length: int = 3, rest: int = 1) -> TokenBlocks:
    """Block i holds i, three times; `rest` tokens at the end make no block."""
    ids = np.append(np.repeat(np.arange(blocks), length), np.full(rest, 999)).astype(np.uint16)
    return TokenBlocks(ids, length, "test", "", 0)


def test_blocks_are_consecutive_tokens() -> None:
    tokens = TokenBlocks(np.arange(11, dtype=np.uint16), 3, "test", "", 22)
    assert len(tokens) == 3
    assert tokens.block(2).tolist() == [6, 7, 8]
    assert tokens.block(0).dtype == np.int64
    assert tokens.bytes_per_token == 2


@given(blocks=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_block_once_an_epoch(blocks: int, size: int, seed: int) -> None:
    data = numbered(blocks)
    drawn = np.concatenate([data.batch(seed, step, size)[:, 0] for step in range(-(-3 * blocks // size))])
    for epoch in range(3):
        assert sorted(drawn[epoch * blocks : (epoch + 1) * blocks]) == list(range(blocks))
    assert 999 not in drawn


@given(size=st.integers(1, 9), step=st.integers(0, 60), seed=st.integers(0, 9))
def test_a_batch_is_a_function_of_seed_and_step(size: int, step: int, seed: int) -> None:
    data = numbered(37)
    first = data.batch(seed, step, size)
    data.batch(seed + 1, step + 7, size)  # whatever else was asked for in between
    assert np.array_equal(data.batch(seed, step, size), first)
    assert np.array_equal(numbered(37).batch(seed, step, size), first)
    # two half batches are the whole one: the order does not depend on how many share the work
    assert np.array_equal(np.concatenate([data.batch(seed, 2 * step, size), data.batch(seed, 2 * step + 1, size)]),
                          data.batch(seed, step, 2 * size))


def test_epochs_and_seeds_differ() -> None:
    data = numbered(50)
    orders = {tuple(data.batch(seed, epoch, 50)[:, 0]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_first_is_spread_over_the_corpus() -> None:
    data = numbered(100)
    chosen = data.first(5)[:, 0].tolist()
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] == 99
    assert max(np.diff(chosen)) <= 26
    assert data.first(1000).shape == (100, 3)
    assert data.first(1).tolist() == [[0, 0, 0]]


# blends
# ----------------------------------------------------------------------------------------------------------


def test_blend_syntax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_blend("stdlib") == {"stdlib": 1.0}
    assert parse_blend("stdlib=3, my/texts=1") == {"stdlib": 0.75, "my/texts": 0.25}
    assert parse_blend("a,b") == {"a,b": 1.0}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=1").mkdir()
    assert parse_blend("x=1") == {"x=1": 1.0}  # a path that is there is no blend
    for wrong in ("a=0,b=1", "a=1,a=2", "a=-1,b=2", "a=x,b=1", "=1,b=1", "a=inf,b=1"):
        with pytest.raises(InputError, match="SOURCE=WEIGHT"):
            parse_blend(wrong)
    assert identity("stdlib=3,./none=1") == f"{identity('stdlib')}=0.75, ./none=0.25"


def test_data_are_the_same_from_every_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here/texts", "there"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "here" / "texts" / "a.txt").write_text("a" * 100)
    monkeypatch.chdir(tmp_path / "here")
    names = ("texts", "./texts/a.txt", "texts=2,stdlib=1,some/hub=1", "texts=2", "stdlib", "some/hub")
    known = {name: (absolute(name), identity(name)) for name in names}
    assert known["texts=2,stdlib=1,some/hub=1"][0] == f"{tmp_path}/here/texts=2,stdlib=1,some/hub=1"
    monkeypatch.chdir(tmp_path / "there")
    for located, told in known.values():
        assert absolute(located) == located
        assert identity(located) == told
    assert [absolute(name) for name in ("stdlib", "some/hub")] == ["stdlib", "some/hub"]
    (tmp_path / "here" / "texts" / "a.txt").write_text("b" * 101)
    told = [identity(located) for located, _ in known.values()]
    assert [a != b for a, (_, b) in zip(told, known.values(), strict=True)] == [True] * 4 + [False] * 2


def blended(*lengths: int, weights: tuple[float, ...]) -> BlendedBlocks:
    """Part i has blocks whose tokens are 100 i + number."""
    parts = tuple(TokenBlocks(np.repeat(np.arange(n) + 100 * i, 3).astype(np.uint16), 3, f"s{i}", f"h{i}", 30 * n * (i + 1), 7)
                  for i, n in enumerate(lengths))
    return BlendedBlocks(parts, weights)


def test_a_blend_keeps_its_shares_and_its_epochs() -> None:
    data = blended(40, 7, 90, weights=(0.25, 0.05, 0.7))
    drawn = data.batch(3, 0, 2 * ROUND)[:, 0]
    assert [int(((drawn // 100) == i).sum()) for i in range(3)] == [500, 100, 1400]
    for i, blocks in enumerate((40, 7, 90)):
        own = drawn[drawn // 100 == i] % 100
        for epoch in range(len(own) // blocks):
            assert sorted(own[epoch * blocks : (epoch + 1) * blocks]) == list(range(blocks))
    first = [int(((drawn[at : at + 100] // 100) == 2).sum()) for at in range(0, 2000, 100)]
    assert min(first) > 50  # mixed, not one source after the other
    assert max(first) < 90


@given(size=st.integers(1, 9), step=st.integers(0, 400), seed=st.integers(0, 3))
def test_a_blended_batch_is_a_function_of_seed_and_step(size: int, step: int, seed: int) -> None:
    data = blended(12, 30, weights=(0.4, 0.6))
    first = data.batch(seed, step, size)
    data.batch(seed + 1, step + 7, size)
    assert np.array_equal(data.batch(seed, step, size), first)
    assert np.array_equal(np.concatenate([data.batch(seed, 2 * step, size), data.batch(seed, 2 * step + 1, size)]),
                          data.batch(seed, step, 2 * size))


def test_a_blend_as_blocks() -> None:
    data = blended(10, 20, weights=(0.75, 0.25))
    assert len(data) == 30
    assert [int(data.block(i)[0]) for i in (0, 9, 10, 29)] == [0, 9, 100, 119]
    assert (data.first(8)[:, 0] // 100).tolist() == [0] * 6 + [1] * 2
    assert data.bytes_per_token == pytest.approx(0.75 * 10 + 0.25 * 20)
    assert data.end_token == 7
    assert data.mask(10, np.array([7, 8])).tolist() == [False, True]
    assert data.source == "s0=0.75,s1=0.25"
    assert data.corpus_hash != blended(10, 20, weights=(0.5, 0.5)).corpus_hash
