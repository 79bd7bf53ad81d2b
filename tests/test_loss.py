"""The losses to train on, against plain float64: values and gradients, whatever the chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import pair

from minipuzzle.distill.loss import (
    NO_LABEL,
    Target,
    cosine_loss,
    distillation_loss,
    kl_loss,
    next_tokens,
    top_words,
)


def plain_kl(h: torch.Tensor, w: torch.Tensor, th: torch.Tensor, tw: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Sum over the vocabulary, mean over tokens, with loops instead of the library's own
    functions."""
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


def test_kl_gradient_is_that_of_differences() -> None:
    """torch's gradcheck goes back through one loss twice; ours scales its gradients in place, and
    torch refuses the second time."""
    h, w, th, tw = pair(4, 3, 3, 5)
    h.requires_grad_(), w.requires_grad_()
    loss = kl_loss(h, w, th, tw, 1.5, 3)
    (2.5 * loss).backward(retain_graph=True)
    for tensor in (h, w):
        flat, step = tensor.detach().view(-1), 1e-6
        found = torch.empty_like(flat)
        for i in range(len(flat)):
            sides = []
            for sign in (1, -1):
                flat[i] += sign * step
                sides.append(kl_loss(h, w, th, tw, 1.5, 3).item())
                flat[i] -= sign * step
            found[i] = 2.5 * (sides[0] - sides[1]) / (2 * step)
        assert tensor.grad is not None
        assert torch.allclose(tensor.grad.view(-1), found, rtol=1e-5, atol=1e-8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
    """What autograd saves is the hidden's and the head's gradient, however many tokens there
    are."""
    saved: list[tuple[int, ...]] = []
    h, w, th, tw = (t.float() for t in pair(50, 4, 4, 31))
    h.requires_grad_()
    w.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        kl_loss(h, w, th, tw, chunk=10)
    assert sorted(saved) == [(31, 4), (50, 4)]


# other terms
# -----------------------------------------------------------------------------------------------------

LABELS = torch.tensor([3, NO_LABEL, 0, 10, 7, NO_LABEL, 2, 2, 9, 1, 4, 6, 5])


def plain_top_kl(h: torch.Tensor, w: torch.Tensor, th: torch.Tensor, tw: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """KL on k + 1 events, token by token: the teacher's k best words, and all others together."""
    total = h.new_zeros(())
    for i in range(len(h)):
        p, q = torch.softmax(tw @ th[i] / temperature, 0), torch.softmax(w @ h[i] / temperature, 0)
        words = sorted(range(len(p)), key=lambda v: -float(p[v]))[:k]
        total = total + sum(p[v] * (p[v] / q[v]).log() for v in words)
        others = [v for v in range(len(p)) if v not in words]
        if others:
            rest_p, rest_q = sum(p[v] for v in others), sum(q[v] for v in others)
            total = total + rest_p * (rest_p / rest_q).log()
    return total


def plain_lm(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = h.new_zeros(())
    for i, label in enumerate(LABELS.tolist()):
        if label != NO_LABEL:
            total = total - torch.log_softmax(w @ h[i], 0)[label]
    return total


def cached(th: torch.Tensor, tw: torch.Tensor, k: int, temperature: float) -> Target:
    words, log_p, rest = top_words(torch.log_softmax(th @ tw.T / temperature, -1), k)
    return Target(words_nK=words, log_p_nK=log_p, log_rest_n=rest)


@settings(max_examples=25)
@given(k=st.sampled_from((0, 1, 3, 10, 11)), chunk=st.integers(1, 20), temperature=st.sampled_from((0.5, 1.0, 3.0)),
       kl=st.sampled_from((0.0, 0.4)), lm=st.sampled_from((0.0, 0.3)), seed=st.integers(0, 99), stored=st.booleans())
def test_all_terms_and_their_gradient_are_the_reference(k: int, chunk: int, temperature: float, kl: float, lm: float,
                                                        seed: int, stored: bool) -> None:
    h, w, th, tw = pair(13, seed=seed)
    mine, plain = [t.clone().requires_grad_() for t in (h, w)], [t.clone().requires_grad_() for t in (h, w)]
    target = cached(th, tw, k, temperature) if stored and k else Target(th, tw, top_k=k)
    value, sums = distillation_loss(*mine, target, LABELS, kl_scale=kl, lm_scale=lm, temperature=temperature, chunk=chunk)
    expected_kl = plain_top_kl(*plain, th, tw, k or 11, temperature)
    expected = kl * expected_kl + lm * plain_lm(*plain)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert sums.tolist() == pytest.approx([expected_kl.item() * bool(kl), plain_lm(*plain).item()], rel=1e-10)
    (2 * value).backward()
    (2 * expected).backward()
    for a, b in zip(mine, plain, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_fewer_words_can_only_hide_a_difference() -> None:
    """Joining events never raises a KL; all words but one leave it as it is."""
    h, w, th, tw = pair(40)
    values = [distillation_loss(h, w, Target(th, tw, top_k=k), None, kl_scale=1.0)[0].item() for k in (1, 2, 4, 8, 10, 11, 0)]
    assert values[:-2] == sorted(values[:-2])
    assert values[0] < 0.8 * values[-1]
    assert values[-3:] == pytest.approx([values[-1]] * 3)


def test_a_teacher_that_is_sure_has_no_rest() -> None:
    """All mass on the top words: no NaN where log 0 would stand, in float32."""
    h, w, _, _ = (t.float() for t in pair(6))
    h.requires_grad_()
    words, log_p = torch.arange(6)[:, None] % 11, torch.zeros(6, 1)
    target = Target(words_nK=words, log_p_nK=log_p, log_rest_n=torch.full((6,), -torch.inf))
    value, _ = distillation_loss(h, w, target, None, kl_scale=1.0)
    value.backward()
    expected = -torch.log_softmax(h.detach() @ w.T, -1).gather(1, words).sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert h.grad is not None
    delta = torch.softmax(h.detach() @ w.T, -1) - torch.nn.functional.one_hot(words[:, 0], 11)
    torch.testing.assert_close(h.grad, delta @ w, rtol=1e-4, atol=1e-5)


def test_places_that_are_left_out_have_no_part() -> None:
    h, w, th, tw = pair(13)
    mask = torch.tensor([i % 3 != 1 for i in range(13)])
    target = Target(th, tw)
    some, _ = distillation_loss(h[mask], w, target[mask], LABELS[mask], kl_scale=1.0, lm_scale=1.0)
    assert some.item() == pytest.approx(
        (plain_kl(h[mask], w, th[mask], tw) * int(mask.sum())
         + sum(-torch.log_softmax(w @ h[i], 0)[LABELS[i]] for i in range(13) if mask[i] and LABELS[i] != NO_LABEL)).item())
    stored = cached(th, tw, 4, 1.0)[mask]
    assert stored.words_nK is not None
    assert stored.words_nK.shape == (9, 4)
    nothing, sums = distillation_loss(h[:0].requires_grad_(), w, target[:0], LABELS[:0], kl_scale=1.0, lm_scale=1.0)
    nothing.backward()
    assert nothing.item() == 0
    assert sums.tolist() == [0, 0]


def test_labels_end_with_the_block() -> None:
    assert next_tokens(torch.tensor([[5, 6, 7], [8, 9, 0]])).tolist() == [[6, 7, NO_LABEL], [9, 0, NO_LABEL]]


def test_cosine_of_streams() -> None:
    g = torch.Generator().manual_seed(0)
    a = [torch.randn(2, 3, 8, generator=g) for _ in range(2)]
    b = [torch.randn(2, 3, 8, generator=g) for _ in range(2)]
    mask = torch.tensor([[True, False, True], [True, True, False]])
    expected = sum(1 - float(x[i, t] @ y[i, t] / (x[i, t].norm() * y[i, t].norm()))
                   for x, y in zip(a, b, strict=True) for i in range(2) for t in range(3) if mask[i, t]) / 2
    assert cosine_loss(a, b, mask).item() == pytest.approx(expected, rel=1e-5)
    assert cosine_loss(a, [3 * x for x in a]).item() == pytest.approx(0, abs=1e-5)  # the length does not count


def test_bfloat16_is_accumulated_in_float32() -> None:
    h, w, th, tw = pair(64, 16, 24, 31, scale=1.0)
    narrow: dict[str, Any] = {}
    for dtype in (torch.float64, torch.bfloat16):
        mine = [t.detach().to(dtype, copy=True).requires_grad_() for t in (h, w)]
        value = kl_loss(*mine, th.to(dtype), tw.to(dtype))
        value.backward()
        narrow[str(dtype)] = (value.item(), *(t.grad.double() for t in mine if t.grad is not None))
    (a, ga, gw), (b, gb, gv) = narrow.values()
    assert b == pytest.approx(a, rel=0.03)
    assert (ga - gb).norm() < 0.03 * ga.norm()
    assert (gw - gv).norm() < 0.03 * gw.norm()


def test_a_target_keeps_its_head() -> None:
    _, _, th, tw = pair()
    assert dataclasses.replace(Target(th, tw), top_k=3)[2:5].head_VD is tw
