"""The cache as vLLM allocates it for hybrid models: pages of one size for all layers.

From vLLM's source, not from a run. The page of a layer with a recurrent state holds the state of a
sequence; the block of attention grows until its page is at least as large, in steps of 16 tokens;
every page is padded to it. Layers of each kind are put into groups of one size, the smaller of the
two numbers of layers (the larger if it is less than 1.5 times that), and padded with empty layers.
So removing one layer may only turn it into padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK_TOKENS = 16  # the attention block grows in steps of these
UTILISATION = 0.92  # part of the card that vLLM takes (gpu_memory_utilization)


@dataclass(frozen=True)
class Pages:
    """Of one sequence; integers, or int64 arrays of many at once."""

    block_tokens: Any  # tokens of attention in a page
    page_bytes: Any
    group_layers: Any  # layers of a group, padding included
    padding_layers: Any
    cache_bytes: Any


def paged(attention: Any, recurrent: Any, token_bytes: Any, state_bytes: Any,
          context: int) -> Pages:
    """The pages of a sequence of `context` tokens.

    `attention`, `recurrent`: layers with a KV cache and with a state. `token_bytes`: the KV cache
    of a layer for a token. `state_bytes`: state and conv window of a layer for a sequence.
    """
    attention, recurrent = np.asarray(attention, np.int64), np.asarray(recurrent, np.int64)
    token_bytes, state_bytes = np.maximum(token_bytes, 1), np.asarray(state_bytes, np.int64)
    hybrid = (attention > 0) & (recurrent > 0)
    steps = np.where(hybrid, _up(state_bytes, BLOCK_TOKENS * token_bytes), 1)
    block = BLOCK_TOKENS * np.maximum(steps, 1)
    page = np.where(attention > 0, block * token_bytes, state_bytes)
    few, many = np.minimum(attention, recurrent), np.maximum(attention, recurrent)
    group = np.where((few == 0) | (2 * many < 3 * few), many, few)
    group = np.maximum(group, 1)
    attention_groups, recurrent_groups = _up(attention, group), _up(recurrent, group)
    pages = attention_groups * _up(context, block) + recurrent_groups
    padding = (attention_groups + recurrent_groups) * group - attention - recurrent
    return Pages(block, page, group, padding, group * page * pages)


def _up(amount: Any, each: Any) -> Any:
    return -(-amount // each)
