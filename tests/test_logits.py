"""Losses from hidden states, in chunks, against plain float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipuzzle.distill.loss import kl_loss
from minipuzzle.models.logits import token_metrics

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def pair(count: int = 13, hidden: int = 5, teacher_hidden: int = 7, vocab: int = 11, scale: float = 2.0,
         seed: int = 0) -> Tensors:
    """Student hidden and head, teacher hidden and head, in float64; the two hidden sizes differ."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((count, hidden), (vocab, hidden), (count, teacher_hidden), (vocab, teacher_hidden))
    a, b, c, d = (torch.randn(shape, generator=g, dtype=torch.float64) * scale**0.5 for shape in shapes)
    return a, b, c, d


def plain_kl(h: torch.Tensor, w: torch.Tensor, th: torch.Tensor, tw: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Sum over the vocabulary, mean over tokens, with loops instead of the library's own functions."""
    total = h.new_zeros(())
    for i in range(len(h)):
        p_logits, q_logits = tw @ th[i] / temperature, w @ h[i] / temperature
        log_p = p_logits - p_logits.max() - (p_logits - p_logits.max()).exp().sum().log()
        log_q = q_logits - q_logits.max() - (q_logits - q_logits.max()).exp().sum().log()
        total = total + sum(log_p[v].exp() * (log_p[v] - log_q[v]) for v in range(len(log_p)))
    return total / len(h)


@settings(max_examples=25)
@given(count=st.integers(1, 20), chunk=st.integers(1, 25), temperature=st.sampled_from((0.5, 1.0, 3.0)), seed=st.integers(0, 99))
def test_kl_and_its_gradient_are_the_reference(count: int, chunk: int, temperature: float, seed: int) -> None:
    h, w, th, tw = pair(count, seed=seed)
    mine, plain = [t.clone().requires_grad_() for t in (h, w)], [t.clone().requires_grad_() for t in (h, w)]
    value = kl_loss(*mine, th, tw, temperature, chunk)
    expected = plain_kl(*plain, th, tw, temperature)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (3 * value).backward()
    (3 * expected).backward()
    for a, b in zip(mine, plain, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)


def test_kl_in_float32_is_the_float64_reference() -> None:
    tensors = pair(200, 16, 24, 97)
    expected = plain_kl(*tensors)
    results = [kl_loss(*(t.float() for t in tensors), chunk=chunk).item() for chunk in (1, 7, 64, 200, 2048)]
    assert len(results) == 5
    assert results == pytest.approx([expected.item()] * 5, rel=1e-5)


def test_kl_gradcheck() -> None:
    h, w, th, tw = pair(4, 3, 3, 5)
    assert torch.autograd.gradcheck(lambda a, b: kl_loss(a, b, th, tw, 1.5, 3), (h.requires_grad_(), w.requires_grad_()))


def test_kl_is_zero_against_itself_and_never_negative() -> None:
    h, w, _, _ = pair()
    h.requires_grad_()
    value = kl_loss(h, w, h.detach(), w)
    value.backward()
    assert abs(value.item()) < 1e-12
    assert h.grad is not None
    assert h.grad.abs().max() < 1e-12
    assert all(kl_loss(*pair(seed=seed)).item() > 0.01 for seed in range(20))


def test_kl_with_logits_of_hundreds_is_finite() -> None:
    h, w, th, tw = (t.float() for t in pair(scale=300.0))
    h.requires_grad_()
    value = kl_loss(h, w, th, tw)
    value.backward()
    assert value.item() == pytest.approx(plain_kl(*(t.detach().double() for t in (h, w, th, tw))).item(), rel=1e-4)
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()


def test_the_direction_is_from_the_teacher() -> None:
    h, w, th, tw = pair()
    assert kl_loss(h, w, th, tw).item() == pytest.approx(plain_kl(h, w, th, tw).item())
    assert abs(kl_loss(th, tw, h, w).item() - plain_kl(h, w, th, tw).item()) > 0.1


def test_nothing_of_the_size_of_the_vocabulary_is_kept_for_the_gradient() -> None:
    """What autograd saves is the hidden's and the head's gradient, however many tokens there are."""
    saved: list[tuple[int, ...]] = []
    h, w, th, tw = (t.float() for t in pair(50, 4, 4, 31))
    h.requires_grad_()
    w.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        kl_loss(h, w, th, tw, chunk=10)
    assert sorted(saved) == [(31, 4), (50, 4)]


# metrics ---------------------------------------------------------------------------------------------------------


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
