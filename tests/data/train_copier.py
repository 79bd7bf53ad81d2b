"""Train the tiny copying hybrid of the tests (about a minute).

    PYTHONPATH=tests python tests/data/train_copier.py            -> tests/data/copier

Random tokens, and after them the same in blocks of 8 that are shuffled: only who finds a token's
first occurrence knows the next. So one attention layer learns to copy, and the tests know where it
sits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tiny
import torch
import torch.nn.functional as F

from minipuzzle.models.module import HybridLM

ARCH = replace(tiny.ARCH, pattern="M*M*", vocab_size=64)
STEPS, BATCH, HALF, BLOCK, LEARNING_RATE = 1200, 16, 16, 8, 1e-2


def initial_weights() -> dict[str, torch.Tensor]:
    """The tests' own, whose SSM is scaled up, with small matrices."""
    return {name: torch.randn_like(w) * 0.05 if w.ndim == 2 else w for name, w in tiny.trained_like(ARCH).items()}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = HybridLM(ARCH.family, ARCH, initial_weights())
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(STEPS):
        first = torch.randint(0, ARCH.vocab_size, (BATCH, HALF))
        again = first.view(BATCH, -1, BLOCK)[:, torch.randperm(HALF // BLOCK)].flatten(1)
        ids = torch.cat([first, again], 1)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (1 - step / STEPS)
        logits = model.lm_head(model(ids), lambda hidden, head: hidden @ head.T)[:, HALF:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, HALF + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(step + 1, round(loss.item(), 3), flush=True)
    tiny.write_folder(Path(__file__).parent / "copier", ARCH,
                      {n: p.detach().bfloat16() for n, p in model.parameters_by_name().items()}, torch_dtype="bfloat16")


if __name__ == "__main__":
    main()
