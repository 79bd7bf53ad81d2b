"""Cross entropy, KL and agreement from hidden states: no [tokens, vocabulary] outlives a chunk.

    kl(t) = sum_v p_v (log p_v - log q_v) in nats,  p = softmax(z), z = h_ref W_ref';  q =
    softmax(z'), z' = h W' gram_ij(t) = 1/2 Cov_p(z_i - z, z_j - z): the KL to second order is its
    quadratic form (docs/method.md, "Sets")

The LM heads come in chunks of the vocabulary, for heads that do not fit into memory. log-sum-exps
are kept running.

Shapes: M variants, B samples, T tokens of a sample, D hidden, V vocabulary, n tokens of a chunk, v
words of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Rows [start, stop) of every LM head, the reference's first.
HeadRows = Callable[[int, int], Sequence[torch.Tensor]]
# Numbers of one chunk of logits: on CPU those that stay in the cache, elsewhere about 1 GB in
# float32.
CHUNK_FLOATS = {"cpu": 2**19}
WORDS = 2**14  # rows of an LM head at a time, on CPU


def wide_product(x_nD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] in float32 or better: of bf16 factors the exact products, summed in float32.
    Rounded to bf16 they would move a KL by about 1e-3 nats."""
    if x_nD.is_cuda and x_nD.dtype == torch.bfloat16:  # not run on a GPU
        return torch.mm(x_nD, head_VD.to(x_nD.dtype).T, out_dtype=torch.float32)
    wide = torch.promote_types(x_nD.dtype, torch.float32)
    return F.linear(x_nD.to(wide), head_VD.to(wide))


@dataclass(frozen=True)
class TokenMetrics:
    """Means over the tokens of each sample, [B] float64. KL and agreement are against the
    reference."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    kl: torch.Tensor
    agreement: torch.Tensor


@torch.no_grad()
def compare(reference_BTD: torch.Tensor, variants_BTD: Sequence[torch.Tensor], which: Sequence[int],
            head_rows: HeadRows, vocab: int, ids_BT: torch.Tensor, gram: bool = False,
            words: int | None = None, tokens: int | None = None
            ) -> tuple[TokenMetrics, list[TokenMetrics], torch.Tensor | None]:
    """(reference, each variant, gram [B, M, M]) over the first T - 1 places, whose next token is
    known.

    `which[m]` is the place of variant m's head in what `head_rows` returns. `words`, `tokens`: size
    of a chunk. The reference's probabilities are computed once for all variants.
    """
    bsz, seq = ids_BT.shape
    device, count = ids_BT.device, len(variants_BTD)
    hidden = [h[:, :-1].flatten(0, 1) for h in (reference_BTD, *variants_BTD)]
    targets, total = ids_BT[:, 1:].flatten(), bsz * (seq - 1)
    wide = torch.promote_types(reference_BTD.dtype, torch.float32)
    floats = CHUNK_FLOATS.get(device.type, 2**28)
    words = min(words or (WORDS if device.type == "cpu" else vocab), vocab)
    # the Gram matrix needs the logits of all variants at once
    step = tokens or max(16, (8 * floats // max(1, count) if gram else floats) // words)
    lse = torch.full((count + 1, total), -torch.inf, dtype=wide, device=device)
    top = torch.full((count + 1, total), -torch.inf, dtype=wide, device=device)
    best = torch.zeros((count + 1, total), dtype=torch.long, device=device)
    right = torch.zeros((count + 1, total), dtype=wide, device=device)
    moved = torch.zeros((count, total), dtype=wide, device=device)  # E_p[z' - z]
    second = torch.zeros((bsz, count, count), dtype=torch.float64, device=device)

    def see(m: int, at: slice, start: int, logits_nv: torch.Tensor) -> None:
        """The running log-sum-exp, the largest, and the target's."""
        lse[m, at] = torch.logaddexp(lse[m, at], logits_nv.logsumexp(-1))
        value, index = logits_nv.max(-1)
        better = value > top[m, at]
        top[m, at] = torch.where(better, value, top[m, at])
        best[m, at] = torch.where(better, index + start, best[m, at])
        place = targets[at] - start
        here = (place >= 0) & (place < logits_nv.shape[-1])
        found = logits_nv.gather(-1, place.clamp(0, logits_nv.shape[-1] - 1)[:, None]).squeeze(-1)
        right[m, at] = torch.where(here, found, right[m, at])

    starts = range(0, vocab, words)
    places = [slice(i, min(i + step, total)) for i in range(0, total, step)]
    if len(starts) > 1:  # p needs the whole sum first
        for start in starts:
            rows = head_rows(start, min(start + words, vocab))
            for at in places:
                see(0, at, start, wide_product(hidden[0][at], rows[0]))
    for start in starts:
        rows = head_rows(start, min(start + words, vocab))
        for at in places:
            z = wide_product(hidden[0][at], rows[0])
            if len(starts) == 1:
                see(0, at, start, z)
            p = (z - lse[0, at, None]).exp_()
            differences = []
            for m in range(1, count + 1):
                logits = wide_product(hidden[m][at], rows[which[m - 1]])
                see(m, at, start, logits)
                logits -= z
                moved[m - 1, at] += torch.linalg.vecdot(p, logits)
                if gram:
                    differences.append(logits)
            if gram and count:
                _add_gram(second, torch.stack(differences), p, at, seq - 1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return values.double().view(bsz, seq - 1).mean(-1)

    found = []
    for m in range(count + 1):
        kl = torch.zeros_like(lse[0]) if m == 0 else lse[m] - lse[0] - moved[m - 1]
        found.append(TokenMetrics(mean(lse[m] - right[m]), mean(torch.eq(best[m], targets)), mean(kl),
                                  mean(torch.eq(best[m], best[0]))))
    matrix = None
    if gram:
        first = moved.double().view(count, bsz, seq - 1)
        matrix = 0.5 * (second - torch.einsum("ibt,jbt->bij", first, first)) / (seq - 1)
    return found[0], found[1:], matrix


def _add_gram(second_BMM: torch.Tensor, differences_Mnv: torch.Tensor, p_nv: torch.Tensor, at: slice, seq: int) -> None:
    """Add sum over tokens and words of p d_i d_j to the sample that each token of the chunk belongs
    to."""
    differences_Mnv *= p_nv.sqrt()
    for sample in range(at.start // seq, (at.stop - 1) // seq + 1):
        inside = slice(max(at.start, sample * seq) - at.start, min(at.stop, (sample + 1) * seq) - at.start)
        flat = differences_Mnv[:, inside].flatten(1)
        second_BMM[sample] += flat @ flat.T


def token_metrics(hiddens_BTD: Sequence[torch.Tensor], head_VD: torch.Tensor, ids_BT: torch.Tensor,
                  reference_BTD: torch.Tensor | None = None, reference_head_VD: torch.Tensor | None = None,
                  chunk_tokens: int | None = None) -> list[TokenMetrics]:
    """`compare` for variants of one head in memory. Without a reference each is its own: kl 0,
    agreement 1."""
    if reference_BTD is None or reference_head_VD is None:
        return [compare(h, (), (), lambda a, b: (head_VD[a:b],), len(head_VD), ids_BT, tokens=chunk_tokens)[0]
                for h in hiddens_BTD]
    heads = (reference_head_VD, head_VD)
    return compare(reference_BTD, hiddens_BTD, [1] * len(hiddens_BTD), lambda a, b: [h[a:b] for h in heads],
                   len(head_VD), ids_BT, tokens=chunk_tokens)[1]
