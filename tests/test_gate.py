"""The reload gate: stock transformers on the untouched folder, in a process of its own, however
that one ends."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from tiny import ARCH, FAMILY, config_of, relative, tokens, trained_like

from minipuzzle.core.errors import CorruptArtifact, MinipuzzleError, ResourceError
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.models.weights import write_model
from minipuzzle.surgery import fresh_process
from minipuzzle.surgery.gate import reload_gate, sample_logits


def small_steps() -> dict[str, torch.Tensor]:
    """Weights whose dt is often below 0.001, where transformers' own limit is."""
    return {n: t - 4 if n.endswith("dt_bias") else t for n, t in trained_like(ARCH).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "model"
    write_model(path, ARCH.to_config(config_of(ARCH)), small_steps().items())
    return path


def test_the_folder_is_taken_as_it_lies_there(folder: Path, tmp_path: Path) -> None:
    """No patch is needed, none is made, and code in the folder does not run, whoever put it
    there."""
    config, ids = json.loads((folder / "config.json").read_text()), tokens(3, 400)
    wanted = sample_logits(FAMILY, ARCH, small_steps().items(), ids)
    assert wanted.shape == (1, 64, ARCH.vocab_size)
    mine = folder / "evil.py"
    mine.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "config.json").write_text(json.dumps(config | {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}))
    assert reload_gate(folder, ids, wanted) < 1e-5
    assert not (tmp_path / "ran").exists()
    (folder / "config.json").write_text(json.dumps(config | {"time_step_min": 0.001}))  # as published models have it
    with pytest.raises(CorruptArtifact, match=r"than the student in memory: relative difference 1\.\d\de-01"):
        reload_gate(folder, ids, wanted)


def test_places_cover_the_sample() -> None:
    ids = tokens(1, 400)
    weights = trained_like(ARCH)
    every = torch.cat([sample_logits(FAMILY, ARCH, weights.items(), ids[:, :n])[:, -1:] for n in (1, 64, 400)], 1)
    some = sample_logits(FAMILY, ARCH, weights.items(), ids)
    assert relative(some[:, [0, -1]], every[:, [0, -1]]) < 1e-6  # the first token and the last
    assert [len(sample_logits(FAMILY, ARCH, weights.items(), tokens(3, n))) for n in (600, 257, 256, 8)] == [1, 1, 2, 2]
    assert sample_logits(FAMILY, ARCH, weights.items(), ids[:, :64]).shape[1] == 64
    assert sample_logits(FAMILY, ARCH, weights.items(), ids[:1, :5]).shape[:2] == (1, 5)


@pytest.mark.parametrize(("program", "error", "code", "message"), [
    ("raise ValueError('no such thing')", CorruptArtifact, 5, "does not load in transformers: ValueError: no such thing"),
    ("import os; os.kill(os.getpid(), 11)", CorruptArtifact, 5, "ended by signal 11"),
    ("import os; os.kill(os.getpid(), 9)", ResourceError, 6, r"ran out of memory \(it was killed\)"),
    ("raise MemoryError", ResourceError, 6, "ran out of memory: it holds the model in float32"),
    ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')", ResourceError, 6, "out of memory"),
    ("import os; os.kill(os.getpid(), 2)", Interrupted, 130, "same command continues"),
    ("import os; os.kill(os.getpid(), 15)", Interrupted, 143, "same command continues"),
    ("import time; time.sleep(100)", ResourceError, 6, "not answered .* in 0 minutes"),
])
def test_however_the_process_ends(folder: Path, program: str, error: type[MinipuzzleError], code: int, message: str,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_process, "_PROGRAM", program)
    if "sleep" in program:
        monkeypatch.setattr(fresh_process, "LIMIT_SECONDS", 0.1)
    with pytest.raises(error, match=message) as found:
        reload_gate(folder, tokens(2, 40), torch.zeros(()))
    assert found.value.exit_code == code


def test_a_process_that_is_given_up_is_ended_with_its_children(folder: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pids"
    monkeypatch.setattr(fresh_process, "_PROGRAM", f"""
import os, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(note)!r}, "w").write(f"{{os.getpid()}} {{other.pid}}")
time.sleep(100)
""")
    begin = time.monotonic()

    def check() -> None:
        if note.exists() and note.read_text():
            raise Interrupted(2)
        assert time.monotonic() - begin < 60

    monkeypatch.setattr(fresh_process.interrupt, "check", check)
    with pytest.raises(Interrupted):
        reload_gate(folder, tokens(2, 40), torch.zeros(()))
    mine, other = map(int, note.read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(mine, 0)
    while True:  # the other one is init's now, which may take a moment
        try:
            state = Path(f"/proc/{other}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            break
        if state == "Z":
            break
        assert time.monotonic() - begin < 60
        time.sleep(0.01)
