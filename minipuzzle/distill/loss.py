"""The losses, from hidden states and LM heads in chunks over tokens: neither logits nor their
gradient outlive a chunk.

    kl(t) = sum_v p_v (log p_v - log q_v),  p = softmax(teacher's logits / tau),  q =
    softmax(student's / tau) lm(t) = -log softmax(student's logits)[next token]
    loss  = kl_scale sum_t kl(t) + lm_scale sum_t lm(t)                           nats

Forward KL on logits only is the default (Nemotron-H, arXiv:2504.03624, section 3; Minitron,
arXiv:2407.14679, eq. 5), without the factor tau squared. A teacher known by its top k words and the
mass of the rest is compared on k + 1 events: the k words, and all others together. The gradient by
the logits is (q - p) / tau in both cases; in the second, p of the rest is the teacher's mass spread
as the student spreads its own.

Shapes: n tokens, D hidden, V vocabulary, K words of a cached teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minipuzzle.models.logits import wide_product

NO_LABEL = -1
CHUNK_FLOATS = {"cpu": 2**19, "cuda": 2**28}  # of one chunk of logits


@dataclass(frozen=True)
class Target:
    """What the teacher says of n tokens: activations and LM head, or its top words at the run's
    temperature.

    With `top_k` the head's distribution is reduced to its top words, as a cache would hold it.
    """

    hidden_nD: torch.Tensor | None = None
    head_VD: torch.Tensor | None = None
    top_k: int = 0
    words_nK: torch.Tensor | None = None
    log_p_nK: torch.Tensor | None = None
    log_rest_n: torch.Tensor | None = None

    def __getitem__(self, which: slice | torch.Tensor) -> Target:
        """Some of the tokens."""
        def pick(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t[which]

        return Target(pick(self.hidden_nD), self.head_VD, self.top_k, pick(self.words_nK), pick(self.log_p_nK),
                      pick(self.log_rest_n))

    def log_probs(self, temperature: float, wide: torch.dtype) -> torch.Tensor | None:
        """Of all words [n, V]; None if only the top ones are known."""
        if self.hidden_nD is None or self.head_VD is None:
            return None
        logits = wide_product(self.hidden_nD, self.head_VD).to(wide)
        return F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)


def top_words(log_p_nV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(words [n, k], their log-probabilities [n, k], log of the mass of all others [n], -inf if
    there is none)"""
    log_p, words = log_p_nV.topk(k, dim=-1)
    return words, log_p, log_p_nV.scatter(-1, words, -torch.inf).logsumexp(-1)


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens of a chunk: logits of about 2 MB on CPU, which stay in the cache, 1 GB elsewhere. At
    least 64, since the head and its gradient are read once a chunk."""
    return max(64, CHUNK_FLOATS.get(device.type, CHUNK_FLOATS["cuda"]) // vocab_size)


def loss_kernel(vocab_size: int, device: torch.device) -> str:
    """What computes the loss, for run.json. Liger's was slower on CPU (docs/results.md) and was not
    tried on a GPU."""
    return f"minipuzzle, {chunk_tokens(vocab_size, device)} tokens at a time"


def _kl_chunk(log_q: torch.Tensor, target: Target, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of kl, q - p [n, V])"""
    log_p = target.log_probs(temperature, log_q.dtype)
    if log_p is not None and not target.top_k:
        p = log_p.exp()
        total = log_p.sub_(log_q).mul_(p).sum()
        return total, torch.exp(log_q).sub_(p)
    words, log_pk, log_rest = (top_words(log_p, target.top_k) if log_p is not None else
                               (target.words_nK, target.log_p_nK, target.log_rest_n))
    assert words is not None
    assert log_pk is not None
    assert log_rest is not None
    log_pk, log_rest = log_pk.to(log_q.dtype), log_rest.to(log_q.dtype)
    log_qk, pk = log_q.gather(-1, words), log_pk.exp()
    log_qrest = log_q.scatter(-1, words, -torch.inf).logsumexp(-1)
    rest = log_rest.exp()
    # no mass outside the top words: the term is 0, whatever the student has there
    total = (pk * (log_pk - log_qk)).sum() + torch.where(rest > 0, rest * (log_rest - log_qrest), 0).sum()
    spread = torch.where(rest > 0, (log_rest - log_qrest).exp(), 0)
    delta = log_q.exp() * (1 - spread)[:, None]
    return total, delta.scatter_(-1, words, log_qk.exp() - pk)


