"""What the code does on a GPU, in steps of one JSON file each, in two sets of under 9 minutes.

    python benchmarks/gpu/check.py --out DIR [--steps first|second|doctor,scan,...]
                                   [--minutes 8.8] [--retry] [--tiny]

A step runs in a process of its own, so that a crash, a full memory or a hang takes nothing else
down. At its limit its process group is killed; what it had found by then is kept.
DIR/gpu_STEP.json says what was found, on which hardware, and whether it is as it should be ("ok")
or why not ("why").

The same command goes on: a step whose file says that it was finished, failed or timed out is
skipped (`--retry` makes the last two again), one that was not started or was interrupted is made.
A step whose limit is longer than what is left of `--minutes` is not started, so no call runs over.
`--tiny` is the same with small shapes on a CPU: the tests use it.

This file needs nothing but Python; the steps need minipuzzle and what setup.sh installs. A step is
a function of `Run` in a module beside this file, and a row of STEPS.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MAX_FILES = 8  # of DIR: some ways to bring results back take no more
MINUTES = 8.8
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "mamba-ssm",
    "causal-conv1d",
    "numpy",
    "scipy",
    "pandas",
    "safetensors",
    "tokenizers",
    "pydantic",
)
KEPT = ("ok", "failed", "timed out")  # a step with this status is not made again
LOG_LINES = 40


@dataclass(frozen=True)
class Step:
    """`function` is "module:function"; `seconds` its limit, imports and compilation of kernels
    included; `environment` is added to that of its process.
    """

    function: str
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


# mamba-ssm compiles and tries about ten configurations of each of its kernels. Where speed is not
# the question one is taken; where it is, the choice is kept for the next process.
ONE = {"MAMBA_DETERMINISTIC": "1"}
FASTEST = {"TRITON_CACHE_AUTOTUNING": "1"}
# In the order in which they run: what says most about the installation first.
STEPS: dict[str, Step] = {
    "doctor": Step("doctor:doctor", 45, ONE),
    "scan": Step("scan:scan", 90, ONE),
    "prune": Step("prune:prune", 110, ONE),
    "step": Step("train:step", 170, FASTEST),
    "prefill": Step("generate:prefill", 70, FASTEST),
    "decode": Step("generate:decode", 40, FASTEST),
    "plan": Step("training:plan", 90, FASTEST),
    "variants": Step("training:variants", 115, FASTEST),
    "score": Step("large:score", 60, FASTEST),
    "stream": Step("large:stream", 75, ONE),
    "big": Step("large:big", 70, FASTEST),
    "moe": Step("large:moe", 35, ONE),
    "fp8": Step("training:fp8", 40, FASTEST),
    "nccl": Step("training:nccl", 40, ONE),
}
# Each fits into one call, and its files into one folder: --steps SET
SETS = {
    "first": ("doctor", "scan", "prune", "step", "prefill", "decode"),
    "second": ("plan", "variants", "score", "stream", "big", "moe", "fp8", "nccl"),
}


class Run:
    """What a step gets: where it runs, a folder for its files, and where it puts what it finds."""

    def __init__(self, scratch: Path, tiny: bool) -> None:
        self.scratch, self.tiny = scratch, tiny
        self.device = "cpu" if tiny else "cuda"
        self.found: dict[str, Any] = {}
        self.failures: list[str] = []

    def put(self, **values: Any) -> None:
        """Keep what was found so far, also if the step does not come to its end."""
        self.found |= values
        self._write()

    def check(self, ok: bool, why: str) -> None:
        """Where `ok` does not hold, the step goes on but is not ok, and says why."""
        if not ok:
            self.failures.append(why)
            self._write()

    def _write(self) -> None:
        write_json(self.scratch / "found.json", {"found": self.found, "failures": self.failures})


# one step, in a process of its own
# ---------------------------------------------------------------------


def child(function: str, scratch: Path, tiny: bool) -> int:
    """Run one step; 0 where it came to its end, ok or not."""
    run = Run(scratch, tiny)
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(run)
    except Exception as error:  # whatever a step raises is its result
        traceback.print_exc()
        text = " ".join(str(error).split())
        run.check(False, f"{type(error).__name__}: {text[:500]}")
        return 1
    run.put()
    return 0


# all steps
# ---------------------------------------------------------------------------------------------


def run_steps(
    steps: Mapping[str, Step],
    out: Path,
    minutes: float = MINUTES,
    tiny: bool = False,
    retry: bool = False,
) -> dict[str, str]:
    """Run the steps that `out` has no result of; step -> its status now."""
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in out.iterdir()} - {result_path(out, name).name for name in steps}
    if len(others) + len(steps) > MAX_FILES:
        raise SystemExit(
            f"check.py: {out} would hold {len(others) + len(steps)} files, at most {MAX_FILES}: "
            "choose fewer --steps, or another --out"
        )
    about = {"hardware": hardware(), "versions": versions(), "tiny": tiny}
    about |= {"commit": commit(), "sources": sources()}
    statuses = {}
    for name, step in steps.items():
        before = earlier(result_path(out, name))
        if before in KEPT and not (retry and before != "ok"):
            print(f"{name}: {before}, kept from an earlier call", flush=True)
            statuses[name] = before
            continue
        left = end - time.monotonic()
        common = about | {
            "step": name,
            "limit_seconds": step.seconds,
            "environment": dict(step.environment),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "arguments": {"steps": list(steps), "minutes": minutes, "retry": retry},
        }
        if step.seconds > left:
            result = {
                "status": "not started",
                "seconds": 0.0,
                "found": {},
                "why": [
                    f"{step.seconds:.0f} s may be needed, {max(0.0, left):.0f} s were left"
                ],
            }
        else:
            print(f"{name}: up to {step.seconds:.0f} s ...", flush=True)
            result = one(step, tiny)
        status = statuses[name] = result["status"]
        write_json(
            result_path(out, name), common | {"status": status, "ok": status == "ok"} | result
        )
        print(
            f"{name}: {status}, {result['seconds']:.1f} s"
            + "".join(f"\n  {why}" for why in result["why"]),
            flush=True,
        )
        if status == "interrupted":
            break
    return statuses


def one(step: Step, tiny: bool) -> dict[str, Any]:
    """Run a step to its end or its limit: status, seconds, why, found, the last lines of what it
    printed.
    """
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        scratch, log = Path(folder), Path(folder) / "log.txt"
        command = [
            sys.executable,
            str(HERE / "check.py"),
            "--child",
            step.function,
            "--out",
            folder,
        ]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **step.environment,
        }
        begin = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *(["--tiny"] if tiny else [])],
                stdout=output,
                env=environment,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(step.seconds)
                status = "ok" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                code, status = None, "timed out"
            except (KeyboardInterrupt, Terminated):
                code, status = None, "interrupted"
            finally:  # also what it left running
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.monotonic() - begin
        data = (
            json.loads((scratch / "found.json").read_text())
            if (scratch / "found.json").is_file()
            else {}
        )
        why = list(data.get("failures", []))
        if status == "timed out":
            why.append(f"not finished after {step.seconds:.0f} s")
        elif code is not None and code < 0:
            why.append(f"ended by signal {-code} ({signal.Signals(-code).name})")
        elif code and not why:
            why.append(f"exit code {code}")
        if status == "ok" and why:
            status = "failed"
        lines = log.read_text(errors="replace").splitlines()
        return {
            "status": status,
            "seconds": round(seconds, 2),
            "why": why,
            "found": data.get("found", {}),
            "log": [] if status == "ok" else [line[:500] for line in lines[-LOG_LINES:]],
        }


def result_path(out: Path, name: str) -> Path:
    return out / f"gpu_{name}.json"


def earlier(path: Path) -> str | None:
    """The status of a step in an earlier call; None where there is none that can be read."""
    try:
        return str(json.loads(path.read_text())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, default=str) + "\n")
    os.replace(temporary, path)


# what it ran on
# ----------------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """The machine, as far as it can be told without torch."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "platform": platform.platform(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus(),
    }


