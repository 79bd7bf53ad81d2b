"""The report: one safe file that tells the story of a run, whatever part of it is missing."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from report_data import PARENT, RECIPE, build

from minipuzzle.core import files
from minipuzzle.core.budget import human_bytes, human_count
from minipuzzle.pages import html
from minipuzzle.pages.candidates import pareto
from minipuzzle.pages.drawing import METRIC_WORDS
from minipuzzle.pages.html import render_html, write_report
from minipuzzle.pages.layers import GRID_ROWS
from minipuzzle.report import facts
from minipuzzle.report.card import model_card
from minipuzzle.report.report import Report, clean
from minipuzzle.stages.results import licence_of, toss_up_note

VOID = {"meta", "link", "br", "hr", "img", "input"}
NASTY = "<script>alert('$x_1$ & \"y\"')</script>"


class Page(HTMLParser):
    """Checks the nesting of tags and collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "srcset") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return build(count=60, measure=24)


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> str:
    return render_html(report)


def test_the_type_loses_nothing(report: dict[str, Any]) -> None:
    """Not even keys and nulls that it knows nothing of; and a value of another type is named."""
    given = clean(report | {"new": {"key": None}, "samples": report["samples"] | {"other": "text"}})
    assert Report.read(given).to_json() == given
    assert Report.read(given).parent.arch == PARENT
    with pytest.raises(ValueError, match=r"^candidates\.1\.cost\.parameters: input should be a valid integer"):
        Report.read(given | {"candidates": [{}, {"cost": {"parameters": "many"}}]})


def test_page_is_well_formed_and_complete(page: str) -> None:
    parsed = Page(page)
    figures = sum(len(f) for *_, f in html.FIGURES)
    assert parsed.tags.count("svg") == 2 * figures - len(html.NARROW + html.FOLDED) == 12 + 9  # most once more, for phones
    assert parsed.tags.count("details") == 1
    assert len(parsed.ids) == len(set(parsed.ids)) > 50
    for section, *_ in html.FIGURES:
        assert section in parsed.ids


def test_page_needs_no_network(page: str) -> None:
    links = Page(page).links
    assert len(links) > 50
    assert {link[0] for link in links if link != "data:,"} == {"#"}
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    targets = {link[1:] for link in links if link.startswith("#")}
    assert targets <= set(Page(page).ids)


def test_size_of_a_long_run_of_a_deep_model() -> None:
    """110 layers, 200 candidates."""
    report, times = build(count=200, measure=64), 5
    layers = len(report["scores"]["layers"])
    for part in (report["parent"], report["result"], *report["candidates"]):
        part["architecture"]["pattern"] *= times
        if "kept_layers" in part:
            part["kept_layers"] = [i + layers * k for k in range(times) for i in part["kept_layers"]]
    report["scores"]["layers"] = [row | {"layer": row["layer"] + layers * k} for k in range(times)
                                  for row in report["scores"]["layers"]]
    text = render_html(report)
    assert text.count(" keeps layer ") > 800
    assert 500_000 < len(text.encode()) < 1_500_000


def test_same_report_same_bytes(report: dict[str, Any], page: str) -> None:
    assert render_html(copy.deepcopy(report)) == page


def test_one_line_says_it(report: dict[str, Any], page: str) -> None:
    result = report["result"]
    line = facts.headline(Report.read(report))
    assert line == (f"2.35M -> {human_count(result['parameters'])} parameters, 5.16 MiB -> "
                    f"{human_bytes(result['memory_bytes'])}, loss 1.842 -> 1.994")
    assert f"**{line}**" in model_card(report)
    head = re.search(r'<p class="verdict">(.*)</p>', page)
    assert head is not None
    assert head[1].replace("→", "->").replace("\N{NO-BREAK SPACE}", " ") == line
    assert facts.headline(Report.read({"parent": {"loss": 1.0}})) == ""


