"""Model families, by `model_type`."""

from __future__ import annotations

from minipuzzle.core.errors import UnsupportedModel
from minipuzzle.models.base import Family
from minipuzzle.models.nemotron_h import NemotronH

FAMILIES: dict[str, Family] = {"nemotron_h": NemotronH()}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        UnsupportedModel: there is none.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModel(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
