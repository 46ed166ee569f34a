"""The report in a real browser. Needs Chromium and the `browser` extra: ``pytest -m browser``."""

import os
import shutil

import pytest

from pilotage.eval.comparison.report import write_report

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


@pytest.fixture(params=["light", "dark"])
def page(browser, tmp_path, request):
    """The report; closing checks that it complained about nothing and asked for nothing."""
    path = tmp_path / "report.html"
    write_report(path, *made_up(tmp_path))
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, color_scheme=request.param
    )
    page = context.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert problems == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    context.close()


def column(page, number):
    """Values of a column of the table, from top to bottom."""
    cells = page.locator(f".cells tbody tr > :nth-child({number})")
    return cells.evaluate_all("cells => cells.map(cell => cell.dataset.value)")


def test_sorting(page):
    heads = page.locator(".cells thead th")
    names = heads.evaluate_all("cells => cells.map(cell => cell.textContent.trim())")
    distance = names.index("Fréchet distance") + 1
    expected = sorted(setting[6] for setting in SETTINGS)
    button = heads.nth(distance - 1).locator("button")
    button.click()
    assert [float(v) for v in column(page, distance)] == expected
    assert heads.nth(distance - 1).get_attribute("aria-sort") == "ascending"
    button.focus()
    page.keyboard.press("Enter")
    assert [float(v) for v in column(page, distance)] == expected[::-1]
    similarity = names.index("SSIM to CFG") + 1
    heads.nth(similarity - 1).locator("button").click()
    values = column(page, similarity)
    assert values[-2:] == ["", ""] and "" not in values[:-2]  # missing values come last
    heads.first.locator("button").click()
    labels = column(page, 1)
    assert labels == sorted(labels, key=str.lower) and len(labels) == len(SETTINGS)
    assert page.locator('[aria-sort="ascending"]').count() == 1


def test_enlarging_by_mouse_and_keyboard(page):
    dialog, pictures = page.locator("dialog"), page.locator(".picture")
    assert pictures.count() == len(SETTINGS) * len(PROMPTS)
    pictures.nth(1).click()
    assert dialog.is_visible() and dialog.locator("p").inner_text().startswith(PROMPTS[0])
    page.mouse.click(5, 5)  # outside
    assert not dialog.is_visible()
    pictures.nth(0).focus()
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    first = dialog.locator("img").get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert dialog.locator("img").get_attribute("src") != first
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert dialog.locator("img").get_attribute("src") == first
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert pictures.nth(0).evaluate("button => button === document.activeElement")
    last = pictures.last
    last.press("Space")
    assert dialog.locator("p").inner_text().startswith(PROMPTS[-1])
    dialog.locator(".close").click()
    assert not dialog.is_visible()


def test_charts_have_a_visible_point_for_every_cell(page):
    for figure in page.locator("figure").all():
        points = figure.locator(".point")
        assert points.count() == int(figure.get_attribute("data-points"))
        frame = figure.locator(".chart").bounding_box()
        for point in points.all():
            box = point.bounding_box()
            assert frame["x"] <= box["x"] <= frame["x"] + frame["width"]
            assert frame["y"] <= box["y"] <= frame["y"] + frame["height"]


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
