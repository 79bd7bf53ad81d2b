"""The mixers that families are made of: their weights, costs, and what is scored in them.

Names are those of families/mixers.py, which computes them. Sizes:

    Mamba-2     I = heads x channels (z, x, the gated norm, out_proj), G groups, N state
    attention   Q = heads x head_dim, KV = KV heads x head_dim
    MoE         E routed experts of width F in contiguous groups, k of them for a token, one shared expert,
                latent size L (or hidden)
"""

from __future__ import annotations

from minipuzzle.families.base import HIDDEN, Mixer

_I, _GN = "mamba_num_heads * mamba_head_dim", "n_groups * state_size"
_CONV = f"{_I} + {_GN} + {_GN}"  # x, B, C
_IN = f"{_I} + {_CONV} + mamba_num_heads"  # z, x, B, C, dt
MAMBA2 = Mixer(
    "mamba2",
    weights={
        "in_proj.weight": (_IN, HIDDEN),
        "conv1d.weight": (_CONV, "1", "conv_kernel"),
        "A_log": ("mamba_num_heads",),
        "D": ("mamba_num_heads",),
        "dt_bias": ("mamba_num_heads",),
        "norm.weight": (_I,),
        "out_proj.weight": (HIDDEN, _I),
    },
    when={"conv_bias": {"conv1d.bias": (_CONV,)},
          "use_bias": {"in_proj.bias": (_IN,), "out_proj.bias": (HIDDEN,)}},
    reads=("in_proj.weight",),
    writes=(("out_proj.weight", "mamba_out"),),
    scores={"mamba": ("mamba_num_heads", "mamba_head_dim")},
    widest=_IN,
    state=f"{_I} * state_size",
    window=_CONV,
    products=f"3 * {_I} * state_size",  # the scan as a recurrence; kernels that work in chunks do more
)

_Q, _KV = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
ATTENTION = Mixer(
    "attention",
    weights={
        "q_proj.weight": (_Q, HIDDEN),
        "k_proj.weight": (_KV, HIDDEN),
        "v_proj.weight": (_KV, HIDDEN),
        "o_proj.weight": (HIDDEN, _Q),
    },
    when={"attention_bias": {"q_proj.bias": (_Q,), "k_proj.bias": (_KV,), "v_proj.bias": (_KV,),
                             "o_proj.bias": (HIDDEN,)}},
    reads=("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    writes=(("o_proj.weight", "attention_out"),),
    widest=f"{_Q} + 2 * {_KV}",
    cache=f"2 * {_KV}",
    attends=f"2 * {_Q}",
)

FFN = Mixer(
    "ffn",
    weights={"up_proj.weight": ("ffn_size", HIDDEN), "down_proj.weight": (HIDDEN, "ffn_size")},
    when={"mlp_bias": {"up_proj.bias": ("ffn_size",), "down_proj.bias": (HIDDEN,)}},
    reads=("up_proj.weight",),
    writes=(("down_proj.weight", "ffn"),),
    scores={"ffn": ("ffn_size",)},
    widest="ffn_size",
)

_L = f"moe_latent_size|{HIDDEN}"
MOE = Mixer(
    "moe",
    weights={
        "gate.weight": ("num_experts", HIDDEN),
        "gate.e_score_correction_bias": ("num_experts",),
        "experts.{num_experts}.up_proj.weight": ("moe_ffn_size", _L),
        "experts.{num_experts}.down_proj.weight": (_L, "moe_ffn_size"),
        "shared_experts.up_proj.weight": ("shared_ffn_size", HIDDEN),
        "shared_experts.down_proj.weight": (HIDDEN, "shared_ffn_size"),
    },
    when={"moe_latent_size": {"fc1_latent_proj.weight": ("moe_latent_size", HIDDEN),
                              "fc2_latent_proj.weight": (HIDDEN, "moe_latent_size")},
          "mlp_bias": {"shared_experts.up_proj.bias": ("shared_ffn_size",),
                       "shared_experts.down_proj.bias": (HIDDEN,)},  # routed experts have none
          "mlp_bias moe_latent_size": {"fc1_latent_proj.bias": ("moe_latent_size",),
                                       "fc2_latent_proj.bias": (HIDDEN,)}},
    reads=("gate.weight", "shared_experts.up_proj.weight", "fc1_latent_proj.weight",
           "experts.{num_experts}.up_proj.weight"),
    # the routed experts write too, but no one matrix: a refit leaves them as they are
    writes=(("shared_experts.down_proj.weight", "moe_shared"), ("fc2_latent_proj.weight", "moe_latent")),
    scores={"moe_experts": ("num_experts",), "moe_neurons": ("num_experts", "moe_ffn_size"),
            "moe_shared": ("shared_ffn_size",), "moe_latent": ("moe_latent_size",)},
    routed=frozenset({"moe_experts"}),
    # the gate is small and decides which experts run: quantisers leave it alone
    unquantised=("gate.weight",),
    buffers=("gate.e_score_correction_bias",),
    settings=("router_groups", "router_groups_used", "norm_topk_prob", "routed_scaling_factor"),
    # the router takes the best two of each group to choose groups
    limits=(("router_groups_used", "router_groups"), ("2 * router_groups", "num_experts"),
            ("experts_per_token * router_groups", "num_experts * router_groups_used")),
    multiples={"moe_ffn_size": 8, _L: 8},  # of 16 bytes at 16 bit, or transformers' grouped product refuses
    active={"num_experts": "experts_per_token"},
    widest=f"experts_per_token * {_L} + experts_per_token * moe_ffn_size + shared_ffn_size",
)
