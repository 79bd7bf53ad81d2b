"""Collect what a machine with a GPU and no network lacks: `make gpu-wheels`.

    python benchmarks/gpu/wheels.py [--out build/wheels]   wheels for Linux x86_64, Python 3.12
    python benchmarks/gpu/wheels.py --check                there: is all that is needed installed

The packages are minipuzzle's dependencies of pyproject.toml, without the extras, and what they
need in turn, in the versions of constraints.txt where they have one; less what MACHINE has in a
version that will do, and less LEFT_OUT. mamba-ssm comes as its Triton kernels alone: those are
Python, all else of it is compiled, and its `__init__` imports that.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_BYTES = 50 * 10**6
PYTHON = "3.12"
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
# What the machine has, with what these packages need themselves. None: some version, --check looks
# there if it will do.
MACHINE: dict[str, str | None] = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    **dict.fromkeys(("numpy", "scipy", "pandas", "safetensors", "click")),
    **dict.fromkeys(("filelock", "fsspec", "jinja2", "markupsafe", "packaging", "pyyaml")),
    **dict.fromkeys(("python-dateutil", "regex", "tqdm", "tzdata")),
}
# What is not imported by the steps, and large with all that it needs
LEFT_OUT = {
    "datasets": "read for data sets of the Hub alone (pyarrow, which it needs, is 45 MB)",
    "hf-xet": "downloads from the Hub alone",
}
MAMBA, MAMBA_NEEDS = "mamba-ssm>=2.3.2", ("einops",)
MAMBA_FILES = (
    "ops/__init__.py",
    "ops/triton/",
    "utils/__init__.py",
    "utils/determinism.py",
    "utils/torch.py",
)
MAMBA_INIT = '''"""Triton kernels of mamba-ssm {version}; the compiled parts were left out."""

__version__ = "{version}"
'''
IMPORTS = ("torch", "transformers", "minipuzzle.verbs.prune", "minipuzzle.verbs.doctor")
KERNELS = (
    "triton",
    "mamba_ssm.ops.triton.ssd_combined",
    "mamba_ssm.ops.triton.selective_state_update",
)


def requirements() -> list[Requirement]:
    """minipuzzle's own, without the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"]]


def lacking() -> list[Requirement]:
    """Those that the machine does not have, or in a version that will not do."""

    def there(needed: Requirement) -> bool:
        name = canonicalize_name(needed.name)
        version = MACHINE.get(name)
        return name in MACHINE and (version is None or needed.specifier.contains(version))

    return [r for r in requirements() if canonicalize_name(r.name) not in LEFT_OUT and not there(r)]


def collect(out: Path) -> int:
    """Fill the folder anew; the number of bytes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    target = ["--python-version", PYTHON, "--implementation", "cp"]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    pins = ["-c", str(ROOT / "constraints.txt")]
    needed = [*map(str, lacking()), *MAMBA_NEEDS]
    pip("download", "--only-binary", ":all:", *target, *pins, "-d", str(out), *needed)
    wanted = {canonicalize_name(r.name) for r in lacking()}
    for wheel in out.glob("*.whl"):
        name = parse_wheel_filename(wheel.name)[0]
        if name in LEFT_OUT or (name in MACHINE and name not in wanted):
            print(f"not collected: {wheel.name} ({LEFT_OUT.get(name, 'the machine has it')})")
            wheel.unlink()
    kernels(out)
    total = 0
    for wheel in sorted(out.glob("*.whl"), key=lambda path: path.stat().st_size):
        total += wheel.stat().st_size
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    print(f"{total / 1e6:7.2f} MB  {len(list(out.glob('*.whl')))} wheels in {out}")
    return total


def pip(*arguments: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments],
        check=True,
        env=os.environ | environment,
    )


def kernels(out: Path) -> Path:
    """A wheel of the Triton kernels, from the source distribution of mamba-ssm."""
    with tempfile.TemporaryDirectory() as scratch:
        # pip asks its setup.py for the name, which wants `wheel` and torch: torch is here, the
        # other is lent
        pip("install", "--no-deps", "--target", f"{scratch}/wheel", "wheel")
        setup = {"PYTHONPATH": f"{scratch}/wheel", "MAMBA_SKIP_CUDA_BUILD": "TRUE"}
        source_only = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation")
        pip("download", *source_only, "-d", scratch, MAMBA, **setup)
        (source,) = Path(scratch).glob("mamba_ssm-*.tar.gz")
        version = source.name.removeprefix("mamba_ssm-").removesuffix(".tar.gz")
        with tarfile.open(source) as archive:
            archive.extractall(scratch, filter="data")
        root = Path(scratch) / source.name.removesuffix(".tar.gz")
        package = root / "mamba_ssm"
        files = {"mamba_ssm/__init__.py": MAMBA_INIT.format(version=version).encode()}
        for path in sorted(package.rglob("*.py")):
            name = path.relative_to(package).as_posix()
            if name.startswith(MAMBA_FILES) and "mamba3" not in name:
                files[f"mamba_ssm/{name}"] = path.read_bytes()
        return write_wheel(out, "mamba_ssm", version, files, (root / "LICENSE").read_bytes())


def write_wheel(
    out: Path, name: str, version: str, files: dict[str, bytes], licence: bytes
) -> Path:
    """A wheel of Python files alone; packaging.python.org, "Binary distribution format"."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: minipuzzle\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": tags.encode(),
        f"{info}/LICENSE": licence,
    }
    record = "".join(f"{path},sha256={_digest(data)},{len(data)}\n" for path, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = out / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for inside, data in files.items():
            archive.writestr(inside, data)
    return path


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def check() -> list[str]:
    """What is wrong here: packages that are missing, too old, or do not import."""
    wrong = []
    for needed in requirements():
        if canonicalize_name(needed.name) in LEFT_OUT:
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed} is not installed")
            continue
        print(f"{needed.name} {version}")
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed} is needed, {version} is installed")
    for module in (*IMPORTS, *KERNELS):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken package raises
            wrong.append(f"{module} does not import: {type(error).__name__}: {error}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wheels")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        wrong = check()
        print("\n".join(f"WRONG {text}" for text in wrong) or "all that is needed is installed")
        return 1 if wrong else 0
    total = collect(args.out)
    if total >= LIMIT_BYTES:
        print(
            f"{total / 1e6:.2f} MB is not below {LIMIT_BYTES / 1e6:.0f} MB: leave something out in "
            "benchmarks/gpu/wheels.py"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
