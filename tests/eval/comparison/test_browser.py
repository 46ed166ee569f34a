"""The report in a real browser. Needs Chromium and the `browser` extra: ``pytest -m browser``."""

import os
import shutil

import pytest

from pilotage.eval.comparison.report import CURVES, render

from .comparisons import PROMPTS, SETTINGS, made_up

pytestmark = pytest.mark.browser
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "Chromium is needed: apt-get install chromium, or name it in CHROMIUM"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, tmp_path):
    """The report; closing checks that it complained about nothing and asked for nothing."""
    path = tmp_path / "report.html"
    path.write_text(render(*made_up(tmp_path)), encoding="utf-8")
    page = browser.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert problems == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    page.close()


def test_pictures_and_curves_are_shown(page):
    pictures = page.locator("img")
    assert pictures.count() == len(SETTINGS) * len(PROMPTS) + len(CURVES)
    widths = pictures.evaluate_all("all => all.map(image => image.naturalWidth)")
    assert min(widths) > 0


@pytest.mark.parametrize("width", [400, 1600])
def test_nothing_sticks_out(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """
        width => [...document.querySelectorAll("main *")].filter(element =>
            !element.closest(".scroll") && element.getBoundingClientRect().right > width + 0.5
        ).map(element => element.outerHTML.slice(0, 80))
    """
    assert page.evaluate(outside, width) == []
