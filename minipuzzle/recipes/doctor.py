"""Is this installation able and right? Versions, devices, kernels, and whether the SSM path of transformers is causal.

transformers 5.6 to 5.14 computes Mamba-2 wrongly past one chunk without the CUDA kernels, and a small random model
hides it: its SSM adds nothing. So the check scales the SSM up.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

import torch

from minipuzzle.core.architecture import Architecture
from minipuzzle.models.nemotron_h import NemotronH
from minipuzzle.models.ssd import ssd
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.recipes.results import versions

TOLERANCE = 1e-4


def examine() -> list[dict[str, Any]]:
    """A list of {name, value, ok}."""
    checks = [_check(f"version of {name}", value, True) for name, value in versions().items()]
    checks.append(_check("transformers at least 5.18", metadata.version("transformers"),
                         tuple(int(p) for p in metadata.version("transformers").split(".")[:2]) >= (5, 18)))
    devices = ["cpu"] + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    checks.append(_check("devices", ", ".join(devices), True))
    for package, use in (("mamba_ssm", "Triton scan"), ("causal_conv1d", "CUDA convolution"),
                         ("transformer_engine", "fp8"), ("lm_eval", "tasks")):
        found = importlib.util.find_spec(package) is not None
        checks.append(_check(f"{package} ({use})", "installed" if found else "not installed (optional)", True))
    checks += [_chunks(), *_transformers()]
    return checks


def _check(name: str, value: str, ok: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "ok": bool(ok)}


def _error(name: str, value: float) -> dict[str, Any]:
    return _check(name, f"relative error {value:.1e} (limit {TOLERANCE:.0e})", value <= TOLERANCE)


def _chunks() -> dict[str, Any]:
    """Our own scan must not depend on the size of its chunks."""
    gen = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(2, 150, n, 8, generator=gen) for n in (8, 2, 2))
    dt, a, d = torch.rand(2, 150, 8, generator=gen), -torch.rand(8, generator=gen), torch.ones(8)
    one, other = ssd(x, dt, a, b, c, d, 16), ssd(x, dt, a, b, c, d, 64)
    return _error("scan: chunks of 16 and of 64 agree", float((one - other).abs().max() / other.abs().max()))


def _transformers() -> list[dict[str, Any]]:
    """Causality and agreement with our own forward pass, past one chunk, with an SSM that matters."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(vocab_size=64, hidden_size=32, intermediate_size=64, hybrid_override_pattern="M-M*-",
                             mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=16, chunk_size=32,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    torch.manual_seed(0)
    model = NemotronHForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "in_proj" in name or "out_proj" in name:
            parameter.data *= 15
        if "A_log" in name:
            parameter.data.fill_(-2.0)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    ids = torch.randint(0, 64, (1, 100))
    changed = ids.clone()
    changed[:, 80:] = (changed[:, 80:] + 1) % 64
    with torch.no_grad():
        logits, other = (model(i, use_cache=False).logits for i in (ids, changed))
    scale = logits.abs().max()
    arch = Architecture.from_config(config.to_dict())
    tensors = ((n.replace("model.", "backbone.", 1), p.detach()) for n, p in model.named_parameters())
    mine = Model.build(NemotronH(), arch, tensors)
    ours = final_hidden(mine, ids) @ mine.head.T
    leak = float((logits - other)[:, :80].abs().max() / scale)
    return [_error("transformers: the past does not see the future", leak),
            _error("transformers and minipuzzle agree past one chunk", float((logits - ours).abs().max() / scale))]
