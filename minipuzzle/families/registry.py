"""Model families, by `model_type`, and what of them can be pruned."""

from __future__ import annotations

from typing import Any

from minipuzzle.core.errors import UnsupportedModel
from minipuzzle.families.architecture import KINDS, Architecture
from minipuzzle.families.base import Family
from minipuzzle.families.nemotron_h import NemotronH

FAMILIES: dict[str, Family] = {"nemotron_h": NemotronH()}
# Settings of which only one value is computed, and why
_NEEDED = {
    "mlp_hidden_act": ("relu2", "the FFN has no other activation"),
    "mamba_hidden_act": ("silu", "the Mamba block has no other activation"),
    "tie_word_embeddings": (False, "transformers does not honour it for nemotron_h; write the LM head out"),
    "attention_bias": (False, "transformers does not honour it for nemotron_h"),
}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        UnsupportedModel: there is none.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModel(f"model_type {model_type!r} cannot be pruned yet; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def check_prunable(arch: Architecture, config: dict[str, Any]) -> Family:
    """The family of a model that can be scored, pruned and distilled; more models than these can be counted.

    Raises:
        UnsupportedModel: another family, MoE layers, or a setting that the family does not have.
    """
    family = family_of(arch.model_type)
    other = sorted(set(arch.pattern) - set(KINDS))
    if other:
        raise UnsupportedModel(f"{arch.pattern.count(other[0])} of the {arch.num_layers} layers are MoE ({other[0]}), "
                               f"which cannot be pruned yet; supported kinds are {' '.join(KINDS)}")
    for key, (value, why) in _NEEDED.items():
        if config.get(key) not in (None, value):
            raise UnsupportedModel(f"{key} {config[key]!r}: only {value!r} is supported ({why})")
    return family
