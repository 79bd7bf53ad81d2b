"""The report in a real browser, from a file and without a network: Debian's chromium and
chromium-driver.

`make browser` installs them by apt where that is possible. Screenshots stay in build/screenshots/.
"""

from __future__ import annotations

import base64
import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_data import build

from minipuzzle.pages.compare import write_comparison
from minipuzzle.pages.html import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'minipuzzle[dev]'")
from selenium.common.exceptions import SessionNotCreatedException  # noqa: E402 (where there is no selenium)

SHOTS = Path(__file__).resolve().parent.parent / "build" / "screenshots"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None,
                                reason="no chromium and chromedriver here, and `make browser` could not install them by apt")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return build(count=60, measure=24)


@pytest.fixture(scope="module")
def page(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(report, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
                     f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    except SessionNotCreatedException as error:
        pytest.skip(f"chromium does not start on this machine: {str(error.msg).splitlines()[0]}")
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int = 1100, dark: bool = False, scripts: bool = True, media: str = "screen") -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
    browser.get(page.as_uri())


def keep(browser: Any, name: str) -> None:
    """The whole page as build/screenshots/NAME.png."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
    data = base64.b64decode(picture["data"])
    assert len(data) > 20_000
    (SHOTS / f"{name}.png").write_bytes(data)


def column(browser: Any, heading: str) -> list[str]:
    """The texts of a column's visible cells, from top to bottom."""
    return browser.execute_script("""
        const table = document.querySelector("table.sorted");
        const i = [...table.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === arguments[0]);
        return [...table.tBodies[0].rows].filter(r => r.offsetParent).map(r => r.cells[i].textContent.trim());""", heading)


def click(browser: Any, heading: str) -> None:
    browser.execute_script("[...document.querySelectorAll('table.sorted button')]"
                           ".find(b => b.textContent === arguments[0]).click()", heading)


def filtered(browser: Any, text: str) -> list[str]:
    from selenium.webdriver.common.by import By

    box = browser.find_element(By.CSS_SELECTOR, ".filter input")
    box.clear()
    box.send_keys(text)
    return column(browser, "candidate")


def move(browser: Any, element: Any) -> str:
    """Scroll there, put the mouse on it; the tooltip's text."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    box = browser.execute_script("const b = arguments[0].getBoundingClientRect();"
                                 "return [b.left + b.width / 2, b.top + b.height / 2]", element)
    for x, y in ((5, 5), box):
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    return browser.execute_script("const t = document.querySelector('#tip'); return t.hidden ? '' : t.textContent")


def severe(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.parametrize(("name", "width", "dark"), [("desktop", 1440, False), ("dark", 1100, True), ("phone", 390, False),
                                                     ("phone-dark", 360, True), ("print", 794, False)])
def test_nothing_overflows_and_nothing_complains(browser: Any, page: Path, name: str, width: int, dark: bool) -> None:
    show(browser, page, width, dark, media="print" if name == "print" else "screen")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("""
        return [...document.querySelectorAll(".scroll, .plot, nav, pre")].filter(e => e.checkVisibility())
          .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.className)""") == []  # no column is lost, nothing is swiped
    wide = browser.execute_script("""
        const inside = e => e.closest(".plot, .scroll, pre, nav");
        return [...document.querySelectorAll("main *")].filter(e => e.offsetParent && !inside(e))
          .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + " " + e.textContent.slice(0, 40))""")
    assert wide == []
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 22, 24)" if dark else "rgba(0, 0, 0, 0)" if name == "print" else "rgb(246, 246, 244)")
    keep(browser, name)
    assert severe(browser) == []


def test_every_figure_is_seen_once_at_any_width(browser: Any, page: Path) -> None:
    seen = "return [...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('svg')].filter(s => s.checkVisibility()).length)"
    for width in (1100, 360):
        show(browser, page, width)
        browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert browser.execute_script(seen) == [1] * 12


def test_sorting(browser: Any, page: Path) -> None:
    show(browser, page)
    before = column(browser, "candidate")
    assert len(before) == 60
    click(browser, "memory")
    sizes = [float(v) for v in browser.execute_script(
        "return [...document.querySelectorAll('table.sorted tbody tr')].map(r => r.cells[10].dataset.v)")]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 20
    click(browser, "memory")
    assert column(browser, "candidate")[0] != before[0]
    click(browser, "after")  # most have none: those stay last, whichever way
    for _ in range(2):
        values = column(browser, "after")
        assert values[:3] != ["-"] * 3
        assert values[3:] == ["-"] * 57
        click(browser, "after")
    click(browser, "#")
    assert column(browser, "candidate") == before


def test_filtering(browser: Any, page: Path, report: dict[str, Any]) -> None:
    show(browser, page)
    every = [c["name"] for c in report["candidates"]]
    assert sorted(name.split()[0] for name in column(browser, "candidate")) == sorted(every)
    assert len(filtered(browser, "finalist")) == 2
    limit, hidden = report["candidates"][9]["measured"]["kl"], report["result"]["architecture"]["hidden_size"]
    expected = {c["name"] for c in report["candidates"] if c["measured"] and c["measured"]["kl"] < limit
                and c["architecture"]["hidden_size"] == hidden}
    got = {name.split()[0] for name in filtered(browser, f"kl<{limit} hidden={hidden}")}
    assert got == expected
    assert 0 < len(got) < 9
    small = {c["name"] for c in report["candidates"] if c["cost"]["memory_bytes"] < 2.4 * 2**20}
    assert {name.split()[0] for name in filtered(browser, "memory<2.4MiB")} == small
    assert 0 < len(small) < 60
    assert browser.execute_script("return document.querySelector('.filter output').textContent") == f"{len(small)} of 60"
    assert filtered(browser, "nothing-has-this") == []
    assert len(filtered(browser, " ")) == 60


def test_hovering_a_point_and_a_layer(browser: Any, page: Path, report: dict[str, Any]) -> None:
    from selenium.webdriver.common.by import By

    show(browser, page)
    win = report["result"]["candidate"]
    stars = [e for e in browser.find_elements(By.CSS_SELECTOR, "#tradeoff .large [data-tip]")
             if e.get_attribute("data-tip").startswith(f"{win} after distillation")]
    assert len(stars) == 1
    assert move(browser, stars[0]) == f"{win} after distillation: KL {report['result']['exported']['kl']:.4g}"
    marks = browser.find_elements(By.CSS_SELECTOR, "#layers .figures > figure .large [data-tip]")
    assert len(marks) == 22
    row = report["scores"]["layers"][5]
    mark = next(m for m in marks if m.get_attribute("data-tip").startswith("layer 5 "))
    assert move(browser, mark).startswith(f"layer 5 (attention (*)): MSE {row['mse']:.4g}")
    assert "layer 5, attention" in move(browser, browser.find_elements(By.CSS_SELECTOR, ".strip i")[5])
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 2, "y": 2})
    assert browser.execute_script("return document.querySelector('#tip').hidden")
    assert severe(browser) == []


def test_without_scripts_it_tells_the_story(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By

    show(browser, page, scripts=False)
    text = browser.find_element(By.TAG_NAME, "body").text
    for part in ("parameters became", "Which layers matter", "Rank correlation", "Defaults taken", "minipuzzle prune"):
        assert part in text
    assert not browser.find_element(By.CSS_SELECTOR, ".filter").is_displayed()
    titles = browser.find_elements(By.CSS_SELECTOR, "#tradeoff .large title")
    assert len(titles) >= 24
    show(browser, page)


def test_a_comparison(browser: Any, report: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(report)
    other["result"]["loss_distilled"] = 1.9
    page = write_comparison({"runs/one": report, "runs/two": other}, tmp_path / "comparison.html")
    for width in (1100, 360):
        show(browser, page, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    show(browser, page)
    assert column(browser, "run") == ["runs/one", "runs/two"]
    click(browser, "distilled")
    assert column(browser, "run") == ["runs/two", "runs/one"]
    keep(browser, "comparison")
    assert severe(browser) == []
