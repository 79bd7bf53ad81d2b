"""Train the small MoE hybrid of the tests on the standard library's source.

    python tests/data/train_moe.py --work runs/moe
    python tests/data/train_moe.py --work runs/moe --export tests/data/moe

Random weights do not show a router cut wrongly; these do. The load of the experts is kept even as
in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), without an auxiliary loss: after each step the
correction bias of an expert rises if it had less than its share of the tokens, and falls if more.
Checkpoints every 500 steps; the same command continues.

Suffixes: B batch, T time, N = B T tokens, D hidden, E experts, F their width, K experts of a token.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.corpus import documents, is_held_out
from minipuzzle.data.writer import tokenize
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.mixers import attention, mamba2, rms_norm
from minipuzzle.models.weights import open_model

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_bundled_model as bundled

SEED, SEQUENCE_LENGTH, BATCH, STEPS = 0, 256, 12, 3000
MUON_LR, ADAM_LR, BIAS_RATE = 5e-3, 4e-3, 2e-3
CONFIG = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "torch_dtype": "bfloat16",
    "hybrid_override_pattern": "MEM*EMEM*E", "num_hidden_layers": 10, "vocab_size": 512, "hidden_size": 64,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 64, "intermediate_size": 40, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "attention_bias": False, "mlp_bias": False, "use_bias": False, "use_conv_bias": True, "mamba_proj_bias": False,
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "layer_norm_epsilon": 1e-5, "chunk_size": 64,
    "time_step_min": 1e-30, "time_step_max": 0.1, "time_step_floor": 1e-4, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 8192, "use_cache": True,
}
ARCH = Architecture.from_config(CONFIG)
EXPERTS, CHOSEN, SCALE = ARCH.num_experts, ARCH.experts_per_token, CONFIG["routed_scaling_factor"]
Weights = dict[str, torch.Tensor]


NUMBER = ".{num_experts}."  # in the names of weights that are one for all experts in memory


def initial_weights() -> Weights:
    out = {name.replace(NUMBER, "."): weight for name, weight in bundled.initial_weights(ARCH).items()}
    return {name: weight.requires_grad_("correction_bias" not in name) for name, weight in out.items()}


def moe(w: Weights, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer adds, and the tokens of each expert [E].

    Pairs of token and expert are sorted by expert and padded to the largest load: two batched
    products.
    """
    x_ND = x_BTD.flatten(0, 1)
    score_NE = F.linear(x_ND, w["gate.weight"]).sigmoid()
    chosen_NK = (score_NE + w["gate.e_score_correction_bias"]).topk(CHOSEN, dim=-1).indices
    weight_NK = score_NE.gather(1, chosen_NK)
    weight_NK = SCALE * weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)

    expert = chosen_NK.flatten()
    order = expert.argsort(stable=True)
    load_E = torch.bincount(expert, minlength=EXPERTS)
    most = int(load_E.max())
    place = torch.arange(len(order)) - (load_E.cumsum(0) - load_E)[expert[order]]  # inside its expert
    slot = expert[order] * most + place
    token = order // CHOSEN
    padded = x_ND.new_zeros(EXPERTS * most, x_ND.shape[1]).index_copy(0, slot, x_ND[token])
    inner = F.relu(padded.view(EXPERTS, most, -1) @ w["experts.up_proj.weight"].mT).square()
    out = (inner @ w["experts.down_proj.weight"].mT).flatten(0, 1)[slot] * weight_NK.flatten()[order, None]
    shared = F.relu(F.linear(x_ND, w["shared_experts.up_proj.weight"])).square()
    y_ND = F.linear(shared, w["shared_experts.down_proj.weight"]).index_add(0, token, out)
    return y_ND.view_as(x_BTD), load_E


