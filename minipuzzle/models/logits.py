"""Cross entropy, KL and agreement from hidden states, in chunks over tokens: no [tokens, vocabulary] outlives a chunk.

    kl(t) = sum_v p_v (log p_v - log q_v),  p = softmax(h_ref W_ref'),  q = softmax(h W')      nats per token

Shapes: B samples, T tokens of a sample, D hidden, V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def chunk_size(head_VD: torch.Tensor) -> int:
    """Tokens of a chunk: on CPU logits of about 2 MB, which stay in the cache; elsewhere about 1 GB. At least 16."""
    return max(16, (2**19 if head_VD.device.type == "cpu" else 2**28) // len(head_VD))


@dataclass(frozen=True)
class TokenMetrics:
    """Means over the tokens of each sample, [B] float64. KL and agreement are against the reference."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    kl: torch.Tensor
    agreement: torch.Tensor


@torch.no_grad()
def token_metrics(hiddens_BTD: Sequence[torch.Tensor], head_VD: torch.Tensor, ids_BT: torch.Tensor,
                  reference_BTD: torch.Tensor | None = None, reference_head_VD: torch.Tensor | None = None,
                  chunk_tokens: int | None = None) -> list[TokenMetrics]:
    """Next-token loss and accuracy, KL(reference || variant) and greedy agreement, for each of several variants.

    All are over the first T - 1 places, whose next token is known. The reference's probabilities are computed
    once for all variants. Without a reference kl is 0 and agreement 1.
    """
    bsz, seq = ids_BT.shape
    step = max(1, (chunk_tokens or chunk_size(head_VD)) // (seq - 1))
    rows: list[list[torch.Tensor]] = [[] for _ in hiddens_BTD]
    for i in range(0, bsz, step):
        targets = ids_BT[i : i + step, 1:]
        log_p = p = None
        best = targets
        if reference_BTD is not None and reference_head_VD is not None:
            log_p = _log_probs(reference_BTD[i : i + step, :-1], reference_head_VD)
            p, best = log_p.exp(), log_p.argmax(-1)
        for row, hidden in zip(rows, hiddens_BTD, strict=True):
            log_q = _log_probs(hidden[i : i + step, :-1], head_VD)
            guess = log_q.argmax(-1)
            loss = -log_q.gather(-1, targets[..., None]).squeeze(-1)
            parts: list[torch.Tensor] = [loss, torch.eq(guess, targets)]
            if log_p is None or p is None:
                parts += [torch.zeros_like(loss), torch.ones_like(loss)]
            else:
                parts += [(p * (log_p - log_q)).sum(-1), torch.eq(guess, best)]
            row.append(torch.stack([part.double().mean(-1) for part in parts]))
    return [TokenMetrics(*torch.cat(row, 1)) for row in rows]


def _log_probs(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


class _ChunkedKL(torch.autograd.Function):
    """Mean KL over tokens; the gradient (q - p) / tau is made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, temperature, chunk_tokens):  # type: ignore[no-untyped-def]
        count = hidden.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=wide)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for i in range(0, count, chunk_tokens):
            h = hidden[i : i + chunk_tokens]
            log_q = F.log_softmax(F.linear(h, head).to(wide) / temperature, dim=-1)
            log_p = F.log_softmax(F.linear(teacher_hidden[i : i + chunk_tokens], teacher_head).to(wide) / temperature,
                                  dim=-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            delta = ((log_q.exp() - p) / (count * temperature)).to(h.dtype)
            grad_hidden[i : i + chunk_tokens] = delta @ head
            grad_head += (delta.T @ h).to(wide)
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        return total / count

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_head, None, None, None, None


def kl_loss(hidden_nD: torch.Tensor, head_VD: torch.Tensor, teacher_hidden_nD: torch.Tensor,
            teacher_head_VD: torch.Tensor, temperature: float = 1.0,
            chunk_tokens: int | None = None) -> torch.Tensor:
    """KL(teacher || student) in nats, summed over the vocabulary, mean over n tokens; differentiable in the student.

    Forward KL on logits only (Nemotron-H, section 3; Minitron, arXiv:2407.14679, eq. 5), without the factor
    temperature squared.
    """
    loss: torch.Tensor = _ChunkedKL.apply(  # type: ignore[no-untyped-call]
        hidden_nD, head_VD, teacher_hidden_nD, teacher_head_VD, temperature,
        chunk_tokens or chunk_size(head_VD))
    return loss
