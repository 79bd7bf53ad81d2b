"""Peak memory and time of one loss with its backward pass at a large vocabulary, chunked and not,
in one run.

    python benchmarks/distillation_memory.py [--vocab 131072 --hidden 512 --tokens 2048]

Each variant runs in a process of its own, twice; the extra memory is its peak above what it held
before the step. Times are CPU seconds of one thread, the lower of the two: other work on the
machine counts little. `plain` is torch.nn.functional.kl_div on both full log-softmaxes. Liger and
TRL are measured if they are installed and run on this device. Writes
benchmarks/results/distillation_memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

RESULT = Path(__file__).parent / "results" / "distillation_memory.json"
VARIANTS = ("plain", "minipuzzle", "liger", "trl", "plain_low")
REPEATS = 2


def plain(h, w, th, tw):
    log_q, log_p = F.log_softmax(h @ w.T, -1), F.log_softmax(th @ tw.T, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def plain_low(h, w, th, tw):
    """The teacher's side without a graph and as probabilities: what a careful user writes."""
    with torch.no_grad():
        p = F.softmax(th @ tw.T, -1)
    return F.kl_div(F.log_softmax(h @ w.T, -1), p, reduction="batchmean")


def variant(name):
    if name.startswith("plain"):
        return {"plain": plain, "plain_low": plain_low}[name]
    if name.startswith("minipuzzle"):
        from minipuzzle.distill.loss import kl_loss

        chunk = int(name.split("_")[1]) if "_" in name else None
        return lambda h, w, th, tw: kl_loss(h, w, th, tw, chunk=chunk)
    if name == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # its JSD with beta 0 is the forward KL
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False,
                                       chunk_size=64)
        return lambda h, w, th, tw: loss(h, w, th, tw, torch.zeros(len(h), dtype=torch.long))
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # without Triton: its torch path

    return lambda h, w, th, tw: ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, 0.0)[0].mean()


def memory(field):
    """Bytes of VmRSS (held) or VmHWM (peak since the last reset)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def run(name, vocab, hidden, tokens):
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    try:
        loss = variant(name)
    except Exception as error:  # whatever a foreign library does on import is a finding
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    h, th = (torch.randn(tokens, hidden, generator=g) for _ in range(2))
    w, tw = (torch.randn(vocab, hidden, generator=g) / hidden**0.5 for _ in range(2))
    h.requires_grad_()
    w.requires_grad_()
    small = loss(h[:8], w[:1000], th[:8], tw[:1000])  # whatever is set up once
    small.backward()
    h.grad = w.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    try:
        begin, used = time.perf_counter(), time.process_time()
        value = loss(h, w, th, tw)
        value.backward()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - used
    except Exception as error:
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"extra_bytes": memory("VmHWM") - before, "seconds": seconds, "cpu_seconds": cpu, "loss": value.item(),
            "gradient": float(w.grad.norm())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--variant")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run(args.variant, args.vocab, args.hidden, args.tokens)))
        return
    from minipuzzle.pipeline.machine import hardware, versions

    rows = {name: [] for name in VARIANTS}
    for _ in range(REPEATS):  # in turn, so that other work on the machine meets all of them
        for name in VARIANTS:
            if rows[name] and "skipped" in rows[name][0]:
                continue
            command = [sys.executable, __file__, "--variant", name, "--vocab", str(args.vocab), "--hidden",
                       str(args.hidden), "--tokens", str(args.tokens)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, rows[name][-1], flush=True)
    found = {}
    for name, runs in rows.items():
        found[name] = runs[0] if "skipped" in runs[0] else {
            "extra_mib": round(max(r["extra_bytes"] for r in runs) / 2**20, 1),
            "seconds": round(min(r["seconds"] for r in runs), 3),
            "cpu_seconds": round(min(r["cpu_seconds"] for r in runs), 3), "loss": runs[0]["loss"],
            "gradient": runs[0]["gradient"]}
    mine, other = found["minipuzzle"], found["plain"]
    out = {"what": __doc__.splitlines()[0], "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
           "versions": versions() | {package: metadata.version(package) for package, module in
                                     (("liger-kernel", "liger_kernel"), ("trl", "trl")) if find_spec(module)},
           "threads": 1, "vocab": args.vocab, "hidden": args.hidden, "tokens": args.tokens,
           "repeats": REPEATS, "load_average": os.getloadavg(), "variants": found,
           "memory_of_plain": round(mine["extra_mib"] / other["extra_mib"], 3),
           "time_of_plain": round(mine["cpu_seconds"] / other["cpu_seconds"], 3)}
    RESULT.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps({k: out[k] for k in ("memory_of_plain", "time_of_plain")}))


if __name__ == "__main__":
    main()
