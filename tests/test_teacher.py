"""The teacher's cache: what it holds, when it is made, and what is learned from it. Students in
lock-step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_distill import (
    BATCH,
    KEPT,
    SEQ,
    SETTINGS,
    STEP_TOKENS,
    assert_same,
    blocks,
    rows,
    stop_at,
    student,
    train,
    weights,
)
from tiny import ARCH, FAMILY, tiny_model

from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.distill import teacher as teachers
from minipuzzle.distill.loop import distill_model, distill_together
from minipuzzle.distill.loss import distillation_loss
from minipuzzle.distill.teacher import CachedTeacher, LiveTeacher, cache_teacher
from minipuzzle.distill.trainer import Pupil
from minipuzzle.models.forward import block
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.selection import Selection
from minipuzzle.models.walk import final_hidden

ALONE = Ranks(torch.device("cpu"))
KEY = {"teacher": "t", "data": "d", "top_k": 12, "temperature": 2.0}


class Asked:
    """A teacher that counts the blocks it was shown."""

    def __init__(self) -> None:
        self.blocks = 0
        self.inner = LiveTeacher(tiny_model())

    def look(self, ids_BT: torch.Tensor, numbers: Any, layers: Any) -> Any:
        self.blocks += len(ids_BT)
        return self.inner.look(ids_BT, numbers, layers)


def make(folder: Path, wanted: list[int], asked: Asked, **options: Any) -> CachedTeacher:
    cache_teacher(folder, lambda: asked, blocks(), wanted, KEY, ALONE, **options)
    return CachedTeacher(folder, ALONE.device)


def test_the_cache_is_the_teachers_top_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "SHARD_BLOCKS", 4)
    wanted = blocks().numbers(5, 0, 10)
    cache = make(tmp_path, wanted, Asked())
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 3
    some = [wanted[7], wanted[2]]
    ids = torch.stack([torch.from_numpy(blocks().block(n)) for n in some])
    target, streams = cache.look(ids, some, ())
    assert streams == {}
    assert target.words_nK is not None
    assert target.log_p_nK is not None
    assert target.log_rest_n is not None
    assert target.words_nK.shape == (2 * SEQ, 12)
    model = tiny_model()
    p = torch.softmax(final_hidden(model, ids).flatten(0, 1) @ model.head.T / 2.0, -1)
    top, words = p.topk(12)
    assert torch.equal(target.words_nK, words)
    torch.testing.assert_close(target.log_p_nK.exp(), top, rtol=4e-3, atol=1e-6)
    torch.testing.assert_close(target.log_rest_n.exp(), 1 - top.sum(-1), rtol=4e-3, atol=1e-5)
    torch.testing.assert_close(target.log_p_nK.exp().sum(-1) + target.log_rest_n.exp(), torch.ones(2 * SEQ), rtol=1e-6, atol=0)
    size = sum(t.numel() * t.element_size() for f in tmp_path.glob("shard-*") for t in load_file(f).values())
    assert size == 10 * SEQ * (4 * 12 + 2)


def test_the_cache_is_made_once_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "SHARD_BLOCKS", 4)
    first, more, none = Asked(), Asked(), Asked()
    make(tmp_path, [*range(10), 3, 4], first)
    assert first.blocks == 10  # each once
    make(tmp_path, list(range(13)), more)
    assert more.blocks == 3

    def never() -> Asked:
        raise AssertionError("the teacher was loaded")

    cache_teacher(tmp_path, never, blocks(), list(range(13)), KEY, ALONE)
    assert none.blocks == 0
    for change in ({"teacher": "u"}, {"top_k": 4}, {"temperature": 1.0}, {"data": "e"}):
        with pytest.raises(InputError, match=f"cache of something else .*{next(iter(change))}"):
            cache_teacher(tmp_path, never, blocks(), [0], KEY | change, ALONE)


def test_a_folder_with_something_else_is_not_a_cache(tmp_path: Path) -> None:
    (tmp_path / "teacher.json.tmp").write_text("{")  # killed before the first shard
    cache_teacher(tmp_path, Asked, blocks(), [0], KEY, ALONE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="not empty and not a teacher's cache"):
        cache_teacher(tmp_path / "mine", Asked, blocks(), [0], KEY, ALONE)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_cache_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "SHARD_BLOCKS", 4)

    def stop(done: int) -> None:
        if done == 6:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        make(tmp_path / "parts", list(range(10)), Asked(), progress=stop)
    rest = Asked()
    make(tmp_path / "parts", list(range(10)), rest)
    assert rest.blocks == 6  # one shard of four was whole
    make(tmp_path / "whole", list(range(10)), Asked())
    files = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == files
    assert all((tmp_path / "parts" / f).read_bytes() == (tmp_path / "whole" / f).read_bytes() for f in files)
    shard, index = tmp_path / "whole" / "shard-00001.safetensors", tmp_path / "whole" / "teacher.json"
    for place in range(-1, -SEQ * 50 * 4, -997):  # of the last block's words, or of what all four have
        data = bytearray((tmp_path / "parts" / shard.name).read_bytes())
        data[place] ^= 0x80
        shard.write_bytes(data)
        with pytest.raises(CorruptArtifact, match=r"shard-00001.*block \d was changed"):
            CachedTeacher(tmp_path / "whole", ALONE.device).look(torch.zeros(4, SEQ), [4, 5, 6, 7], ())
    index.write_text(index.read_text().replace("[8, 9]", "[9, 8]"))
    with pytest.raises(CorruptArtifact, match=r"teacher\.json was changed after it was written; delete"):
        CachedTeacher(tmp_path / "whole", ALONE.device)
    (tmp_path / "parts" / "shard-00001.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptArtifact, match="shard-00001"):
        make(tmp_path / "parts", list(range(10)), rest).look(torch.zeros(1, SEQ), [5], ())


def test_training_from_the_cache(tmp_path: Path) -> None:
    """With all words it is the live teacher, but for float16; with a few it is the live teacher of
    as many."""
    for k in (ARCH.vocab_size, 6):
        settings = replace(SETTINGS, tokens=4 * STEP_TOKENS, top_k=k)
        live = train(tmp_path / f"live {k}", settings=settings)
        key = KEY | {"top_k": k, "temperature": 1.0}
        cache_teacher(tmp_path / f"{k}", Asked, blocks(), blocks().numbers(5, 0, 4 * BATCH), key, ALONE)
        pupil = student()
        distill_model(pupil, CachedTeacher(tmp_path / f"{k}", ALONE.device), blocks(), settings, tmp_path / f"cached {k}")
        for a, b in zip(rows(tmp_path / f"live {k}"), rows(tmp_path / f"cached {k}"), strict=True):
            assert a["kl"] == pytest.approx(b["kl"], rel=2e-3)
        start = weights(student())
        moved = sum(float((weights(live)[n] - start[n]).square().sum()) for n in start) ** 0.5
        apart = sum(float((weights(live)[n] - weights(pupil)[n]).square().sum()) for n in start) ** 0.5
        assert apart < 0.1 * moved
    all_words, few = (rows(tmp_path / f"live {k}")[0]["kl"] for k in (ARCH.vocab_size, 6))
    assert few < 0.99 * all_words  # joined events hide a part
    with pytest.raises(InputError, match="hidden_loss_weight needs the teacher in memory"):
        distill_model(student(), CachedTeacher(tmp_path / "6", ALONE.device), blocks(),
                      replace(SETTINGS, hidden_loss_weight=1.0), tmp_path / "no", layers=KEPT)


# lock-step
# -------------------------------------------------------------------------------------------------------


def other() -> HybridLM:
    kept = (0, 2, 3, 5, 8)
    model = tiny_model().slice(ARCH.keep(kept), Selection(kept))
    return HybridLM(FAMILY, model.arch, model.by_name())


def test_students_in_lock_step_learn_what_they_learn_alone(tmp_path: Path) -> None:
    alone = [train(tmp_path / "a"), train(tmp_path / "b", other())]
    asked, pair = Asked(), [Pupil(student(), tmp_path / "c"), Pupil(other(), tmp_path / "d")]
    with pytest.raises(Interrupted):
        distill_together(pair, asked, blocks(), SETTINGS, progress=stop_at(7))
    assert [rows(p.folder)[-1]["step"] for p in pair] == [7, 7]
    ahead = other()  # one of them goes on alone: the other catches up
    train(tmp_path / "d", ahead, stop_at_tokens=12 * STEP_TOKENS)
    pair = [Pupil(student(), tmp_path / "c"), Pupil(other(), tmp_path / "d")]
    done = distill_together(pair, asked, blocks(), SETTINGS)
    assert asked.blocks == 20 * BATCH  # each batch was read once for both
    assert [t.tokens for t in done] == [20 * STEP_TOKENS] * 2
    for pupil, single, name in zip(pair, alone, "ab", strict=True):
        assert_same(pupil.student, single)
        assert rows(pupil.folder) == rows(tmp_path / name)


def test_streams_of_mapped_layers(tmp_path: Path) -> None:
    """The cosine compares what enters each layer with what enters the teacher's layer it was."""
    settings = replace(SETTINGS, tokens=STEP_TOKENS, hidden_loss_weight=0.5)
    train(tmp_path, settings=settings, layers=KEPT)
    row, model, pupil = rows(tmp_path)[0], tiny_model(), student()
    ids = torch.from_numpy(blocks().batch(5, 0, BATCH))

    def streams(arch: Any, by_name: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        x, out = by_name["backbone.embeddings.weight"][ids], []
        for i, kind in enumerate(arch.pattern):
            out.append(x)
            prefix = f"backbone.layers.{i}."
            x = x + block(arch, kind, {n: by_name[prefix + n] for n in arch.layer_weights(i)}, x)
        return out

    theirs, ours = streams(ARCH, model.by_name()), streams(pupil.arch, weights(pupil))
    expected = torch.stack([1 - torch.cosine_similarity(a, theirs[old], dim=-1)
                            for a, old in zip(ours, KEPT, strict=True)]).mean()
    assert row["hidden"] == pytest.approx(float(expected), rel=1e-5)
    assert row["objective"] == pytest.approx(row["kl"] + 0.5 * row["hidden"], rel=1e-6)
    assert float(expected) > 1e-3
    with pytest.raises(InputError, match="layers of 3 of the student's 8"):
        train(tmp_path / "no", settings=settings, layers=(0, 1, 2))


def test_the_lm_loss_alone_needs_no_teacher(tmp_path: Path) -> None:
    longer = replace(SETTINGS, tokens=40 * STEP_TOKENS, kl_weight=0.0, lm_loss_weight=1.0)
    text = replace(blocks(), end_token=3)
    distill_model(student(), None, text, longer, tmp_path)
    found = rows(tmp_path)
    pupil = student()
    ids = torch.from_numpy(text.batch(5, 0, BATCH))
    labels = torch.where(ids[:, :-1] != 3, ids[:, 1:], -1)  # nothing is asked where a document's end was read
    expected, _ = distillation_loss(pupil(ids)[:, :-1].flatten(0, 1), pupil.head, None, labels.flatten(), kl_scale=0.0,
                                    lm_scale=1 / int((labels >= 0).sum()))
    assert found[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert not {"kl", "objective"} & set(found[0])
    assert sum(r["loss"] for r in found[-5:]) < 0.8 * sum(r["loss"] for r in found[:5])
    with pytest.raises(InputError, match="without a teacher"):
        distill_model(student(), None, text, SETTINGS, tmp_path / "no")


def test_ends_of_documents_have_no_part_in_the_kl(tmp_path: Path) -> None:
    text = replace(blocks(), end_token=3)
    one = replace(SETTINGS, tokens=STEP_TOKENS)
    distill_model(student(), tiny_model(), text, one, tmp_path)
    ids = torch.from_numpy(text.batch(5, 0, BATCH))
    mask = (ids != 3).flatten()
    assert 0 < int((~mask).sum()) < 20
    pupil, model = student(), tiny_model()
    p, q = (torch.log_softmax(h.flatten(0, 1)[mask] @ m.head.T, -1)
            for h, m in ((final_hidden(model, ids), model), (pupil(ids), pupil)))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert rows(tmp_path)[0]["kl"] == pytest.approx(expected.item(), rel=1e-5)
