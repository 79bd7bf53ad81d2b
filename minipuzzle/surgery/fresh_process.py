"""Logits by stock transformers, in a fresh process that does not know minipuzzle and runs no code
of the folder.

It is in a session of its own, so that Ctrl-C reaches this process alone, which then ends the other.
How that one ends
decides who is to blame: only an exception there is the folder's fault.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load, save

from minipuzzle.core import interrupt
from minipuzzle.core.budget import human_bytes
from minipuzzle.core.errors import CorruptArtifact, ResourceError

# One that hangs must not hang an unattended run: ten minutes, and what 20 MB/s take to read the
# weights
LIMIT_SECONDS, BYTES_PER_SECOND = 600.0, 20e6
POLL_SECONDS = 0.2

_PROGRAM = """
import os, sys
answer = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what a library prints is no part of the answer
# where these are installed transformers takes their kernels on a CPU too, and they need a GPU
sys.modules["mamba_ssm"] = sys.modules["causal_conv1d"] = None
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM
asked = load(sys.stdin.buffer.read())
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=False,
                                             local_files_only=True).eval()
with torch.no_grad():
    logits = model(asked["ids"], use_cache=False, logits_to_keep=asked["places"]).logits
assert not any(name.split(".")[0] == "minipuzzle" for name in sys.modules)
parameters = torch.tensor(sum(p.numel() for p in model.parameters()))
answer.write(save({"logits": logits.float().contiguous(), "parameters": parameters}))
answer.close()
"""


def transformers_logits(folder: Path, ids_BT: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(logits in float32 at these places of each sample, [B, places, V]; the number of parameters)

    Raises:
        CorruptArtifact: the folder does not load.
        ResourceError: out of memory, or of time.
        Interrupted: a signal came.
    """
    question = save({"ids": ids_BT.contiguous(), "places": places})
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    # -P: nothing is imported from the current folder
    with subprocess.Popen([sys.executable, "-P", "-c", _PROGRAM, str(folder)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                          env=os.environ | quiet) as child:
        try:
            answer, said = _wait(child, question, folder)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
    interrupt.check()
    if child.returncode:
        raise _blame(folder, child.returncode, said.decode(errors="replace"))
    found = load(answer)
    return found["logits"], int(found["parameters"])


def _wait(child: subprocess.Popen[bytes], question: bytes, folder: Path) -> tuple[bytes, bytes]:
    """What the process wrote to stdout and stderr; signals and the limit of time are looked at
    while it runs."""
    weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    begin, limit = time.monotonic(), LIMIT_SECONDS + weights_bytes / BYTES_PER_SECOND
    given: bytes | None = question
    while True:
        try:
            return child.communicate(given, timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            given = None  # the next call goes on with the first one's
        interrupt.check()
        if time.monotonic() - begin > limit:
            raise ResourceError(f"transformers has not answered for {folder} ({human_bytes(weights_bytes)}) in "
                                f"{limit / 60:.0f} minutes; the same command tries again")


def _blame(folder: Path, code: int, said: str) -> Exception:
    """What the end of the process means."""
    if code in (-signal.SIGINT, -signal.SIGTERM):  # sent to every process of a job, as cluster managers do
        return interrupt.Interrupted(-code)
    reason = (said.strip().splitlines() or [f"exit code {code}"])[-1]
    if code == -signal.SIGKILL or "MemoryError" in reason or "can't allocate memory" in said:
        return ResourceError(f"the process that reloads {folder} in transformers ran out of memory"
                             f"{' (it was killed)' if code == -signal.SIGKILL else ''}: it holds the model in float32; "
                             "with more memory the same command continues")
    if code < 0:
        reason = f"the process was ended by signal {-code}"
    return CorruptArtifact(f"{folder} does not load in transformers: {reason}")
