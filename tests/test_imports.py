"""Rooms and doors: imports go one way, and what needs no torch does not import it."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import minipuzzle

ROOT = Path(minipuzzle.__file__).parent
# room -> the rooms it may import from (HOUSE.md); a room may always import from itself
ALLOWED = {
    "core": set(),
    "families": {"core"},
    "costs": {"core", "families"},
    "models": {"core", "families"},
    "data": {"core"},
    "search": {"core", "families", "costs"},
    "report": {"core", "families"},
    "pages": {"core", "families", "costs", "report"},
    "importance": {"core", "families", "models", "data"},
    "evaluate": {"core", "families", "models", "data"},
    "surgery": {"core", "families", "models", "data"},
    "distill": {"core", "families", "models", "data"},
    "engines": {"core", "families", "costs", "models"},
    "recipes": {"core", "data"},
    "pipeline": {"core", "families", "costs", "models", "data", "search", "evaluate", "surgery",
                 "distill", "recipes"},
    "stages": {"core", "families", "costs", "models", "data", "search", "report", "importance",
               "evaluate", "surgery", "distill", "engines", "recipes", "pipeline"},
    "verbs": {"core", "families", "costs", "models", "data", "search", "report", "importance",
              "evaluate", "surgery", "distill", "engines", "recipes", "pages", "pipeline",
              "stages"},
    "cli": {"core", "families", "costs", "engines", "recipes", "report", "pages", "pipeline", "stages", "verbs"},
    "_version": set(),
}
NO_TORCH = ("core", "costs", "search", "report", "pages", "recipes", "cli")
# of the families only what computes: the tables are data
TORCH_IN_FAMILIES = ("mixers", "ssd", "experts", "kernels")


def imported(file: Path) -> list[tuple[str, bool]]:
    """(module, whether it is imported as soon as the file is) for all absolute imports of a
    file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    late = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)}
    late |= {node for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
             for node in ast.walk(block)}
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(alias.name, node not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"minipuzzle.{alias.name}" for alias in node.names] if node.module == "minipuzzle" else [node.module]
            out += [(str(name), node not in late) for name in names]
    return out


def room_of(module: str) -> str:
    """The room of a module; names of the package itself, such as minipuzzle.Recipe, have none."""
    parts = module.split(".")
    return parts[1] if parts[0] == "minipuzzle" and len(parts) > 1 and parts[1] in ALLOWED else ""


def test_rooms_import_one_way() -> None:
    files = [f for f in sorted(ROOT.rglob("*.py")) if f not in (ROOT / "__init__.py", ROOT / "__main__.py")]
    assert len(files) >= 45
    rooms, doors, wrong = set(), 0, []
    for file in files:
        room = file.relative_to(ROOT).with_suffix("").parts[0]
        assert room in ALLOWED, f"{file}: a room that HOUSE.md does not have"
        rooms.add(room)
        for module, _ in imported(file):
            other = room_of(module)
            if other not in ("", room, "_version"):
                doors += 1
                if other not in ALLOWED[room]:
                    wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert wrong == []
    assert rooms == set(ALLOWED)
    assert doors >= 100


