"""Architecture: the layers and widths of a hybrid language model, and their spelling in a config.json.

A pattern is the string of the blocks, one character a layer: `M` Mamba-2, `*` attention, `-` FFN.
Two spellings exist on disk (`hybrid_override_pattern`, `layers_block_type`); both are read, the
first is written, because every engine reads that one (docs/method.md, "The config that travels").
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import CorruptArtifact, RecipeError, UnsupportedModel

MAMBA, ATTENTION, FFN, MOE = "M", "*", "-", "E"
KINDS = (MAMBA, ATTENTION, FFN)
KIND_NAMES = {MAMBA: "mamba", ATTENTION: "attention", FFN: "ffn", MOE: "moe"}
_BLOCK_TYPES = {"mamba": MAMBA, "mamba2": MAMBA, "linear_attention": MAMBA, "attention": ATTENTION,
                "full_attention": ATTENTION, "mlp": FFN, "moe": MOE}
MODEL_TYPES = ("nemotron_h",)

# What `save_pretrained` adds to a dense model, and what makes other readers take it for another.
_MOE_KEYS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
             "routed_scaling_factor", "output_router_logits", "num_nextn_predict_layers")
_DROPPED_KEYS = (*_MOE_KEYS, "layers_block_type", "layer_types", "time_step_limit", "auto_map", "_provenance",
                 "use_mamba_kernels", "_name_or_path", "dtype")


@dataclass(frozen=True)
class Architecture:
    """Layers and widths. `ffn_size` is one number, or one for each FFN layer in order."""

    pattern: str
    vocab_size: int
    hidden_size: int
    ffn_size: int | tuple[int, ...]
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    state_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    conv_kernel: int = 4
    use_bias: bool = False
    conv_bias: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    norm_eps: float = 1e-5
    model_type: str = "nemotron_h"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - set(KINDS))
        if unknown or not self.pattern:
            raise UnsupportedModel(f"layer pattern {self.pattern!r}: {', '.join(unknown) or 'no layers'}; "
                                   "supported kinds are M (Mamba-2), * (attention) and - (FFN); MoE is not yet")
        if isinstance(self.ffn_size, tuple) and len(self.ffn_size) != self.pattern.count(FFN):
            raise UnsupportedModel(f"{len(self.ffn_size)} FFN widths for {self.pattern.count(FFN)} FFN layers")
        for what, value, divisor, name in (
            ("mamba_num_heads", self.mamba_num_heads, self.n_groups, "n_groups"),
            ("num_attention_heads", self.num_attention_heads, self.num_key_value_heads, "num_key_value_heads"),
        ):
            if value % divisor:
                raise UnsupportedModel(f"{what} {value} is not a multiple of {name} {divisor}")

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @property
    def mamba_inner(self) -> int:
        """Channels of a Mamba block: heads x channels of a head."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.mamba_inner + 2 * self.n_groups * self.state_size

    @property
    def heads_per_group(self) -> int:
        return self.mamba_num_heads // self.n_groups

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """0-based indices of the layers of a kind."""
        return tuple(i for i, k in enumerate(self.pattern) if k == kind)

    @property
    def ffn_sizes(self) -> tuple[int, ...]:
        """One width for each FFN layer."""
        return self.ffn_size if isinstance(self.ffn_size, tuple) else (self.ffn_size,) * self.pattern.count(FFN)

    def ffn_size_of(self, layer: int) -> int:
        return self.ffn_sizes[self.pattern[:layer].count(FFN)]

    def keep(self, layers: tuple[int, ...]) -> Architecture:
        """The architecture with only these layers, in their order."""
        widths = self.ffn_size
        if isinstance(widths, tuple):
            widths = tuple(self.ffn_size_of(i) for i in layers if self.pattern[i] == FFN)
        return dataclasses.replace(self, pattern="".join(self.pattern[i] for i in layers), ffn_size=widths)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.pattern.count(k)} {KIND_NAMES[k]}" for k in KINDS)
        ffn = self.ffn_size if isinstance(self.ffn_size, int) else f"{min(self.ffn_size)}..{max(self.ffn_size)}"
        return (f"{self.num_layers} layers ({counts}), hidden {self.hidden_size}, FFN {ffn}, "
                f"Mamba {self.mamba_num_heads} x {self.mamba_head_dim}")

    # json ------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        if isinstance(self.ffn_size, tuple):
            out["ffn_size"] = list(self.ffn_size)
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        values = dict(data)
        if isinstance(values["ffn_size"], list):
            values["ffn_size"] = tuple(values["ffn_size"])
        return cls(**values)

    # config.json -----------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Architecture:
        """Read a Hugging Face config.json in either spelling.

        Raises:
            UnsupportedModel: another family, MoE layers, a missing size, or sizes that do not divide.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UnsupportedModel(f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
        if config.get("tie_word_embeddings"):
            raise UnsupportedModel("tie_word_embeddings is true, which transformers does not honour for nemotron_h; "
                                   "write the LM head out and set it to false")
        for key, usual in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
            if config.get(key, usual) != usual:
                raise UnsupportedModel(f"{key} {config[key]!r}: only {usual!r} is supported")
        try:
            return cls(
                pattern=read_pattern(config),
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                ffn_size=_widths(config["intermediate_size"]),
                mamba_num_heads=config["mamba_num_heads"],
                mamba_head_dim=config["mamba_head_dim"],
                n_groups=_either(config, "n_groups", "mamba_n_groups"),
                state_size=config["ssm_state_size"],
                num_attention_heads=config["num_attention_heads"],
                num_key_value_heads=config["num_key_value_heads"],
                # transformers ignores `attention_head_dim`; its own default is 128, never hidden / heads
                head_dim=config.get("head_dim") or config.get("attention_head_dim") or 128,
                conv_kernel=config.get("conv_kernel", config.get("mamba_d_conv", 4)),
                use_bias=config.get("use_bias", False),
                conv_bias=config.get("use_conv_bias", config.get("mamba_conv_bias", True)),
                mlp_bias=config.get("mlp_bias", False),
                attention_bias=config.get("attention_bias", False),
                norm_eps=config.get("layer_norm_epsilon", 1e-5),
                model_type=model_type,
            )
        except KeyError as missing:
            raise UnsupportedModel(f"config.json has no {missing.args[0]}") from None

    def to_config(self, parent: dict[str, Any]) -> dict[str, Any]:
        """The parent's config.json with this architecture, in the spelling that all engines read.

        Written: `hybrid_override_pattern`, `num_hidden_layers`, `head_dim`. Left out: the layer list,
        MoE and MTP keys of a dense model, infinities, remote code. (docs/method.md)
        """
        out = {k: v for k, v in parent.items() if k not in _DROPPED_KEYS and not k.startswith(("moe_", "mtp_"))}
        ffn = self.ffn_sizes
        if len(set(ffn)) > 1:
            raise UnsupportedModel(f"FFN widths {min(ffn)} to {max(ffn)} differ per layer; nemotron_h has one for all")
        out |= {
            "model_type": self.model_type,
            "architectures": ["NemotronHForCausalLM"],
            "hybrid_override_pattern": self.pattern,
            "num_hidden_layers": self.num_layers,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": ffn[0] if ffn else self.ffn_size,
            "mamba_num_heads": self.mamba_num_heads,
            "mamba_head_dim": self.mamba_head_dim,
            "n_groups": self.n_groups,
            "ssm_state_size": self.state_size,
            "conv_kernel": self.conv_kernel,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "tie_word_embeddings": False,
        }
        if "attention_head_dim" in out:
            out["attention_head_dim"] = self.head_dim
        dtype = parent.get("dtype", parent.get("torch_dtype"))
        if dtype is not None:
            out["torch_dtype"] = dtype
        return out


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, or the file itself.

    Raises:
        RecipeError: there is none.
        CorruptArtifact: it is not a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise RecipeError(f"{path} has no config.json; give a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptArtifact(f"{file} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise CorruptArtifact(f"{file} is not a JSON object")
    return config


def read_pattern(config: dict[str, Any]) -> str:
    """The layer string, from `layers_block_type` (which wins in transformers) or `hybrid_override_pattern`."""
    names = config.get("layers_block_type") or config.get("layer_types")
    if names:
        unknown = sorted(set(names) - set(_BLOCK_TYPES))
        if unknown:
            raise UnsupportedModel(f"unknown layer types {', '.join(unknown)}; known: {', '.join(_BLOCK_TYPES)}")
        return "".join(_BLOCK_TYPES[n] for n in names)
    if not config.get("hybrid_override_pattern"):
        raise UnsupportedModel("config.json has neither hybrid_override_pattern nor layers_block_type")
    # `|` marks pipeline stages, `/` begins the multi-token-prediction part, which is not the model
    return config["hybrid_override_pattern"].split("/")[0].replace("|", "")


def _widths(value: int | list[int]) -> int | tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else value


def _either(config: dict[str, Any], *keys: str) -> Any:
    for key in keys:
        if key in config:
            return config[key]
    raise KeyError(keys[0])