def test_a_toss_up_is_said_in_plain_words() -> None:
    scoring = {"samples": 64, "confidence": 0.95, "toss_ups": [
        {"kind": "M", "drop": 3, "goes": 18, "stays": 20}, {"kind": "-", "drop": 1, "goes": 3, "stays": 5}]}
    assert toss_up_note(scoring, False) == (
        "Too few samples (64) to choose between layers 18 and 20, 3 and 5; raise calibration.samples (95% confidence)")
    assert "in the one-shot order;" in toss_up_note(scoring, True)
    many = scoring | {"toss_ups": scoring["toss_ups"] * 4}
    assert "3 and 5, 18 and 20, and 3 more pairs; raise" in toss_up_note(many, False)


def test_quality_has_perplexity_and_paired_differences(report: dict[str, Any], page: str) -> None:
    result, paired = report["result"], report["paired"]
    rows = facts.quality_rows(Report.read(report))
    assert [row["model"] for row in rows] == ["parent", "sliced only", "pruned", "distilled"]
    assert rows[-1]["perplexity"] == f"{math.exp(result['loss_distilled']):.3f}"
    assert rows[-1]["loss minus the parent's"] == f"{paired['loss_minus_parent']:+.4f} ± {paired['stderr']:.4f}"
    for value in (*rows[0].values(), *rows[-1].values()):
        assert f"<td>{value}</td>".replace("'", "&#39;") in page
    for part in (f"folder = &#34;{result['path']}&#34;", f"vllm serve {result['path']}", "they were not run"):
        assert part in page, part
    alone = facts.quality_rows(Report.read({"result": {"loss_pruned": 1e6}}))
    assert alone[0]["perplexity"] == "-"


def test_verdict_and_removed(report: dict[str, Any]) -> None:
    verdict, result = facts.verdict(Report.read(report)), report["result"]["architecture"]
    for part in ("2.35M parameters", "5.16 MiB", "bf16, context 1,024, batch 1", "1.842 (parent)", "4.018 (pruned)",
                 "1.994 (distilled)", f"of {len(report['parent']['architecture']['pattern'])} layers",
                 f"hidden size 96 → {result['hidden_size']}", f"FFN width 512 → {result['ffn_size']}"):
        assert part in verdict
    assert "93.0 %" in (recovery := facts.recovery(Report.read(report)))
    assert "0.152" in recovery
    strip = facts.strip(Report.read(report))
    assert [i for i, layer in enumerate(strip) if layer["kept"]] == report["result"]["kept_layers"]
    assert "".join(layer["kind"] for layer in strip) == report["parent"]["architecture"]["pattern"]


def test_table_has_winner_first_and_every_name(report: dict[str, Any], page: str) -> None:
    rows = facts.candidate_rows(Report.read(report))
    assert len(rows) == min(facts.TABLE_ROWS, 60)
    assert [r["role"] for r in rows[:4]] == ["winner", "finalist", "finalist", ""]
    assert rows[0]["cells"][1][0] == report["result"]["candidate"]
    names = [c["name"] for c in report["candidates"][: facts.TABLE_ROWS]]
    cells = re.findall(r"<td[^>]*>(c\d+)", page)
    assert sorted(cells) == sorted(names)
    assert all(len(r["cells"]) == 2 + len(facts.columns(Report.read(report))) for r in rows)


def test_points_have_titles(report: dict[str, Any], page: str) -> None:
    titles = re.findall(r"<title>([^<]*)</title>", page)
    measured = [c for c in report["candidates"] if c["measured"]]
    assert len(measured) == 24
    for c in measured:
        assert sum(t.startswith(f"{c['name']};") for t in titles) >= 2  # trade-off, and prediction
    metrics = [k for k in METRIC_WORDS if k in report["scores"]["layers"][0]]
    layers, kept = report["scores"]["layers"], report["result"]["kept_layers"]
    # one point per layer and metric; in the figure of what was cut a bar per layer and one per kept
    # layer
    assert sum(t.startswith("layer ") for t in titles) == (
        len(metrics) * len(layers) + len(layers)  # of which one is drawn once more, for phones
        + 2 * (len(layers) + len(kept)))
    assert len(metrics) == 5
    grid = [t for t in titles if re.match(r"c\d+ keeps layer ", t)]
    shown = Report.read(report).best(GRID_ROWS)
    assert len(grid) == 2 * sum(len(c.kept_layers) for c in shown)  # and for phones


