"""Nemotron-4 and Minitron: dense decoder layers, each attention and then an FFN. Only counted so
far.

Defaults are those of transformers' NemotronConfig. Its LayerNorm1P has a bias beside the weight.
"""

from __future__ import annotations

from minipuzzle.families import blocks
from minipuzzle.families.base import Axis, Config, Family, Kind
from minipuzzle.families.config import MOST_LAYERS, epsilon, flag, size

_PAIR = "*-"  # a decoder layer


def _read(config: Config) -> Config:
    hidden, heads = size(config, 6144, "hidden_size"), size(config, 48, "num_attention_heads")
    return {
        "model_type": "nemotron",
        "pattern": _PAIR * size(config, 32, "num_hidden_layers", most=MOST_LAYERS // 2),
        "vocab_size": size(config, 256000, "vocab_size"),
        "hidden_size": hidden,
        "ffn_size": size(config, 24576, "intermediate_size"),
        "mamba_num_heads": 0,
        "mamba_head_dim": 0,
        "n_groups": 1,
        "state_size": 0,
        "num_attention_heads": heads,
        "num_key_value_heads": size(config, heads, "num_key_value_heads"),
        "head_dim": size(config, hidden // heads, "head_dim"),
        "mlp_bias": flag(config, False, "mlp_bias"),
        "attention_bias": flag(config, False, "attention_bias"),
        "norm_eps": epsilon(config, "norm_eps"),
        "tie_word_embeddings": flag(config, False, "tie_word_embeddings"),
    }


NEMOTRON = Family(
    model_type="nemotron",
    kinds={
        "*": Kind("*", "attention", "attention", {"self_attn.": blocks.ATTENTION},
                  norm=("input_layernorm.weight", "input_layernorm.bias")),
        "-": Kind("-", "ffn", "FFN", {"mlp.": blocks.FFN},
                  norm=("post_attention_layernorm.weight", "post_attention_layernorm.bias")),
    },
    axes={axis.name: axis for axis in (
        Axis("hidden_size", "hidden size", "hidden", "hidden {hidden_size}"),
        Axis("ffn_size", "FFN width", "FFN", "FFN {ffn_size}"),
        Axis("num_attention_heads", "attention heads", groups="num_key_value_heads", fixed="not implemented yet"),
    )},
    embedding_name="model.embed_tokens.weight",
    norm_names=("model.norm.weight", "model.norm.bias"),
    head_name="lm_head.weight",
    layer_prefix=lambda layer: f"model.layers.{layer // 2}.",
    read=_read,
    units={_PAIR: "decoder"},
)
