"""The picture of the README: the top of a run's report in Debian's chromium.

    python benchmarks/screenshot.py runs/mine

Writes docs/report.png.
"""

from __future__ import annotations

import argparse
import base64
import shutil
from pathlib import Path

from selenium import webdriver

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    page = parser.parse_args().run.resolve() / "report.html"
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": WIDTH, "height": 800, "deviceScaleFactor": 1.25, "mobile": False})
        browser.get(page.as_uri())
        browser.execute_script("document.querySelector('nav').hidden = true")
        bottom = browser.execute_script("return document.querySelector('#tradeoff').getBoundingClientRect().bottom")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": bottom + 12, "scale": 1}
        picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": clip,
                                                                     "captureBeyondViewport": True})
    finally:
        browser.quit()
    path = ROOT / "docs" / "report.png"
    path.write_bytes(base64.b64decode(picture["data"]))
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