def test_everything_is_escaped(report: dict[str, Any]) -> None:
    bad = copy.deepcopy(report)
    for key in ("model", "command", "recipe", "hardware"):
        bad[key] = NASTY
    bad["samples"] = dict.fromkeys(("prompt", "parent", "pruned", "distilled"), NASTY)
    bad["warnings"] = bad["defaults"] = [NASTY]
    bad["versions"] = {NASTY: NASTY}
    bad["evaluation"]["source"] = NASTY
    bad["stages"][0]["name"] = NASTY
    bad["distillation"]["tournament"][0]["candidate"] = NASTY
    for c in bad["candidates"][:3]:
        c["name"] += NASTY
    text = render_html(bad)
    parsed = Page(text)
    assert parsed.tags.count("script") == 1
    assert "alert(" not in "".join(re.findall(r"<script>(.*?)</script>", text, re.DOTALL))
    assert "".join(parsed.words).count(NASTY) >= 15
    front, _ = front_matter(model_card(bad))
    assert front["library_name"] == "transformers"


@pytest.mark.parametrize("minimal", [
    {"schema": 1, "parent": {}, "result": {}},
    {"schema": 1, "parent": {"parameters": 10, "memory_bytes": 20, "loss": 1.0}, "result": {"parameters": 5}},
    {"schema": 1, "parent": None, "result": None, "candidates": None, "scores": None, "stages": None},
    {"schema": 1, "parent": {}, "result": {}, "candidates": [{"name": "a"}, {"measured": {"kl": 1.0}}]},
])
def test_minimal_report(minimal: dict[str, Any]) -> None:
    parsed = Page(render_html(minimal))
    assert "h1" in parsed.tags
    front_matter(model_card(minimal))


# Each line is one report without these parts: rendering costs a second.
MISSING: list[list[tuple[Any, ...]]] = [
    [("parent", "architecture"), ("result", "cost"), ("scores", "metric"), ("candidates", 0, "cost"), ("search",)],
    [("parent",), ("budget",), ("scores", "layers", 3, "kl"), ("candidates", 1, "architecture"), ("stages",)],
    [("result",), ("workload",), ("scores", "curves", 0, "mse"), ("distillation", "curve"), ("samples", "pruned")],
    [("parent", "architecture", "head_dim"), ("result", "kept_layers"), ("candidates", 2, "predicted"),
     ("candidates", 3, "measured"), ("distillation", "seconds"), ("evaluation", "sequence_length")],
    [("parent", "loss"), ("result", "candidate"), ("workload", "context"), ("scores", "layers", 3, "mse_stderr"),
     ("candidates", 1, "after_distillation"), ("stages", 0, "seconds"), ("distillation", "curve", 5, "loss")],
    [("scores",), ("candidates", 4, "name"), ("budget", "memory", "limit"), ("parent", "cost"), ("versions",)],
]


@pytest.mark.parametrize(("paths", "null"), [(paths, i % 2 == 0) for i, paths in enumerate(MISSING)])
def test_any_part_may_be_missing(paths: list[tuple[Any, ...]], null: bool) -> None:
    partial = build(count=12, measure=8)
    for path in paths:
        part = partial
        for key in path[:-1]:
            part = part[key]
        assert part[path[-1]] is not None
        if null:
            part[path[-1]] = None
        else:
            del part[path[-1]]
    Page(render_html(partial))
    model_card(partial)


def test_what_was_not_trained_is_not_called_distilled() -> None:
    """`distillation.tokens: 0` only prunes; `loss_distilled` is then of the folder that was
    written, untrained."""
    untrained = build(count=12, measure=4)
    untrained["distillation"] = {"tokens": 0, "seconds": 0.0, "curve": [], "tournament": []}
    untrained["result"]["exported"] = None
    card, page = model_card(untrained), render_html(untrained)
    assert "was not trained afterwards" in card
    assert "distilled" not in yaml.safe_load(card.split("---")[1])["tags"]
    for text in (card, page):
        assert "(pruned) nats per token" in text
        assert "(distilled)" not in text
        assert "Distillation recovered" not in text
    assert "Pruned and distilled" not in page


def test_few_measured_shows_predictions() -> None:
    few = build(count=30, measure=4)
    assert "predicted damage (MSE)" in render_html(few)
    none = build(count=30, measure=0)
    assert 'id="tradeoff"' in render_html(none)