class _ChunkedLoss(torch.autograd.Function):
    """(loss, [sum of kl, sum of lm]); the gradient is made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, head, target, labels, temperature, kl_scale, lm_scale, chunk):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight = head.to(hidden.dtype)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=wide)
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        for i in range(0, len(hidden), chunk):
            h = hidden[i : i + chunk]
            logits = wide_product(h, weight)
            delta = log_q = None
            if kl_scale:
                log_q = F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)
                total, delta = _kl_chunk(log_q, target[i : i + chunk], temperature)
                sums[0] += total
                delta.mul_(kl_scale / temperature)
            if labels is not None:
                label = labels[i : i + chunk]
                known = (label != NO_LABEL).to(wide)
                if log_q is None or temperature != 1:
                    log_q = F.log_softmax(logits, dim=-1)
                place = label.clamp(min=0)[:, None]
                sums[1] -= (log_q.gather(-1, place)[:, 0] * known).sum()
            if lm_scale:
                assert log_q is not None
                pull = log_q.exp_().scatter_add_(-1, place, -torch.ones_like(place, dtype=wide))
                pull.mul_((lm_scale * known)[:, None])
                delta = pull if delta is None else delta.add_(pull)
            if delta is None:
                grad_hidden[i : i + chunk] = 0
                continue
            delta = delta.to(h.dtype)
            grad_hidden[i : i + chunk] = delta @ weight
            if h.dtype == wide:
                grad_head.addmm_(delta.T, h)
            else:
                grad_head += delta.T @ h
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        ctx.mark_non_differentiable(sums)
        return kl_scale * sums[0] + lm_scale * sums[1], sums

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        grad_hidden, grad_head = ctx.saved_tensors
        # in place, since the head's is large; torch refuses to go back through the loss again
        return grad_hidden.mul_(grad), grad_head.mul_(grad), None, None, None, None, None, None


def distillation_loss(hidden_nD: torch.Tensor, head_VD: torch.Tensor, target: Target | None,
                      labels_n: torch.Tensor | None, *, kl_scale: float, lm_scale: float = 0.0,
                      temperature: float = 1.0, chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, [sum of kl, sum of lm] over the tokens, not scaled); the loss is differentiable in
    hidden and head.

    `target` may be None if `kl_scale` is 0, `labels_n` if `lm_scale` is; a label of -1 has no lm
    term. With labels the sum of lm is found whatever its scale; that of kl is 0 where its scale is.
    """
    loss, sums = _ChunkedLoss.apply(hidden_nD, head_VD, target, labels_n, temperature, kl_scale,  # type: ignore[no-untyped-call]
                                    lm_scale, chunk or chunk_tokens(len(head_VD), head_VD.device))
    return loss, sums


def kl_loss(hidden_nD: torch.Tensor, head_VD: torch.Tensor, teacher_hidden_nD: torch.Tensor,
            teacher_head_VD: torch.Tensor, temperature: float = 1.0, chunk: int | None = None) -> torch.Tensor:
    """KL(teacher || student) in nats, summed over the vocabulary, mean over n tokens."""
    return distillation_loss(hidden_nD, head_VD, Target(teacher_hidden_nD, teacher_head_VD), None,
                             temperature=temperature, kl_scale=1 / max(1, len(hidden_nD)), chunk=chunk)[0]


def next_tokens(ids_BT: torch.Tensor) -> torch.Tensor:
    """The label of each place, -1 at the last of a block, whose next token is not in it; [B, T]."""
    return F.pad(ids_BT[:, 1:], (0, 1), value=NO_LABEL)


def cosine_loss(streams_BTD: list[torch.Tensor], teacher_BTD: list[torch.Tensor],
                mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over places of 1 - cos(student's stream, teacher's), mean over the mapped layers."""
    each = torch.stack([1 - F.cosine_similarity(a.float(), b.float(), dim=-1)
                        for a, b in zip(streams_BTD, teacher_BTD, strict=True)]).mean(0)
    return (each if mask_BT is None else each[mask_BT]).sum()
