"""Train the small Nemotron-H model that comes with the package, from nothing but the standard
library's source.

    python examples/train_bundled_model.py --work runs/bundled --tokens 14M
    python examples/train_bundled_model.py --work runs/bundled --export minipuzzle/bundled/model

Checkpoints every few minutes; the same command continues. Muon on the matrices of the blocks, AdamW
on the rest; Mamba-2 initialised as its authors do (dt log-uniform in [0.001, 0.1], A uniform in [1,
16]).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.corpus import documents, is_held_out
from minipuzzle.data.writer import tokenize
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.logits import token_metrics
from minipuzzle.models.module import HybridLM
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.pipeline.machine import hardware, versions

END = "<|endoftext|>"
SEED = 0
SEQUENCE_LENGTH, BATCH = 256, 12
ARCHITECTURE = Architecture(
    pattern="M-M-M*-M-M-M-M*-M-M-M-",
    vocab_size=2048,
    hidden_size=96,
    ffn_size=512,
    mamba_num_heads=16,
    mamba_head_dim=16,
    n_groups=4,
    state_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)

CONFIG = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "torch_dtype": "bfloat16",
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "chunk_size": 64, "expand": 2, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
    "mamba_hidden_act": "silu", "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "mlp_bias": False,
    "mlp_hidden_act": "relu2", "max_position_embeddings": 8192, "num_logits_to_keep": 1, "rms_norm_eps": 1e-5,
    "rescale_prenorm_residual": True, "residual_in_fp32": False, "sliding_window": None, "time_step_floor": 1e-4,
    "time_step_max": 0.1, "use_bias": False, "use_cache": True, "use_conv_bias": True,
}


def train_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        bpe.train_from_iterator((text for name, text in documents("stdlib") if not is_held_out(name)), trainer)
        PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END,
                                model_max_length=8192, clean_up_tokenization_spaces=False).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def initial_weights(arch: Architecture) -> dict[str, torch.Tensor]:
    """Mamba-2 as its authors do: dt log-uniform in [0.001, 0.1], A uniform in [1, 16]."""
    gen = torch.Generator().manual_seed(SEED)
    out = {}
    for name, shape in arch.shapes().items():
        leaf = name.split("mixer.")[-1]
        if leaf == "A_log":
            out[name] = torch.empty(shape).uniform_(1, 16, generator=gen).log()
        elif leaf == "dt_bias":
            dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1), generator=gen).exp()
            out[name] = dt + torch.log(-torch.expm1(-dt))  # softplus(dt_bias) = dt
        elif leaf == "D" or "norm" in name:
            out[name] = torch.ones(shape)
        elif leaf in ("conv1d.bias", "gate.e_score_correction_bias"):
            out[name] = torch.zeros(shape)
        elif leaf == "conv1d.weight":
            out[name] = torch.empty(shape).uniform_(-0.5, 0.5, generator=gen)
        elif "embeddings" in name or "lm_head" in name:
            out[name] = torch.empty(shape).normal_(std=0.02, generator=gen)
        else:
            std = 1 / math.sqrt(shape[-1])
            if any(part in leaf for part in ("out_proj", "o_proj", "down_proj")):
                std /= math.sqrt(arch.num_layers)
            out[name] = torch.empty(shape).normal_(std=std, generator=gen)
    return out


def optimizers(model: HybridLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    named = model.parameters_by_name()
    matrices = [p for n, p in named.items() if n.endswith("_proj.weight")]
    tables = [p for n, p in named.items() if "embeddings" in n or "lm_head" in n]
    small = [p for n, p in named.items() if not n.endswith("_proj.weight") and p.dim() != 2]
    assert len(matrices) + len(tables) + len(small) == len(named)
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": tables, "weight_decay": 0.01}, {"params": small, "weight_decay": 0.0}],
                          lr=adam_lr, betas=(0.9, 0.95)),
    ]


def schedule(step: int, steps: int) -> float:
    """Warm-up, constant, then linear to 2 % over the last 45 %."""
    return min((step + 1) / 100, 1.0, max(0.02, (steps - step) / (0.45 * steps)))


def loss_of(model: HybridLM, ids: torch.Tensor) -> torch.Tensor:
    logits = F.linear(model(ids)[:, :-1], model.head)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: HybridLM, ids: torch.Tensor) -> float:
    losses = [loss_of(model, part) for part in ids.split(16)]
    return float(torch.stack(losses).mean())


def train(work: Path, tokens: int, muon_lr: float, adam_lr: float, stop_after: int | None) -> None:
    tokenizer = train_tokenizer(work / "tokenizer", ARCHITECTURE.vocab_size)
    tokenize("stdlib", tokenizer, work / "tokens", "bundled")
    blocks = load_blocks(work / "tokens", "train", SEQUENCE_LENGTH)
    held = load_blocks(work / "tokens", "held_out", SEQUENCE_LENGTH)
    evaluation = torch.from_numpy(held.first(96))
    print(f"{len(blocks)} blocks of {SEQUENCE_LENGTH}, {blocks.bytes_per_token:.2f} bytes a token", flush=True)

    model = HybridLM(ARCHITECTURE.family, ARCHITECTURE, initial_weights(ARCHITECTURE))
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    opts = optimizers(model, muon_lr, adam_lr)
    base = [[group["lr"] for group in opt.param_groups] for opt in opts]
    steps = tokens // (SEQUENCE_LENGTH * BATCH)
    state = work / "state.pt"
    first = 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, value in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(value)
        first = saved["step"]
    log = (work / "log.jsonl").open("a")
    begin, recent = time.perf_counter(), []
    for step in range(first, min(steps, stop_after or steps)):
        factor = schedule(step, steps)
        for opt, rates in zip(opts, base, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = loss_of(model, torch.from_numpy(blocks.batch(SEED, step, BATCH)))
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        recent.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            spent = time.perf_counter() - begin
            row = {"step": step + 1, "tokens": (step + 1) * SEQUENCE_LENGTH * BATCH,
                   "loss": round(sum(recent) / len(recent), 4),
                   "tokens_per_second": round((step + 1 - first) * SEQUENCE_LENGTH * BATCH / spent)}
            if (step + 1) % 500 == 0 or step + 1 == steps:
                row["held_out_loss"] = round(held_out_loss(model, evaluation), 4)
                torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts],
                            "step": step + 1}, work / "state.tmp")
                (work / "state.tmp").replace(state)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
            recent = []


def export(work: Path, folder: Path) -> None:
    """Write the Hugging Face folder in bf16, and measure what was written."""
    saved = torch.load(work / "state.pt", weights_only=True)
    model = HybridLM(ARCHITECTURE.family, ARCHITECTURE, initial_weights(ARCHITECTURE))
    model.load_state_dict(saved["model"])
    weights = {n: p.detach().to(torch.bfloat16) for n, p in model.parameters_by_name().items()}
    write_model(folder, ARCHITECTURE.to_config(CONFIG), weights.items(), work / "tokenizer")
    # the class name that transformers 4 and 5 both know
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(
        dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0), indent=2) + "\n")
    numbers = measure_bundled(folder, work) | {"tokens_trained": saved["step"] * SEQUENCE_LENGTH * BATCH}
    Path("benchmarks/results").mkdir(parents=True, exist_ok=True)
    Path("benchmarks/results/bundled_model.json").write_text(json.dumps(numbers, indent=1) + "\n")
    Path("benchmarks/results/bundled_model_log.jsonl").write_text((work / "log.jsonl").read_text())
    print(json.dumps(numbers, indent=1))


def measure_bundled(folder: Path, work: Path) -> dict:
    """Held-out loss, against gzip -9 on the same bytes, and what zeroing each kind of block
    costs."""
    opened = open_model(folder)
    model = Model.load(opened)
    held = load_blocks(work / "tokens", "held_out", SEQUENCE_LENGTH)
    ids = torch.from_numpy(held.first(len(held)))
    loss = float(nn_loss(model, ids))
    text = b"".join(text.encode() for name, text in documents("stdlib") if is_held_out(name))
    gzipped = len(gzip.compress(text, 9, mtime=0)) * 8 * math.log(2) / len(text)
    without = {}
    for kind in "M*-":
        silent = {n: torch.zeros_like(t) if kind_of(n) == kind else t for n, t in model.by_name().items()}
        without[model.family.kinds[kind].name] = float(
            nn_loss(Model.build(model.family, model.arch, silent.items()), ids)) - loss
    return {"parameters": sum(t.numel() for t in model.by_name().values()), "held_out_tokens": ids.numel(),
            "held_out_bytes": len(text), "loss_nats_per_token": loss, "loss_nats_per_byte": loss / held.bytes_per_token,
            "gzip9_nats_per_byte": gzipped, "loss_increase_without": without, "corpus_hash": held.corpus_hash,
            "date": time.strftime("%Y-%m-%d"), "versions": versions(), "hardware": hardware()}


def kind_of(name: str) -> str | None:
    """The kind of block whose output a weight makes: zeroing it silences the block."""
    ends = {"mixer.out_proj.weight": "M", "mixer.o_proj.weight": "*", "mixer.down_proj.weight": "-"}
    return next((kind for end, kind in ends.items() if name.endswith(end)), None)


@torch.no_grad()
def nn_loss(model: Model, ids: torch.Tensor) -> torch.Tensor:
    parts = [token_metrics([final_hidden(model, part)], model.head, part)[0].loss for part in ids.split(16)]
    return torch.cat(parts).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", default="14M")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--export", type=Path, help="write the trained model to this folder, and measure it")
    parser.add_argument("--stop-after", type=int, help="stop at this step; for trials")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args.work, args.export)
        return
    train(args.work, int(float(args.tokens.rstrip("M")) * 1e6), args.muon_lr, args.adam_lr, args.stop_after)


if __name__ == "__main__":
    sys.exit(main())