def test_budget_other_than_memory(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    other["budget"] = {"params": {"limit": 1_250_000, "asked": "1.25M"}}
    text = render_html(other)
    assert "params (M)" in text
    assert "budget 1.25M" in text


def test_write_report(report: dict[str, Any], tmp_path: Path) -> None:
    measured = copy.deepcopy(report)
    measured["result"]["kl_distilled"] = np.float32(0.5)
    measured["result"]["loss_pruned"] = float("nan")
    path = write_report(measured, tmp_path / "run")
    assert path.name == "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]
    data = json.loads((path.parent / "report.json").read_text(encoding="utf-8"))
    assert data["result"]["kl_distilled"] == 0.5
    assert data["result"]["loss_pruned"] is None
    assert render_html(data) == path.read_text(encoding="utf-8")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report({"schema": 1, "parent": {}, "result": {}}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    start, front, body = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


def test_card(report: dict[str, Any]) -> None:
    front, body = front_matter(model_card(report | {
        "model": "nvidia/Nemotron-H-8B", "license": {"license": "other", "license_name": "some-terms"},
        "recipe": RECIPE + "calibration: {data: owner/texts}\ndistillation: {data: stdlib}\n"}))
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "nvidia/Nemotron-H-8B"
    assert (front["license"], front["license_name"]) == ("other", "some-terms")
    assert front["datasets"] == ["owner/texts"]
    assert "Data: owner/texts, stdlib." in body
    assert "The licence is the base model's: some-terms." in body
    assert "vllm serve" in body
    assert {"minipuzzle", "nemotron_h"} <= set(front["tags"])
    assert "```yaml\n" + RECIPE + "calibration: {data: owner/texts}" in body
    assert "`time_step_min` in config.json" in body
    assert "`d_head`" in body
    assert "time_step_limit" not in body  # no patch is needed
    assert "| held-out loss (nats per token) | 1.8421 | 1.9937 |" in body
    code = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(code) == 1
    compile(code[0], "card", "exec")


def test_card_takes_no_path_for_a_base_model(report: dict[str, Any]) -> None:
    card = model_card(report | {"model": "/some/where/my model"})
    assert front_matter(card)[0]["base_model"] == "my-model"
    assert "license" not in front_matter(card)[0]


def test_recipe_with_backticks_stays_inside_its_fence(report: dict[str, Any]) -> None:
    card = model_card(report | {"recipe": "a: 1\n```\nb: 2\n"})
    assert "````yaml\na: 1\n```\nb: 2\n````" in card


def test_pareto() -> None:
    assert pareto([(3, 1), (1, 3), (2, 4), (2, 2), (4, 1)]) == [(1, 3), (2, 2), (3, 1)]


@pytest.mark.parametrize(("files", "expected"), [
    ({"README.md": "---\nlicense: other\nlicense_name: terms\nlicense_link: LICENSE\n---\n# A model\n", "LICENSE": "text"},
     {"license": "other", "license_name": "terms", "license_link": "LICENSE"}),
    ({"README.md": "# no front matter\n", "LICENSE.txt": "text"}, {"license": "other", "license_link": "LICENSE.txt"}),
    ({"README.md": "---\n[not: yaml\n---\n"}, {}), ({"README.md": "---\njust words\n---\n"}, {}), ({}, {})])
def test_the_licence_is_inherited(files: dict[str, str], expected: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == expected


def test_loads_of_experts_and_kl_by_kind_are_told() -> None:
    loads = {"parent": {"1": [0.5, 0.25, 0.25, 0.0], "4": [0.25] * 4}, "pruned": {"1": [0.75, 0.25]}}
    data = {"schema": 1, "expert_load": loads, "scores": {"layers": [
        {"layer": 0, "kind": "M", "kl": 0.25}, {"layer": 1, "kind": "E", "kl": 1.0}, {"layer": 4, "kind": "E", "kl": 2.0}]}}
    page = render_html(data)
    assert "Mamba 0.250, MoE 1.500 nats" in page
    rows = re.findall(r"<tr><td>(\d)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert rows == [("1", "2.00 (1 unused)", "1.50"), ("4", "1.00", "-")]
    assert "Where the router sends tokens" not in render_html({"schema": 1})
