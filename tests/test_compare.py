"""Several runs side by side, and figures for a notebook."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from report_data import build
from test_report import NASTY, Page

from minipuzzle.cli import main
from minipuzzle.pages.compare import comparison, render_comparison

RECIPE = "recipe: 1\nbudget: {memory: 0.4x}\ndistillation: {tokens: 1M}\n"


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    one = build(count=20, measure=8)
    two = copy.deepcopy(one)
    two["result"] |= {"loss_distilled": 1.95, "memory_bytes": one["result"]["memory_bytes"] // 2}
    two["recipe"] = RECIPE
    return {"runs/one": one, "runs/two": two}


def test_what_runs_came_to_and_where_they_differ(reports: dict[str, dict[str, Any]]) -> None:
    data = comparison(reports)
    assert [run["name"] for run in data["runs"]] == ["runs/one", "runs/two"]
    for run, report in zip(data["runs"], reports.values(), strict=True):
        assert run["distilled"] == report["result"]["loss_distilled"]
        assert run["time"] == sum(s["seconds"] for s in report["stages"])
    assert data["settings"]["budget.memory"] == {"runs/one": "0.5x", "runs/two": "0.4x"}
    assert data["settings"]["distillation.tokens"] == {"runs/one": None, "runs/two": "1M"}
    assert "recipe" not in data["settings"]
    assert data["warnings"] == []
    other = copy.deepcopy(reports)
    other["runs/two"]["hashes"]["corpus"] = "different"
    other["runs/two"]["evaluation"]["tokens"] = 5
    assert [w.split("different ")[1].split(":")[0] for w in comparison(other)["warnings"]] == [
        "held-out texts", "numbers of held-out tokens"]


def test_the_page(reports: dict[str, dict[str, Any]]) -> None:
    text = render_comparison(reports)
    page = Page(text)
    assert page.tags.count("svg") == 2 * 2  # and for phones
    assert {link[0] for link in page.links if link != "data:,"} == {"#"}
    assert "Of 2 runs, runs/two has the lowest held-out loss, 1.950 nats per token" in text
    assert render_comparison(copy.deepcopy(reports)) == text
    other = copy.deepcopy(reports)
    other["runs/two"]["hashes"]["corpus"] = "different"
    for known in (text, crownless := render_comparison(other)):
        assert ("lowest held-out loss" in known) == (known is text)
    assert "whose losses do not compare: none of them is the best" in crownless
    bad = render_comparison({NASTY: reports["runs/one"] | {"recipe": f"a: {{b: \"{NASTY!r}\"}}"}, "b": {"parent": None}})
    assert Page(bad).tags.count("script") == 1
    assert "runs/two" not in bad


@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib: no room is left for the axes
def test_long_names_leave_room_for_the_figure_of_a_phone(reports: dict[str, dict[str, Any]]) -> None:
    text = render_comparison({f"/a/folder/of/many/many/many/names/{name}": r for name, r in reports.items()})
    assert "…" in text
    assert "/many/names/runs/two" in text


def test_other_parents_have_no_common_grid(reports: dict[str, dict[str, Any]]) -> None:
    other = copy.deepcopy(reports)
    other["runs/two"]["parent"]["architecture"]["pattern"] = "M-"
    assert Page(render_comparison(other)).tags.count("svg") == 1 * 2


@pytest.fixture
def runs(reports: dict[str, dict[str, Any]], tmp_path: Path) -> list[Path]:
    for name, report in reports.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report))
    return [tmp_path / name for name in reports]


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    result = CliRunner().invoke(main, ["report", *map(str, runs), "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(page)]
    assert "Where the recipes differ" in page.read_text()
    result = CliRunner().invoke(main, ["report", *map(str, runs), "--json", "-o", str(page)])
    assert [run["name"] for run in json.loads(result.stdout)["runs"]] == [str(run) for run in runs]
    result = CliRunner().invoke(main, ["report", str(runs[0]), "--json"])
    assert json.loads(result.stdout)["path"] == str(runs[0] / "report.html")
    assert (runs[0] / "report.html").is_file()
    for arguments, message in ((["report", str(runs[0]), str(tmp_path / "none")], "does not exist"),
                               (["report", str(runs[0]), str(runs[0])], "twice"), (["report"], "Missing argument")):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize(("keys", "value"), [((), [1]), (("result", "memory_bytes"), "small"), (("stages",), 5)])
def test_values_of_other_types_are_one_line(runs: list[Path], tmp_path: Path, keys: tuple[str, ...], value: Any) -> None:
    """In a report.json that was changed by hand."""
    file = runs[0] / "report.json"
    data = part = json.loads(file.read_text())
    for key in keys[:-1]:
        part = part[key]
    if keys:
        part[keys[-1]] = value
    file.write_text(json.dumps(data if keys else value))
    for arguments in ([str(runs[0])], [*map(str, runs), "-o", str(tmp_path / "both.html")]):
        result = CliRunner().invoke(main, ["report", *arguments])
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 5
        assert len(result.stderr.splitlines()) == 1
        assert "report.json" in result.stderr
        assert ".".join(keys) in result.stderr


def test_a_page_never_takes_the_place_of_what_is_no_file(runs: list[Path], tmp_path: Path) -> None:
    """-o at a device would make a file of it, for root."""
    os.mkfifo(tmp_path / "pipe")
    result = CliRunner().invoke(main, ["report", *map(str, runs), "-o", str(tmp_path / "pipe")])
    assert result.exit_code == 2
    assert "is a FIFO, not a file" in result.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_figures_of_a_run(runs: list[Path]) -> None:
    from minipuzzle import Run

    (runs[0] / "candidates.csv").write_text("name,kl\nc001,0.5\nc002,0.6\n")
    run = Run.open(runs[0])
    assert list(run.candidates["kl"]) == [0.5, 0.6]
    drawn = [getattr(run, name)() for name in dir(run) if name.startswith("plot_")]
    assert len(drawn) == 12
    assert all(isinstance(figure, Figure) for figure in drawn)
    assert len({tuple(axis.get_title(loc="left") for axis in f.axes) + tuple(axis.get_xlabel() for axis in f.axes)
                for f in drawn}) >= 10
    with pytest.raises(Exception, match="is not a finished run"):
        Run.open(runs[0].parent)
