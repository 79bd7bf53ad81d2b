"""The reference of all counts: the model that transformers builds from a config.json, on the meta
device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

KINDS = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "ffn", "moe": "moe"}


def build(config: dict[str, Any], device: str = "meta", **options: Any) -> torch.nn.Module:
    values = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "_provenance")}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(values), **options)


def kind_of(model: torch.nn.Module, name: str) -> str:
    """Which of the kinds that `parameters_by_kind` tells apart a parameter belongs to, by its
    name."""
    if "embed" in name or name.startswith("lm_head"):
        return "embedding"
    if ".mixer." in name:
        return KINDS[model.config.layers_block_type[int(name.split(".")[2])]]
    if ".self_attn." in name:
        return "attention"
    if ".mlp." in name:
        return "ffn"
    assert "norm" in name, name
    return "norm"


def counts(model: torch.nn.Module) -> dict[str, int]:
    """total, active and each kind, of a built model. Tied parameters are counted once, buffers not
    at all."""
    out = dict.fromkeys(("embedding", "mamba", "attention", "ffn", "moe", "norm"), 0)
    idle = 0
    for name, parameter in model.named_parameters():
        out[kind_of(model, name)] += parameter.numel()
        if ".mixer.experts." in name:
            experts, used = model.config.n_routed_experts, model.config.num_experts_per_tok
            idle += parameter.numel() // experts * (experts - used)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == sum(out.values())
    return {"total": total, "active": total - idle} | out
