"""The reload gate: the written folder must open in stock transformers, in a fresh process, to the same logits.

The process does not know minipuzzle. Both sides use the same dt limit, (0, inf): transformers' own prefill clamps
dt at `time_step_min` (docs/method.md, "The dt limit").
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model

TOLERANCE = 1e-4

_CHILD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
for module in model.modules():
    if hasattr(module, "time_step_limit"):
        module.time_step_limit = (0.0, float("inf"))
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["ids"], use_cache=False).logits
assert not any(name.split(".")[0] == "minipuzzle" for name in sys.modules)
parameters = torch.tensor(sum(p.numel() for p in model.parameters()))
save_file({"logits": logits.contiguous(), "parameters": parameters}, sys.argv[3])
"""


def reload_gate(folder: Path, ids_BT: torch.Tensor) -> float:
    """The largest difference of logits, relative to the largest logit, between this engine and transformers.

    Raises:
        CorruptArtifact: the folder does not load there, has another parameter count, or the difference is above 1e-4.
    """
    opened = open_model(folder)
    model = Model.load(opened)
    mine = final_hidden(model, ids_BT.cpu()) @ model.head.T
    with tempfile.TemporaryDirectory() as scratch:
        given, answer = os.path.join(scratch, "ids"), os.path.join(scratch, "logits")
        save_file({"ids": ids_BT.cpu().contiguous()}, given)
        child = subprocess.run([sys.executable, "-I", "-c", _CHILD, str(folder), given, answer], capture_output=True,
                               text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"})
        if child.returncode:
            reason = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
            raise CorruptArtifact(f"{folder} does not load in transformers: {reason[0]}")
        result = load_file(answer)
    expected = sum(t.numel() for t in model.by_name().values())
    if int(result["parameters"]) != expected:
        raise CorruptArtifact(f"{folder} has {int(result['parameters'])} parameters in transformers, {expected} here")
    difference = float((result["logits"] - mine).abs().max() / mine.abs().max())
    if not difference <= TOLERANCE:
        raise CorruptArtifact(f"{folder} gives other logits in transformers: relative difference {difference:.2e}, "
                              f"limit {TOLERANCE:.0e}")
    return difference
