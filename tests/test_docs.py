"""The documents tell the truth: their commands run, their links lead somewhere, their numbers are
the measured ones.

Commands run in their order on a tiny model with a recipe of half a minute in place of the full one.
Those that need what CI has not got say so in a comment before their block; their options are
checked all the same.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from test_prune import RECIPE

from minipuzzle.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
# documents whose commands run here; the others' commands belong to their own tests
RUN = ("README.md", "commands.md", "guide.md")


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(text, why it is not run or "") of each block of a language."""
    return [(m["text"], m["reason"] or "") for m in BLOCK.finditer(page.read_text(encoding="utf-8"))
            if m["language"] == language]


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()
            if shlex.split(line, comments=True)]


def minipuzzle_arguments(words: list[str]) -> list[str] | None:
    """What follows `minipuzzle`, also behind torchrun."""
    for name in ("minipuzzle", "minipuzzle.cli"):
        if name in words:
            rest = words[words.index(name) + 1 :]
            return rest[: next((i for i, word in enumerate(rest) if word in (">", "||", "|")), len(rest))]
    return None


def check_options(arguments: list[str]) -> None:
    """Parse as click would; a verb, option or argument that does not exist raises."""
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *arguments = arguments
        assert name in command.commands, name
        command = command.commands[name]
    command.make_context(command.name, list(arguments))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, texts: Path) -> Iterator[Path]:
    """A working directory with what the documents name: my-model, texts/, and a small recipe."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "my-model").symlink_to(model_folder)
    (folder / "texts").symlink_to(texts)
    (folder / "small.yaml").write_text(RECIPE.replace("DATA", "texts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run(arguments: list[str], place: Path) -> str:
    """One command, with the small recipe where it would take the default one or the user's."""
    verb = arguments[0]
    if verb == "recipes" and "copy" in arguments and (place / "mine.yaml").exists():
        (place / "mine.yaml").unlink()
    if verb in ("prune", "score", "evaluate", "distill") and "--recipe" not in arguments:
        arguments = [*arguments, "--recipe", "small.yaml"]
    result = CliRunner().invoke(main, ["small.yaml" if word == "mine.yaml" and verb != "recipes" else word for word in arguments])
    assert result.exit_code in ((0, 1) if verb == "doctor" and "nemotron" in str(arguments) else (0,)), (
        f"minipuzzle {shlex.join(arguments)}\n{result.output}\n{result.exception!r}")
    return result.output


def test_every_command_of_the_documents_runs(place: Path) -> None:
    ran, left = [], []
    for page in [p for p in PAGES if p.name in RUN]:
        for text, reason in blocks(page, "sh"):
            for words in commands(text):
                arguments = minipuzzle_arguments(words)
                if words[0] == "make":
                    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
                elif words[:2] in (["pip", "install"], ["git", "clone"]) or (arguments is None and reason):
                    left.append(words)
                else:
                    assert arguments is not None, f"{page.name}: {shlex.join(words)} is neither ours nor explained"
                    check_options(arguments)
                    if reason:
                        left.append(words)
                    else:
                        said = run(arguments, place)
                        assert said.strip(), words
                        if arguments[0] == "distill":  # what it minimises
                            assert re.search(r"^KL +\d+\.\d+ -> \d+\.\d+$", said, re.MULTILINE)
                        ran.append(words)
        for text, _ in blocks(page, "python"):
            exec(compile(text.replace("mine.yaml", "small.yaml"), page.name, "exec"), {})
    assert len(ran) >= 24
    assert len(left) >= 6
    assert (place / "runs" / "mine" / "report.html").is_file()
    assert (place / "comparison.html").is_file()
    assert (place / "kept.png").stat().st_size > 1000
    model = json.loads((place / "distilled" / "model" / "config.json").read_text())
    assert model["model_type"] == "nemotron_h"


def test_commands_of_the_other_documents_have_right_options() -> None:
    for page in [p for p in PAGES if p.name not in RUN]:
        for text, _ in blocks(page, "sh"):
            for words in commands(text):
                if (arguments := minipuzzle_arguments(words)) is not None:
                    check_options(arguments)


def test_links_lead_somewhere() -> None:
    seen = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                seen += 1
                assert (page.parent / target).exists(), f"{page.name}: {target}"
    assert seen >= 15
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in PAGES[1:] if p.name != "README.md" and f"({p.name})" not in index] == []
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:benchmarks|examples|docs)/[\w./]+)`", text)
    assert len(named) >= 3
    assert all((ROOT / name).exists() for name in named), named


def test_the_tour_names_files_that_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = re.findall(r"`([\w/]+\.py)`", text[text.index("## The code"):])
    assert len(tour) >= 12
    assert [name for name in tour if not (ROOT / "minipuzzle" / name).is_file()] == []
    main_path = re.findall(r"`([\w/]+\.py)`", text[text.index("The main path"):text.index("Then `families/")])
    lines = sum(len((ROOT / "minipuzzle" / name).read_text().splitlines()) for name in main_path)
    assert 500 < lines < 1500, lines
    rooms = set(re.findall(r"^  (\w+)/ ", text, re.MULTILINE))
    assert rooms == {p.name for p in (ROOT / "minipuzzle").iterdir() if (p / "__init__.py").is_file()}


def test_the_numbers_of_the_readme_are_the_measured_ones() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text())["runs"]
    first, second = runs[0], runs[1]
    for part in (f"| layers | 22 | {len(first['pattern'])} |", f"{first['parent_loss']:.3f} | {first['loss_distilled']:.3f} "
                 f"({second['loss_distilled']:.3f})", f"{first['parent_parameters'] / 1e6:.2f}M | {first['parameters'] / 1e6:.2f}M",
                 f"{first['parent_memory_bytes'] / 2**20:.2f} MiB | {first['memory_bytes'] / 2**20:.2f} MiB",
                 f"loss of {first['loss_sliced']:.3f}", f"{first['recovery']:.0%} ({second['recovery']:.0%})".replace("%", " %"),
                 f"{first['gap_left']:.3f} ({second['gap_left']:.3f})", f"{first['seconds']:.0f} s ({second['seconds']:.0f} s)"):
        assert part in text, part
    assert first["pattern"] == second["pattern"]
    bundled = json.loads((ROOT / "benchmarks" / "results" / "bundled_model.json").read_text())
    for part in (f"{bundled['loss_nats_per_byte']:.3f} nats per byte", f"{bundled['loss_increase_without']['mamba']:.2f} nats per token"):
        assert part in text, part
    assert (ROOT / "docs" / "report.png").stat().st_size < 300_000


def test_python_in_the_documents_is_python() -> None:
    counted = 0
    for page in PAGES:
        for text, _ in blocks(page, "python"):
            ast.parse(text)
            counted += 1
    assert counted >= 2


def test_what_the_recipes_for_a_machine_take_is_what_the_dry_run_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of the guide, made again."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import guide

    assert guide.table() in (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), "python benchmarks/guide.py"