def processor() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    )
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def gpus() -> list[dict[str, str]]:
    """Of nvidia-smi; empty without it."""
    keys = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    lines = output_of(
        "nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"
    ).splitlines()
    return [
        dict(zip(keys, (part.strip() for part in line.split(",")), strict=False)) for line in lines
    ]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """The commit of the repository, "+changes" if files differ from it; None without git."""
    head = output_of("git", "-C", str(ROOT), "rev-parse", "HEAD").strip()
    changed = output_of("git", "-C", str(ROOT), "status", "--porcelain").strip()
    return (head + ("+changes" if changed else "")) or None


def sources() -> str:
    """A hash of minipuzzle's code: a copy of the files without git is known by it."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "minipuzzle").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def output_of(*command: str) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# the command
# -------------------------------------------------------------------------------------------


class Terminated(Exception):
    """SIGTERM came."""


@contextlib.contextmanager
def terminated_is_raised() -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def chosen(names: str) -> dict[str, Step]:
    """The steps of a comma-separated list of steps and sets, in the order of STEPS."""
    given = [name.strip() for name in names.split(",") if name.strip()]
    wanted = [step for name in given for step in SETS.get(name, (name,))]
    unknown = [name for name in wanted if name not in STEPS]
    if unknown or not wanted:
        raise SystemExit(
            f"check.py: no step {', '.join(unknown) or 'is named'}; there are {', '.join(STEPS)}, "
            f"and the sets {', '.join(SETS)}"
        )
    return {name: step for name, step in STEPS.items() if name in wanted}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument(
        "--steps",
        default="first",
        help=f"comma-separated; default %(default)s: {', '.join(SETS['first'])}; second: "
        f"{', '.join(SETS['second'])}",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="of the whole call; default %(default)s"
    )
    parser.add_argument(
        "--retry", action="store_true", help="make steps again that failed or timed out"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        if args.tiny:
            # these need a GPU, and transformers takes them wherever they are installed
            sys.modules.update(mamba_ssm=None, causal_conv1d=None)  # type: ignore[arg-type]
        return child(args.child, args.out, args.tiny)
    with terminated_is_raised():
        statuses = run_steps(chosen(args.steps), args.out, args.minutes, args.tiny, args.retry)
    return 0 if all(status == "ok" for status in statuses.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