def test_no_import_circle() -> None:
    """Among modules, imports for types counted too; only those inside functions are not."""
    graph: dict[str, set[str]] = {}
    for file in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        late = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
        name = ".".join(("minipuzzle", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        graph[name] = {f"{node.module}.{alias.name}" for node in ast.walk(tree)
                       if isinstance(node, ast.ImportFrom) and node not in late for alias in node.names}
    for name in graph.keys() - {"minipuzzle"}:  # module or name of one
        graph[name] = {found if found in graph else found.rpartition(".")[0] for found in graph[name]} & graph.keys()
    del graph["minipuzzle"]  # its names are for type checkers alone
    assert sum(map(len, graph.values())) > 200
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)  # else CycleError


def test_no_torch_at_the_door() -> None:
    """core, costs, search, report, pages and cli do not import torch or transformers, not even
    inside a function (but for cli)."""
    checked = 0
    for file in sorted(ROOT.rglob("*.py")):
        room = file.relative_to(ROOT).with_suffix("").parts[0]
        if room in NO_TORCH or (room == "families" and file.stem not in TORCH_IN_FAMILIES):
            checked += 1
            heavy = [m for m, _ in imported(file) if m.split(".")[0] in ("torch", "transformers")]
            assert heavy == [], file
    assert checked >= 20


def test_imports_without_torch() -> None:
    """In a fresh process, with what is behind the doors: every module of the light rooms, and the
    help of the command."""
    program = """
import importlib, json, pkgutil, sys
import minipuzzle
from click.testing import CliRunner
names = ["minipuzzle.cli"]
for room in ("core", "families", "costs", "search", "report", "pages", "engines"):
    package = importlib.import_module(f"minipuzzle.{room}")
    names += [f"minipuzzle.{room}.{m.name}" for m in pkgutil.iter_modules(package.__path__)
              if m.name not in ("mixers", "ssd", "experts", "kernels", "formats", "quantize")]
for name in names:
    importlib.import_module(name)
for name in ("Architecture", "Budget", "Candidate", "LayerScores", "Recipe", "WidthScores", "search_architectures"):
    getattr(minipuzzle, name)
from minipuzzle.cli import main
helps = [CliRunner().invoke(main, ["--help"])] + [CliRunner().invoke(main, [v, "--help"]) for v in main.commands]
assert all(h.exit_code == 0 for h in helps), helps
assert CliRunner().invoke(main, ["recipes", "ls"]).exit_code == 0
print(json.dumps({"modules": len(names), "verbs": list(main.commands), "examples": [h.output for h in helps],
                  "heavy": sorted({m.split(".")[0] for m in sys.modules} & {"torch", "transformers", "datasets"})}))
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["heavy"] == []
    assert found["modules"] >= 20
    assert set(found["verbs"]) == {"prune", "inspect", "fit", "devices", "score", "search", "evaluate",
                                   "distill", "quantize", "report", "recipes", "doctor", "tokenize", "push"}
    assert len(found["examples"]) == 15
    for verb, text in zip(["", *found["verbs"]], found["examples"], strict=True):
        assert f"minipuzzle {verb}".strip() in text, f"the help of {verb} has no example"


def test_public_names_resolve() -> None:
    assert len(minipuzzle.__all__) == len(set(minipuzzle.__all__)) >= 11
    assert sorted(minipuzzle.__all__) == list(minipuzzle.__all__)
    for name in minipuzzle.__all__:
        value = getattr(minipuzzle, name)
        assert name == "__version__" or value.__name__ == name
    contract = {"Recipe", "prune", "Architecture", "Budget", "Candidate", "LayerScores", "WidthScores", "score_layers",
                "score_widths", "search_architectures", "distill_model"}
    assert contract <= set(minipuzzle.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = minipuzzle.prunes


def test_lines_of_reflowed_rooms_have_at_most_100_columns() -> None:
    """The others are at most as wide as ruff allows; a room that has been reflowed is added here."""
    lines = [(f"{file.name}:{number}", line) for room in ("pages",)
             for file in sorted((ROOT / room).glob("*.py"))
             for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)]
    assert len(lines) > 1000
    assert [place for place, line in lines if len(line) > 100] == []


def test_no_kind_of_layer_is_spelled_outside_the_families() -> None:
    """Nobody but families/ knows a letter, or decides by a kind's name. (CSS of the report has
    colours by name, the schema has keys by name, and core/budget.py the names that `keep_16bit`
    takes.)"""
    letters, names, wrong, checked = set("M*-E"), {"mamba", "attention", "ffn", "moe"}, [], 0
    for file in sorted(ROOT.rglob("*.py")):
        if "families" in file.parts or file == ROOT / "core" / "budget.py":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            parts: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
            elif isinstance(node, ast.Dict):
                parts = [key for key in node.keys if key is not None]
            elif isinstance(node, ast.Call):
                parts = [*node.args, *(k.value for k in node.keywords)] if _asks_for_layers(node) else []
            elif isinstance(node, ast.Subscript):
                parts = [node.slice]
            elif isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                wrong += [f"{file.name}:{node.lineno} {name}"] if name in ("MAMBA", "ATTENTION", "FFN", "MOE") else []
            for text in (p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)):
                checked += 1
                if text in names or (text and set(text) <= letters and not _is_dash(node, text)):
                    wrong.append(f"{file.name}:{node.lineno} {text!r}")
    assert wrong == []
    assert checked > 500


def _asks_for_layers(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in ("count", "layers_of", "index", "drop_order", "Architecture", "NemotronHConfig", "replace")


def _is_dash(node: ast.AST, text: str) -> bool:
    """Hyphens and stars of names of files, in `replace`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace"
