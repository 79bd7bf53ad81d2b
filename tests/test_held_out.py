"""The held-out text in two parts: of one size, alike, and no document in both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle.core.errors import InputError
from minipuzzle.data.blend import BlendedBlocks
from minipuzzle.data.blocks import TokenBlocks
from minipuzzle.data.held_out import two_parts

END = 0
# tokens of the standard library's held-out documents, by the bundled model's tokenizer
STDLIB = (314, 1531, 94, 25200, 479, 7677, 3387, 182, 4336, 13360, 652, 6190, 853, 5755, 2459, 5477, 3263, 5159, 4744, 4472)


def text(lengths: tuple[int, ...], size: int, ends: bool = True, number: int = 1) -> TokenBlocks:
    """Documents whose tokens are their number, each with its end."""
    tokens = np.concatenate([np.append(np.full(n - 1, number + i), END) for i, n in enumerate(lengths)])
    return TokenBlocks(tokens.astype(np.uint16), size, "text", "hash", 4 * len(tokens), END if ends else None)


def documents(part: np.ndarray) -> set[int]:
    return set(part.ravel().tolist()) - {END}


def test_no_document_selects_and_reports() -> None:
    blocks = text(STDLIB, 256)
    selection, final = two_parts(blocks, 64)
    assert selection.shape == final.shape == (64, 256)
    assert not documents(selection) & documents(final)
    assert documents(selection) | documents(final) >= {4, 6, 10, 12}  # the longest are in one or the other
    again = two_parts(blocks, 64)
    assert np.array_equal(selection, again[0])
    assert np.array_equal(final, again[1])


@given(st.lists(st.integers(1, 60), min_size=2, max_size=60), st.integers(2, 9), st.integers(1, 30))
def test_parts_of_any_text(lengths: list[int], size: int, count: int) -> None:
    """As many blocks as asked for, or nearly half of what is there; of documents not cut, where
    they allow it."""
    blocks = text(tuple(lengths), size)
    if len(blocks) < 2:
        with pytest.raises(InputError, match="less than two blocks"):
            two_parts(blocks, count)
        return
    selection, final = two_parts(blocks, count)
    assert selection.shape == final.shape
    assert min(count, max(1, len(blocks) // 4)) <= len(selection) <= min(count, len(blocks) // 2)
    together = np.bincount(np.concatenate([selection, final]).ravel(), minlength=len(lengths) + 1)
    there = np.bincount(blocks.tokens, minlength=len(lengths) + 1)
    assert (together <= there).all()  # no token twice
    if max(lengths) * 4 <= sum(lengths) and size * 8 <= sum(lengths):
        assert not documents(selection) & documents(final)


@pytest.mark.parametrize("blocks", [text((4000, 60), 8), text((30,) * 130, 8, ends=False)], ids=["one", "no ends"])
def test_where_documents_do_not_part_stretches_do(blocks: TokenBlocks) -> None:
    selection, final = two_parts(blocks, 200)
    assert len(selection) == len(final) > 0.75 * len(blocks) / 2
    places = TokenBlocks(np.arange(len(blocks.tokens)), 8, "text", "hash", 1, None)
    mine, others = (set(p.ravel().tolist()) for p in two_parts(places, 200))
    assert not mine & others
    # both are of the beginning, the middle and the end
    assert np.quantile(sorted(mine), [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(sorted(others), [0.1, 0.5, 0.9]), abs=600)


def test_a_blend_is_parted_by_source() -> None:
    one, two = text((40,) * 50, 8, number=1), text((40,) * 50, 8, number=100)
    selection, final = two_parts(BlendedBlocks((one, two), (0.75, 0.25)), 40)
    for part in (selection, final):
        assert [(part[:30] < 100).all(), (part[30:].max(1) >= 100).all(), len(part)] == [True, True, 40]
    assert not documents(selection) & documents(final)
