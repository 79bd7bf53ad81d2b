"""Losses from hidden states, in chunks, against plain float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import pair

from minipuzzle.models.logits import token_metrics

# metrics
# ---------------------------------------------------------------------------------------------------------


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def batch(samples: int = 5, seq: int = 9) -> tuple[torch.Tensor, ...]:
    h, w, th, tw = pair(samples * seq)
    ids = torch.randint(0, 11, (samples, seq), generator=torch.Generator().manual_seed(1))
    return h.view(samples, seq, -1), w, th.view(samples, seq, -1), tw, ids


@pytest.mark.parametrize("chunk", [1, 8, 17, 2048])
def test_metrics_are_the_reference(chunk: int) -> None:
    h, w, th, tw, ids = batch()
    found, again = token_metrics([h.float(), h.float() * 0.5], w.float(), ids, th.float(), tw.float(), chunk)
    q, p = log_softmax((h @ w.T).numpy())[:, :-1], log_softmax((th @ tw.T).numpy())[:, :-1]
    targets = ids[:, 1:].numpy()
    assert found.loss.dtype == torch.float64
    np.testing.assert_allclose(found.loss, -np.take_along_axis(q, targets[..., None], -1)[..., 0].mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(-1).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found.accuracy, (q.argmax(-1) == targets).mean(-1))
    np.testing.assert_allclose(found.agreement, (q.argmax(-1) == p.argmax(-1)).mean(-1))
    assert 0 < found.agreement.mean() < 1
    assert 0 < found.accuracy.mean() < 1
    half = log_softmax((h @ w.T).numpy() / 2)[:, :-1]
    np.testing.assert_allclose(again.kl, (np.exp(p) * (p - half)).sum(-1).mean(-1), rtol=1e-5)
    np.testing.assert_array_equal(again.agreement, found.agreement)  # a smaller scale has the same best token


def test_without_a_reference() -> None:
    h, w, _, _, ids = batch()
    (found,) = token_metrics([h], w, ids)
    assert found.kl.tolist() == [0.0] * 5
    assert found.agreement.tolist() == [1.0] * 5
    assert found.loss.min() > 0
    (itself,) = token_metrics([h], w, ids, h, w)
    assert itself.kl.abs().max() < 1e-12
    assert itself.agreement.tolist() == [1.0] * 5


def test_the_last_place_has_no_target() -> None:
    h, w, th, tw, ids = batch()
    other, reference = h.clone(), th.clone()
    other[:, -1], reference[:, -1] = 1e3, -1e3
    (a,), (b,) = token_metrics([h], w, ids, th, tw), token_metrics([other], w, ids, reference, tw)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.kl, b.kl)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11  # the first token is never predicted
    (c,) = token_metrics([h], w, changed, th, tw)
    assert torch.equal(a.loss, c.loss)


def test_low_precision_is_computed_in_float32() -> None:
    h, w, th, tw, ids = batch()
    rounded = [t.bfloat16() for t in (h, w, th, tw)]
    (found,) = token_metrics([rounded[0]], rounded[1], ids, rounded[2], rounded[3])
    (wide,) = token_metrics([rounded[0].double()], rounded[1].double(), ids, rounded[2].double(), rounded[3].double())
    np.testing.assert_allclose(found.loss, wide.loss, rtol=0.02)
