"""Architecture: the layers and widths of a hybrid language model, and their spelling in a config.json.

A pattern is the string of the blocks, one character a layer: `M` Mamba-2, `*` attention, `-` FFN, `E` MoE.
How it stands in a config.json is families/config.py's part for reading and `to_config`'s for writing.

All kinds and both families can be counted (families/cost.py). Only `M * -` of nemotron_h can be pruned so far, which
families/registry.py checks before a weight is read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minipuzzle.core.errors import UnsupportedModel
from minipuzzle.families.config import ATTENTION, FFN, MAMBA, MOE, NEMOTRON, read_pattern, read_values

__all__ = ["ALL_KINDS", "ATTENTION", "FFN", "KINDS", "KIND_NAMES", "MAMBA", "MOE", "Architecture", "read_pattern"]

KINDS = (MAMBA, ATTENTION, FFN)  # what can be scored, searched and pruned
ALL_KINDS = (*KINDS, MOE)  # what can be counted
KIND_NAMES = {MAMBA: "mamba", ATTENTION: "attention", FFN: "ffn", MOE: "moe"}

# What `save_pretrained` adds to a dense model, and what makes other readers take it for another.
_MOE_KEYS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
             "routed_scaling_factor", "output_router_logits", "num_nextn_predict_layers")
_DROPPED_KEYS = (*_MOE_KEYS, "layers_block_type", "layer_types", "time_step_limit", "mamba_dt_limit", "mamba_dt_min",
                 "auto_map", "_provenance", "use_mamba_kernels", "_name_or_path", "dtype")
# The original code and the serving engines do not bound dt. transformers takes `time_step_min` for its lower bound
# where it reads a prompt. Not 0: an initialiser there takes its logarithm.
NO_DT_LIMIT = 1e-30

_NO_MOE: dict[str, Any] = {"n_routed_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0,
                           "moe_shared_expert_intermediate_size": 0, "moe_latent_size": None}


@dataclass(frozen=True)
class Architecture:
    """Layers and widths, all as they are built, none left to a default of others.

    `ffn_size` is one number, or one for each FFN layer in order. A layer is one block on the residual stream with its
    norm: a decoder layer of the dense family `nemotron` is two of them, `*-`, and its `num_layers` is twice the
    `num_hidden_layers` of its config.json. `mtp_pattern` are the multi-token-prediction depths, `"*E"` or `"*E/*E"`:
    no part of the layers. The `moe_*` sizes are those of every E layer; without one they are 0.
    """

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
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    mtp_pattern: str = ""
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern + self.mtp_pattern.replace("/", "")) - set(ALL_KINDS))
        if unknown or not self.pattern:
            raise UnsupportedModel(f"layer pattern {self.pattern!r}: {', '.join(unknown) or 'no layers'}; "
                                   "known kinds are M (Mamba-2), * (attention), - (FFN) and E (MoE)")
        if isinstance(self.ffn_size, tuple) and len(self.ffn_size) != self.pattern.count(FFN):
            raise UnsupportedModel(f"{len(self.ffn_size)} FFN widths for {self.pattern.count(FFN)} FFN layers")
        for what, value, divisor, name in (
            ("mamba_num_heads", self.mamba_num_heads, self.n_groups, "n_groups"),
            ("num_attention_heads", self.num_attention_heads, self.num_key_value_heads, "num_key_value_heads"),
        ):
            if value % divisor:
                raise UnsupportedModel(f"{what} {value} is not a multiple of {name} {divisor}")
        if MOE in self.pattern + self.mtp_pattern and not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise UnsupportedModel(f"num_experts_per_tok {self.num_experts_per_tok}: the MoE layers have "
                                   f"n_routed_experts {self.n_routed_experts} to choose from")

    @property
    def num_layers(self) -> int:
        """Blocks, each with its norm and its residual."""
        return len(self.pattern)

    @property
    def num_hidden_layers(self) -> int:
        """What config.json calls layers: blocks, or for `nemotron` pairs of them."""
        return self.num_layers // 2 if self.model_type == NEMOTRON else self.num_layers

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
        """The architecture with only these layers, in their order, and without MTP, which was made for all of them."""
        widths = self.ffn_size
        if isinstance(widths, tuple):
            widths = tuple(self.ffn_size_of(i) for i in layers if self.pattern[i] == FFN)
        pattern = "".join(self.pattern[i] for i in layers)
        return dataclasses.replace(self, pattern=pattern, ffn_size=widths, mtp_pattern="",
                                   **({} if MOE in pattern else _NO_MOE))

    def __str__(self) -> str:
        kinds = ALL_KINDS if MOE in self.pattern else KINDS
        text = (f"{self.num_layers} layers ({', '.join(f'{self.pattern.count(k)} {KIND_NAMES[k]}' for k in kinds)}), "
                f"hidden {self.hidden_size}")
        if FFN in self.pattern or MOE not in self.pattern:
            text += f", FFN {_range(self.ffn_size)}"
        if MOE in self.pattern:
            text += (f", MoE {self.num_experts_per_tok} of {self.n_routed_experts} experts of "
                     f"{self.moe_intermediate_size} + shared {self.moe_shared_expert_intermediate_size}")
            text += f" (latent {self.moe_latent_size})" if self.moe_latent_size else ""
        return text + (f", Mamba {self.mamba_num_heads} x {self.mamba_head_dim}" if self.mamba_num_heads else "")

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
        """Read a Hugging Face config.json of nemotron_h or nemotron, in any spelling (families/config.py).

        Raises:
            UnsupportedModel: another family, sizes that are no numbers or do not divide, unknown layers.
        """
        return cls(**read_values(config))

    def to_config(self, parent: dict[str, Any]) -> dict[str, Any]:
        """The parent's config.json with this architecture, in the spelling that all engines read.

        Written: `hybrid_override_pattern`, `num_hidden_layers`, `head_dim`; `time_step_min` for equal logits in
        transformers; `d_head` for llama.cpp's converter, which wants a Mamba inner size that it divides and else takes
        64. Left out: the layer list, MoE and MTP keys of a dense model, infinities, remote code. (docs/method.md)

        Raises:
            UnsupportedModel: another family, MoE layers, FFN widths that differ.
        """
        if self.model_type != "nemotron_h" or MOE in self.pattern:
            raise UnsupportedModel(f"a {self.model_type} model with layers {self.pattern} cannot be written yet; "
                                   "only M, * and - of nemotron_h can")
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
            "d_head": self.mamba_head_dim,
            "time_step_min": NO_DT_LIMIT,
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


def _range(size: int | tuple[int, ...]) -> str:
    if isinstance(size, tuple):
        return f"{min(size)}..{max(size)}" if size else "none"
    return str(size)