def forward(weights: Weights, ids_BT: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Next-token loss in nats, and the load of the experts of each MoE layer."""
    x, loads = F.embedding(ids_BT, weights["backbone.embeddings.weight"]), []
    for layer, kind in enumerate(ARCH.pattern):
        prefix = f"backbone.layers.{layer}."
        w = {name.removeprefix(prefix + "mixer."): t for name, t in weights.items() if name.startswith(prefix)}
        normed = rms_norm(x, w.pop(prefix + "norm.weight"), ARCH.norm_eps)
        if kind == "E":
            y, load = moe(w, normed)
            loads.append(load)
        else:
            y = {"M": mamba2, "*": attention}[kind](ARCH, w, normed, None)
        x = x + y
    x = rms_norm(x[:, :-1], weights["backbone.norm_f.weight"], ARCH.norm_eps)
    logits = F.linear(x, weights["lm_head.weight"]).flatten(0, 1)
    return F.cross_entropy(logits, ids_BT[:, 1:].flatten()), loads


class BatchedMuon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for matrices and stacks of them [..., out, in], which torch.optim.Muon does not take.

    Nesterov momentum of 0.95, five steps of Newton-Schulz, an update as large as AdamW's
    (arXiv:2502.16982), weight decay of 0.1.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)
                wide = p.shape[-2] > p.shape[-1]
                x = update.mT if wide else update
                x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.mul_(1 - 0.1 * group["lr"])
                p.add_(x.mT if wide else x, alpha=-0.2 * math.sqrt(max(p.shape[-2:])) * group["lr"])


def optimizers(weights: Weights) -> list[torch.optim.Optimizer]:
    matrices = [t for name, t in weights.items() if name.endswith("_proj.weight")]
    tables = [t for name, t in weights.items() if "embeddings" in name or "lm_head" in name or "gate.weight" in name]
    small = [t for name, t in weights.items() if t.dim() != 2 and t.requires_grad and "_proj.weight" not in name]
    assert len(matrices) + len(tables) + len(small) == sum(t.requires_grad for t in weights.values())
    return [BatchedMuon(matrices, {"lr": MUON_LR}),
            torch.optim.AdamW([{"params": tables, "weight_decay": 0.01}, {"params": small, "weight_decay": 0.0}],
                              lr=ADAM_LR, betas=(0.9, 0.95))]


@torch.no_grad()
def held_out_loss(weights: Weights, ids: torch.Tensor) -> float:
    return sum(float(forward(weights, part)[0]) * len(part) for part in ids.split(16)) / len(ids)


def train(work: Path, stop_after: int) -> None:
    tokenize("stdlib", bundled.train_tokenizer(work / "tokenizer", ARCH.vocab_size), work / "tokens", "moe")
    blocks = load_blocks(work / "tokens", "train", SEQUENCE_LENGTH)
    evaluation = torch.from_numpy(load_blocks(work / "tokens", "held_out", SEQUENCE_LENGTH).first(96))
    weights = initial_weights()
    opts = optimizers(weights)
    rates = [[group["lr"] for group in opt.param_groups] for opt in opts]
    print(f"{sum(t.numel() for t in weights.values())} parameters, {len(blocks)} blocks of {SEQUENCE_LENGTH}, "
          f"{blocks.bytes_per_token:.2f} bytes a token", flush=True)
    state, first = work / "state.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        for name, value in saved["weights"].items():
            weights[name].data.copy_(value)
        for opt, value in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(value)
        first = saved["step"]
    biases = [t for name, t in weights.items() if "correction_bias" in name]
    begin, recent = time.perf_counter(), []
    for step in range(first, min(STEPS, stop_after)):
        for opt, groups in zip(opts, rates, strict=True):
            for group, rate in zip(opt.param_groups, groups, strict=True):
                group["lr"] = rate * bundled.schedule(step, STEPS)
            opt.zero_grad(set_to_none=True)
        loss, loads = forward(weights, torch.from_numpy(blocks.batch(SEED, step, BATCH)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([t for t in weights.values() if t.requires_grad], 1.0)
        for opt in opts:
            opt.step()
        for bias, load in zip(biases, loads, strict=True):
            bias += BIAS_RATE * bundled.schedule(step, STEPS) * torch.sign(load.float().mean() - load)
        recent.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            rate = (step + 1 - first) * SEQUENCE_LENGTH * BATCH / (time.perf_counter() - begin)
            row = {"step": step + 1, "loss": round(sum(recent) / len(recent), 4), "tokens_per_second": round(rate),
                   "largest_load": [round(float(load.max() / load.float().mean()), 2) for load in loads]}
            if (step + 1) % 500 == 0:
                row["held_out_loss"] = round(held_out_loss(weights, evaluation), 4)
                torch.save({"weights": weights, "optimizers": [opt.state_dict() for opt in opts], "step": step + 1},
                           work / "state.tmp")
                (work / "state.tmp").replace(state)
            print(json.dumps(row), flush=True)
            recent = []


def export(work: Path, folder: Path) -> None:
    """The Hugging Face folder, in bf16 and NVIDIA's names, and in its README what the model can do."""
    weights = torch.load(work / "state.pt", weights_only=True)["weights"]
    stored = {name: t if "correction_bias" in name else t.bfloat16() for name, t in weights.items()}
    held = load_blocks(work / "tokens", "held_out", SEQUENCE_LENGTH)
    ids = torch.from_numpy(held.first(len(held)))
    loss = held_out_loss({name: t.float() for name, t in stored.items()}, ids)
    text = b"".join(text.encode() for name, text in documents("stdlib") if is_held_out(name))
    gzipped = len(gzip.compress(text, 9, mtime=0)) * 8 * math.log(2) / len(text)
    counts = Counter(ids.flatten().tolist())
    unigram = -sum(n * math.log(n / ids.numel()) for n in counts.values()) / ids.numel()
    on_disk = {}
    for name, t in stored.items():
        for j, expert in enumerate(t) if ".experts." in name else ((None, t),):
            on_disk[name if j is None else name.replace(".experts.", f".experts.{j}.")] = expert.detach().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(on_disk, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    open_model(folder)  # raises if a name or a shape is wrong
    about = json.loads((work / "tokenizer/tokenizer_config.json").read_text())
    about["tokenizer_class"] = "PreTrainedTokenizerFast"  # which transformers 4 and 5 both know
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "tokenizer.json").write_text((work / "tokenizer/tokenizer.json").read_text())
    size, parameters = held.bytes_per_token, sum(t.numel() for name, t in on_disk.items() if "correction_bias" not in name)
    (folder / "README.md").write_text(
        f"`python tests/data/train_moe.py`: {STEPS * BATCH * SEQUENCE_LENGTH / 1e6:.1f}M tokens of the Python standard "
        f"library, {parameters:,} parameters.\nHeld-out loss {loss:.3f} nats a token "
        f"(unigram entropy {unigram:.3f}), {loss / size:.3f} nats a byte (gzip -9: {gzipped:.3f}).\n")
    print((folder / "README.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stop-after", type=int, default=STEPS, help="stop at this step; for trials")
    parser.add_argument("--export", type=Path, help="write the trained model to this folder, and measure it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args.work, args.export)
    else:
        train(args.work, args.stop_after)


if __name__ == "__main__":
    main()
