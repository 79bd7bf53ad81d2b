"""benchmarks/gpu: every step with tiny shapes on the CPU, and what happens to a step that crashes,
hangs or has no time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
GPU = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu/check.py as a module; the steps are beside it."""
    monkeypatch.syspath_prepend(str(GPU))
    import check

    return check


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(GPU))
    import wheels

    return wheels


def tiny(kit: ModuleType, name: str, scratch: Path) -> dict[str, Any]:
    """What a step finds, run as its process runs it; it must be as it should be."""
    assert kit.child(kit.STEPS[name].function, scratch, True) == 0
    data = json.loads((scratch / "found.json").read_text())
    assert data["failures"] == []
    return dict(data["found"])


# the steps
# -------------------------------------------------------------------------------------------------------


def test_scan_and_step_by_the_command(tmp_path: Path) -> None:
    """The whole way: a process for each step, a file each; the same command again makes nothing
    again."""
    out = tmp_path / "results"
    command = [sys.executable, GPU / "check.py", "--tiny", "--steps", "step,scan", "--minutes", "60", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["gpu_scan.json", "gpu_step.json"]
    scan, step = (json.loads((out / f"gpu_{name}.json").read_text()) for name in ("scan", "step"))
    for data in (scan, step):
        assert (data["status"], data["ok"], data["why"], data["tiny"]) == ("ok", True, [], True)
        assert data["hardware"]["cores"] >= 1
        assert data["hardware"]["gpus"] == [] or "driver_version" in data["hardware"]["gpus"][0]
        assert data["versions"]["torch"].startswith("2.")
        assert data["arguments"] == {"steps": ["scan", "step"], "minutes": 60.0, "retry": False}
        assert 0 < data["seconds"] < data["limit_seconds"]
        assert len(data["sources"]) == 16
        assert data["date"].startswith("20")

    rows = scan["found"]["precisions"]
    assert set(rows) == {"fp32, ieee", "fp32, tf32", "bf16"}
    for precision, models in rows.items():
        assert [models[m]["heads"] for m in ("nemotron-h-8b", "nemotron-h-4b", "nemotron-h-56b")] == [16, 14, 32]
        for row in models.values():
            assert set(row["errors"]) == {"y", "x", "dt", "A", "B", "C", "D"}
            worst = max(e["max"] for e in row["errors"].values())
            # bf16 gradients are rounded, which shows that float64 is what it is compared with
            assert 1e-3 < worst < 2e-2 if precision == "bf16" else 1e-9 < worst < 1e-5
            assert row["causality"]["change_before"] == row["causality"]["gradient_of_later_tokens"] == 0
            assert row["causality"]["change_after"] > 0.1
            assert 0.1 < row["dt_below_0.001"] < 0.5

    found = step["found"]
    (attempt,) = found["attempts"]
    assert attempt["stage"] == "after 4 steps"
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in attempt["rows"])
    assert found["tokens_per_second"] == pytest.approx(found["sequence_length"] / attempt["median_seconds"])
    assert found["flops_per_second"] == pytest.approx(found["tokens_per_second"] * found["flops_per_token"])
    # forward of all weights but the embedding, twice that backward for the student; attention and
    # scan add to it
    weights = {m: found[m]["parameters"] - 256 * found[m]["architecture"]["hidden_size"] for m in ("teacher", "student")}
    assert 1 < found["flops_per_token"] / (2 * weights["teacher"] + 6 * weights["student"]) < 1.3
    assert found["settings"]["precision"] == "bf16"

    before = (out / "gpu_scan.json").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("kept from an earlier call") == 2
    assert (out / "gpu_scan.json").stat().st_mtime_ns == before


