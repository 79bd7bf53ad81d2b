"""The sdist and the wheel: built, complete, and at work in an environment that has nothing else of
this project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# what the package reads at run time beside its modules
DATA = [f"minipuzzle/{path}" for path in (
    "py.typed", "core/published.json", "bundled/model/config.json", "bundled/model/model.safetensors",
    "bundled/model/tokenizer.json", "bundled/model/README.md", "recipes/library/default.yaml",
    "recipes/library/nemotron-h-47b.yaml", "pages/base.html", "pages/report.html", "pages/parts.html",
    "pages/compare.html")]
# as a front end calls it, but with the setuptools that is installed: tests are offline
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(what: str, tree: Path, out: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", BUILD, f"build_{what}", str(out)], cwd=tree, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel): the wheel is built from the unpacked sdist, so that nothing comes from beside
    it."""
    folder = tmp_path_factory.mktemp("packaging")
    tree, unpacked = folder / "tree", folder / "unpacked"
    shutil.copytree(ROOT / "minipuzzle", tree / "minipuzzle", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    (tree / "tests").mkdir()
    (tree / "tests" / "test_one.py").touch()
    sdist = build("sdist", tree, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return sdist, build("wheel", next(unpacked.iterdir()), folder)


def test_sdist_and_wheel_hold_every_module_and_what_it_reads(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "minipuzzle").rglob("*.py")}
    assert len(modules) > 50
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert modules | {*DATA, "LICENSE", "README.md", "pyproject.toml"} <= inside
    assert [name for name in inside if name.startswith("tests")] == []  # half of them would come, and none would run
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "minipuzzle").rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {*DATA} <= files == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    """The other packages are those at hand, torch as it is given; minipuzzle is the wheel's,
    whatever is beside it."""
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        about = message_from_bytes(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))))
    required = [Requirement(text) for text in about.get_all("Requires-Dist", [])]
    needed = [r for r in required if r.marker is None]
    assert {"torch", "transformers", "click"} <= {r.name for r in needed}
    for requirement in needed:  # without constraints.txt: what was tested must satisfy it
        assert not any(s.operator in ("==", "<", "<=", "~=") for s in requirement.specifier), requirement
        assert requirement.specifier.contains(metadata.version(requirement.name)), requirement

    venv.create(tmp_path / "env", with_pip=False)
    binaries = tmp_path / "env" / "bin"
    subprocess.run([sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "-q", "--no-deps",
                    "--no-index", "--disable-pip-version-check", str(wheel)], check=True, timeout=120)
    [own] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # directories, not their .pth files: an editable install of this project is not found through
    # them
    (own / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run([str(binaries / command[0]), *command[1:]], cwd=elsewhere, env=env, capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("python", "-c", "import minipuzzle; print(minipuzzle.__file__)").startswith(str(own))
    assert "default" in run("minipuzzle", "recipes", "ls")
    assert "hidden 4096" in run("minipuzzle", "inspect", "nemotron-h-8b")
    assert "within the budget" in run("minipuzzle", "prune", "--dry-run")
    assert list(elsewhere.iterdir()) == []