def test_a_wrong_scan_is_found(kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that is 2 % off, and one that sees the future, both fail and say where."""
    import scan

    from minipuzzle.families.ssd import ssd

    monkeypatch.setattr(scan, "ssd", lambda x, dt, a, b, c, d: ssd(x, dt, a, b * (1.02 if x.dtype != scan.torch.float64 else 1), c, d))
    run = kit.Run(tmp_path, True)
    scan.scan(run)
    assert len(run.failures) >= 2 * len(scan.MODELS)
    assert all("limit" in why for why in run.failures)
    monkeypatch.setattr(scan, "ssd", lambda x, dt, a, b, c, d: ssd(x, dt, a, b, c, d) + x[:, -1:].mean())
    run = kit.Run(tmp_path, True)
    scan.scan(run)
    assert sum("not causal" in why for why in run.failures) == len(scan.MODELS) * len(scan.PRECISIONS)


def test_doctor_says_which_kernels(kit: ModuleType, tmp_path: Path) -> None:
    found = tiny(kit, "doctor", tmp_path)
    assert set(found["kernels"]) == {"scan", "convolution", "block"}
    assert all("needs CUDA, this is cpu" in why for why in found["kernels"].values())
    assert set(found["transformers_kernels"]) == {"causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan",
                                                 "mamba2_selective_state_update"}
    assert all("." in module or "_" in module for module in found["transformers_kernels"].values())
    assert "scan: chunks of 16 and of 64 agree" in [check["name"] for check in found["checks"]]


def test_doctor_asks_for_the_triton_scan_on_a_gpu(kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mamba-ssm the plain scan would run there: that is a failure with its reason."""
    import doctor

    from minipuzzle.families import kernels

    monkeypatch.setattr(doctor, "card", lambda device: {})
    monkeypatch.setattr(doctor, "examine", list)
    monkeypatch.setattr(doctor, "transformers_kernels", dict)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setattr(kernels, "_find", kernels._find.__wrapped__)  # what was found before does not count
    run = kit.Run(tmp_path, False)
    doctor.doctor(run)
    assert len(run.failures) == 1
    assert run.failures[0].startswith("the Triton scan is not in use: mamba_ssm")


def test_prefill_and_decode(kit: ModuleType, tmp_path: Path) -> None:
    for name, new in (("prefill", None), ("decode", 4)):
        found = tiny(kit, name, tmp_path)
        assert set(found["models"]) == {"nemotron-h-8b", "nemotron-h-4b"}
        for model in found["models"].values():
            assert [(r["batch"], r["context"]) for r in model["runs"]] == [(b, 48) for b in ({"prefill": (1, 4), "decode": (1, 32)}[name])]
            for row in model["runs"]:
                assert row["out_of_memory_at"] == []
                assert row.get("new_tokens") == new
                assert len(row["seconds"]) == 3
                assert row["tokens_per_second"] == pytest.approx(row["batch"] * (new or 48) / row["median_seconds"])
        assert found["models"]["nemotron-h-8b"]["parameters"] > found["models"]["nemotron-h-4b"]["parameters"]
        assert len(found["ratio"]) == 2


def test_what_does_not_fit_is_tried_at_half(kit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import generate
    import torch

    def action(batch: int, context: int) -> dict[str, Any]:
        if batch * context > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return {"tokens_per_second": 1.0}

    row = generate.halving(4, 400, "cpu", action)
    assert (row["batch"], row["context"], row["asked_batch"]) == (1, 100, 4)
    assert [(r["batch"], r["context"]) for r in row["out_of_memory_at"]] == [(4, 400), (2, 400), (1, 400), (1, 200)]
    assert generate.halving(4, 8, "cpu", action)["batch"] == 0  # below the least context nothing is tried


def test_a_step_that_does_not_fit_is_a_result(kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import train

    def refuse(self: object, *arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train.Trainer, "backward", refuse)
    monkeypatch.setitem(train.PASS_TOKENS, "cpu", 2 * train.SEQUENCE)
    run = kit.Run(tmp_path, True)
    train.step(run)
    assert [a["sequences_per_pass"] for a in run.found["attempts"]] == [2, 1]
    assert all(a["stage"] == "in the first step" and "2.00 GiB" in a["error"] for a in run.found["attempts"])
    assert run.failures == ["out of memory in the first step: CUDA out of memory. Tried to allocate 2.00 GiB"]


def test_the_plan_is_compared_with_the_peak(kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny(kit, "plan", tmp_path)
    assert found["fits"]
    assert found["found"]["tokens_per_second"] > 0
    import training

    forecast = found["forecast_bytes"]
    for share, wrong in ((0.9, 0), (0.5, 1), (1.2, 1)):
        monkeypatch.setattr(training, "attempt", lambda *asked, s=share: {"peak_allocated_bytes": s * forecast})
        run = kit.Run(tmp_path, True)
        training.plan(run)
        assert len(run.failures) == wrong
    monkeypatch.setattr(training, "attempt", lambda *asked: {"error": "CUDA out of memory"})
    run = kit.Run(tmp_path, True)
    training.plan(run)
    assert run.failures == ["it should fit: CUDA out of memory"]


def test_variants_have_one_loss(kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is refused and said; a variant with another loss is wrong."""
    import training

    from minipuzzle.core.errors import ResourceError

    def missing(*asked: Any) -> None:
        raise ResourceError("no compiler")

    monkeypatch.setattr(training, "check_compiler", missing)
    monkeypatch.setattr(training, "check_8bit", missing)
    found = tiny(kit, "variants", tmp_path)["variants"]
    assert list(found) == ["plain", "checkpointing", "without the fused block", "8-bit moments", "compiled"]
    assert found["compiled"] == found["8-bit moments"] == {"refused": "no compiler"}
    assert found["checkpointing"]["rows"] == found["plain"]["rows"]
    run = kit.Run(tmp_path, True)
    training.compare_losses(run, {"plain": {"rows": [{"loss": 6.0}]}, "other": {"rows": [{"loss": 6.2}]}}, "plain")
    assert run.failures == ["other: the loss differs from plain's by 3.3e-02"]


def test_fp8_and_one_process_of_fsdp(kit: ModuleType, tmp_path: Path) -> None:
    found = tiny(kit, "fp8", tmp_path)
    assert 0.01 < min(found["errors"]["torch._scaled_mm"].values()) < 0.06  # it is fp8
    losses = [found["training"][name]["rows"][0]["loss"] for name in ("bf16", "fp8")]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)
    found = tiny(kit, "nccl", tmp_path)
    assert found["weights_equal"]
    assert found["losses"]["resumed"][0] == pytest.approx(found["losses"]["shards"][2], rel=1e-6)
    assert found["losses"]["plain"] == pytest.approx(found["losses"]["shards"], rel=1e-3)


def test_large_parents(kit: ModuleType, tmp_path: Path) -> None:
    rows = tiny(kit, "score", tmp_path)["precisions"]
    assert [row["rank_correlation"] > 0.89 for row in rows.values()] == [True] * 3
    found = tiny(kit, "stream", tmp_path)
    assert found["bytes_per_second"] == pytest.approx(found["bytes"] / found["read_seconds"])
    models = tiny(kit, "big", tmp_path)["models"]
    assert [models[name]["context"] for name in ("nemotron-h-56b", "nemotron-h-47b")] == [64, 64]
    found = tiny(kit, "moe", tmp_path)
    assert (found["experts"], found["experts_per_token"]) == (8, 2)
    assert 1e-4 < found["error"] < 0.03  # bf16 against float64


def test_prune_is_stopped_and_continued(kit: ModuleType, tmp_path: Path) -> None:
    found = tiny(kit, "prune", tmp_path)
    alone, resumed = found["runs"]["cpu"], found["runs"]["resumed"]
    assert resumed["stopped"]["exit_code"] == 143
    assert resumed["stopped"]["unfinished"]
    assert 1 <= resumed["stopped"]["steps"] < 12
    assert resumed["architecture"] == alone["architecture"]
    assert resumed["loss_distilled"] == pytest.approx(alone["loss_distilled"], rel=1e-5)
    assert alone["loss_distilled"] < alone["loss_pruned"]
    assert 0 <= alone["reload_difference"] <= 1e-4
    assert found["against_cpu"]["scores"] == 0  # the CPU against itself


# a machine with mamba-ssm
# ------------------------------------------------------------------------------------------


@pytest.fixture
def kernels_that_need_a_gpu(tmp_path: Path) -> Path:
    """A mamba_ssm that imports, and refuses tensors of the CPU as Triton does."""
    folder = tmp_path / "site"
    for name in ("mamba_ssm", "mamba_ssm/ops", "mamba_ssm/ops/triton"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    for module, function in (("ssd_combined", "mamba_chunk_scan_combined"), ("selective_state_update", "selective_state_update")):
        (folder / "mamba_ssm" / "ops" / "triton" / f"{module}.py").write_text(
            f"def {function}(*args, **more):\n    raise ValueError('Pointer argument cannot be accessed from Triton')\n")
    return folder


def test_the_gate_computes_without_kernels(kernels_that_need_a_gpu: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes mamba-ssm's kernels wherever they import; the gate computes on the CPU."""
    import torch

    from minipuzzle.surgery.fresh_process import transformers_logits

    monkeypatch.setenv("PYTHONPATH", str(kernels_that_need_a_gpu))
    logits, _ = transformers_logits(model_folder, torch.arange(40)[None], torch.tensor([0, 39]))
    assert logits.shape[:2] == (1, 2)
    assert bool(torch.isfinite(logits).all())


def test_doctor_tells_of_kernels_without_a_gpu(kernels_that_need_a_gpu: Path) -> None:
    """They are installed and no GPU is there: a line of the doctor, no traceback."""
    done = subprocess.run([sys.executable, "-m", "minipuzzle", "doctor", "--json"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(kernels_that_need_a_gpu), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1, done.stderr
    assert [(c["name"], c["value"]) for c in json.loads(done.stdout) if not c["ok"]] == [
        ("transformers computes a Mamba-2 layer on cpu", "Pointer argument cannot be accessed from Triton")]


# the machinery
# ---------------------------------------------------------------------------------------------------

STEPS_OF_A_TEST = '''
import os, subprocess, sys, time

def good(run):
    run.put(answer=42, device=run.device)

def crash(run):
    run.put(before="kept")
    os.abort()

def wrong(run):
    raise ValueError("two\\nlines")

def hang(run):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    run.put(child=child.pid)
    time.sleep(600)

def off(run):
    run.check(1 > 2, "one is not more than two")
    run.put(rest="is made")
'''


@pytest.fixture
def fake(kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kit with steps of our own, found by their processes through PYTHONPATH."""
    (tmp_path / "steps_of_a_test.py").write_text(STEPS_OF_A_TEST)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return kit


def steps(kit: ModuleType, **seconds: float) -> dict[str, Any]:
    return {name: kit.Step(f"steps_of_a_test:{name}", limit) for name, limit in seconds.items()}


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem.removeprefix("gpu_"): json.loads(path.read_text()) for path in out.iterdir()}


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().split(")")[1].split()[0] != "Z"


def test_one_bad_step_takes_no_other_down(fake: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = steps(fake, crash=60, wrong=60, off=60, hang=6, good=60)
    assert fake.run_steps(chosen, out) == {"crash": "failed", "wrong": "failed", "off": "failed", "hang": "timed out", "good": "ok"}
    found = results(out)
    assert len(found) == 5 <= fake.MAX_FILES
    assert found["crash"]["why"] == ["ended by signal 6 (SIGABRT)"]
    assert found["crash"]["found"] == {"before": "kept"}
    assert found["wrong"]["why"] == ["ValueError: two lines"]
    assert any("Traceback" in line for line in found["wrong"]["log"])
    assert found["off"]["why"] == ["one is not more than two"]
    assert found["off"]["found"] == {"rest": "is made"}
    assert found["hang"]["why"] == ["not finished after 6 s"]
    assert not alive(found["hang"]["found"]["child"])  # nor what it had started
    assert found["good"]["found"] == {"answer": 42, "device": "cuda"}
    assert [row["ok"] for row in found.values()].count(True) == 1

    # what was finished or failed is kept; with retry, what was not ok is made again
    (out / "gpu_good.json").write_text("{")  # cannot be read: made again
    dates = {name: (out / f"gpu_{name}.json").stat().st_mtime_ns for name in chosen}
    assert fake.run_steps(chosen, out)["good"] == "ok"
    assert {name for name in chosen if (out / f"gpu_{name}.json").stat().st_mtime_ns != dates[name]} == {"good"}
    fake.run_steps(steps(fake, wrong=60, good=60), out, retry=True)
    assert {name for name in chosen if (out / f"gpu_{name}.json").stat().st_mtime_ns != dates[name]} == {"good", "wrong"}


def test_a_step_without_time_is_not_started(fake: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fake.run_steps(steps(fake, hang=500, good=20), out, minutes=1) == {"hang": "not started", "good": "ok"}
    assert results(out)["hang"]["why"][0].startswith("500 s may be needed, ")
    assert results(out)["hang"]["seconds"] == 0
    # it is not kept: with time it would be made
    assert fake.run_steps(steps(fake, hang=1), out, minutes=1) == {"hang": "timed out"}


def test_a_call_that_is_stopped_says_so(fake: ModuleType, tmp_path: Path) -> None:
    """A SIGTERM to the command: the step is stopped with it, and its file says so; the next call
    makes it."""
    out = tmp_path / "out"
    program = (f"import sys; sys.path.insert(0, {str(GPU)!r}); import check; "
               "check.STEPS.clear(); check.STEPS.update(hang=check.Step('steps_of_a_test:hang', 60), good=check.Step('steps_of_a_test:good', 60)); "
               f"sys.exit(check.main(['--out', {str(out)!r}, '--steps', 'hang,good']))")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("hang: up to 60 s")
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
    assert results(out).keys() == {"hang"}
    assert results(out)["hang"]["status"] == "interrupted"
    assert fake.run_steps(steps(fake, good=60), out) == {"good": "ok"}


def test_at_most_eight_files(fake: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for i in range(8):
        (out / f"other{i}.json").write_text("{}")
    with pytest.raises(SystemExit, match="would hold 9 files, at most 8"):
        fake.run_steps(steps(fake, good=60), out)
    with pytest.raises(SystemExit, match=r"no step nonsense; there are doctor, scan.*, and the sets first, second"):
        fake.chosen("doctor,nonsense")


def test_each_set_fits_in_one_call(kit: ModuleType) -> None:
    assert list(kit.STEPS) == [name for names in kit.SETS.values() for name in names]
    for name, steps in kit.SETS.items():
        chosen = kit.chosen(name)
        assert tuple(chosen) == steps
        assert sum(step.seconds for step in chosen.values()) < 60 * kit.MINUTES < 9 * 60
        assert len(chosen) <= kit.MAX_FILES


# what the machine lacks
# ------------------------------------------------------------------------------------------


def test_what_is_collected_follows_pyproject(wheels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of our dependencies those that the machine has are not collected, unless too old."""
    names = {r.name for r in wheels.lacking()}
    assert {"transformers", "pydantic", "rich", "matplotlib", "huggingface_hub"} <= names
    assert names.isdisjoint({"torch", "numpy", "scipy", "pandas", "safetensors", "click", "datasets"})
    monkeypatch.setitem(wheels.MACHINE, "torch", "2.7.0")
    monkeypatch.setitem(wheels.MACHINE, "transformers", "5.18.0")
    assert {r.name for r in wheels.lacking()} == names - {"transformers"} | {"torch"}


def test_setup_without_a_network(wheels: ModuleType, tmp_path: Path) -> None:
    """A pure wheel, installed twice: what was there before stays in sight, and the second call does
    nothing."""
    folder, env = tmp_path / "wheels", tmp_path / "gpu env"
    folder.mkdir()
    wheel = wheels.write_wheel(folder, "mamba_ssm", "2.3.2", {"mamba_ssm/__init__.py": b"lent = True\n"}, b"Apache-2.0\n")
    assert "mamba_ssm-2.3.2.dist-info/RECORD" in zipfile.ZipFile(wheel).namelist()
    command = ["sh", str(GPU / "setup.sh"), str(env)]
    environment = os.environ | {"WHEELS": str(folder), "PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    wrong = [line for line in done.stdout.splitlines() if line.startswith("WRONG")]
    # no Triton here, and the wheel holds no kernels; all else is found through the new environment
    assert wrong
    assert all("triton" in line for line in wrong), done.stdout + done.stderr
    assert done.returncode == 1
    # -I is how the reload gate starts Python
    program = "import mamba_ssm, torch, minipuzzle; from importlib.metadata import version; print(mamba_ssm.lent, version('mamba-ssm'), minipuzzle.__path__[0])"
    child = subprocess.run([env / "bin" / "python", "-I", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert child.stdout.split(maxsplit=2) == ["True", "2.3.2", f"{ROOT / 'minipuzzle'}\n"], child.stderr
    before = (env / "pyvenv.cfg").stat().st_mtime_ns
    subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert (env / "pyvenv.cfg").stat().st_mtime_ns == before
    empty = subprocess.run(command, capture_output=True, text=True, env=environment | {"WHEELS": str(tmp_path / "none")})
    assert empty.returncode == 2
    assert "make gpu-wheels" in empty.stderr
