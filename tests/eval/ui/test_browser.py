"""The page clicked through in Chromium. Needs the `browser` extra: ``pytest -m browser``."""

import re

import pytest

from ...chromium import LIMIT, chromium, until

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser, address):
    """Opens the page; closing checks that nothing complained and nothing was asked elsewhere."""
    contexts, problems, requests = [], [], []

    def open_page(**options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        context.set_default_timeout(1000 * LIMIT)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Make both pictures").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert {url for url in requests if not url.startswith((address, "data:", "blob:"))} == set()


def choose(page, side, label, option):
    page.locator(f"#{side}-{label} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def control(page, name):
    return page.locator(f"#{name} input")


def fewer_steps(page, count=4):
    for side in ("left", "right"):
        page.locator(f"#{side}").get_by_label("number input for Steps").fill(str(count))


def make(page, prompt="twemoji style red apple"):
    """Make both pictures; the table of figures, row by row, and the addresses of the pictures."""
    page.locator("#prompt textarea").fill(prompt)
    figures = page.locator("#figures")
    before = figures.inner_text()
    page.get_by_role("button", name="Make both pictures").click()
    changed = "before => document.querySelector('#figures').innerText.trim() != before.trim()"
    until(page, changed, before)
    rows = [row.split("\t") for row in figures.locator("tr").all_inner_texts()]
    pictures = page.locator("#picture img").evaluate_all("all => all.map(image => image.src)")
    return {name: values for name, *values in rows}, pictures


def test_two_settings_side_by_side(opened):
    page = opened()
    fewer_steps(page)
    figures, pictures = make(page)
    assert figures[""] == ["left: cfg", "right: apg"]
    assert figures["network evaluations"] == ["8", "8"]
    assert figures["effective guidance"][0] == "7.5" and len(set(pictures)) == 2
    control(page, "right-apg-eta").fill("1")
    control(page, "right-apg-norm_threshold").fill("0")
    control(page, "right-apg-momentum").fill("0")
    changed, others = make(page)
    assert changed[""][1] == "right: apg(eta=1.0, norm_threshold=0.0, momentum=0.0)"
    assert changed["effective guidance"] == ["7.5", "7.5"]  # it is cfg now
    assert changed["saturation of the picture"][0] == changed["saturation of the picture"][1]
    assert set(others) != set(pictures)
    choose(page, "right", "rule", "cfg")
    choose(page, "right", "policy", "forecast")
    assert control(page, "right-forecast-period").is_visible()
    assert not control(page, "right-apg-eta").is_visible()
    skipped, _ = make(page)
    assert skipped[""] == ["left: cfg", "right: forecast"]
    assert int(skipped["network evaluations"][1]) < int(skipped["network evaluations"][0])
    page.get_by_text("The same by command or in Python").click()
    command = page.locator("#right-command .cm-content").inner_text().replace("\n", " ")
    assert command.startswith("pilotage generate 'twemoji style red apple' -g forecast -w 7.5")
    with page.expect_download() as download:
        page.get_by_role("button", name="Left as PNG").click()
    assert download.value.suggested_filename.endswith(".png")
    assert page.locator("#picture canvas, #picture svg.marks").count() == 3  # the plots


def test_errors_are_messages_in_the_page(opened):
    page = opened()
    page.locator("#prompt textarea").fill("")
    page.get_by_role("button", name="Make both pictures").click()
    page.get_by_text("the prompt is empty").wait_for()
    page.get_by_role("button", name="Close").first.click()
    page.locator("#prompt textarea").fill("noto style fox")
    control(page, "right-apg-norm_threshold").fill("-1")
    page.get_by_role("button", name="Make both pictures").click()
    page.get_by_text("norm_threshold must be >= 0").wait_for()


def test_a_comparison_shows_its_report(opened):
    page = opened()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-prompts textarea").fill("noto style fox\nnoto style cat face")
    page.get_by_label("Scales").fill("7.5")
    page.get_by_role("tabpanel").get_by_label("number input for Steps").locator(
        "visible=true"
    ).fill("2")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("iframe.report").wait_for()
    report = page.frame_locator("iframe.report")
    report.locator("img").first.wait_for(state="attached")
    assert "noto style fox" in report.locator("body").inner_text()
    with page.context.expect_page() as other:
        page.get_by_text("Open the report in a tab of its own").click()
    other.value.wait_for_load_state()
    assert "noto style cat face" in other.value.locator("body").inner_text()


def test_a_word_is_made_and_used(opened, squares):
    page = opened()
    page.get_by_role("tab", name="Make a word").click()
    page.get_by_role("button", name="Make the word").click()
    page.get_by_text("no pictures: drop some first").wait_for()
    page.locator("#word-pictures input[type=file]").set_input_files(squares)
    page.locator("#word-pictures img").nth(len(squares) - 1).wait_for()
    page.get_by_label("New word").fill("<seen>")
    page.get_by_label("Known word to begin from").fill("star")
    page.get_by_role("tabpanel").get_by_label("number input for Steps").locator(
        "visible=true"
    ).fill("45")
    page.get_by_role("button", name="Make the word").click()
    page.get_by_text("is learned: held-out loss").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the word").click()
    assert download.value.suggested_filename == "seen.safetensors"
    page.get_by_role("tab", name="Pictures").click()
    fewer_steps(page)
    figures, _ = make(page, "noto style <seen>")
    assert figures["network evaluations"] == ["8", "8"]


def test_pictures_without_a_network(opened, squares):
    page = opened()
    page.get_by_role("tab", name="Denoise").click()
    page.locator("#denoise-pictures input[type=file]").set_input_files(squares)
    page.locator("#denoise-pictures img").nth(len(squares) - 1).wait_for()
    page.get_by_label("Side in pixels").fill("12")
    page.get_by_role("button", name="Sample").click()
    page.locator("#denoised img").nth(3).wait_for()


def test_on_a_telephone_in_the_dark(opened):
    page = opened(viewport={"width": 390, "height": 844}, color_scheme="dark")
    fewer_steps(page, 2)
    make(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    left, picture = (page.locator(f"#{name}").bounding_box()["y"] for name in ("left", "picture"))
    assert picture < left  # right below the button


def test_two_visitors_take_turns(opened):
    pages = [opened(), opened()]
    for page, prompt in zip(pages, ("noto style fox", "noto style cat face"), strict=True):
        fewer_steps(page)
        page.locator("#prompt textarea").fill(prompt)
        page.get_by_role("button", name="Make both pictures").click()
    for page in pages:
        page.locator("#figures table").wait_for()
    first, second = (
        page.locator("#picture img").evaluate_all("all => all.map(image => image.src)")
        for page in pages
    )
    assert set(first).isdisjoint(second)


def test_stop_ends_it_and_gives_the_model_back(opened):
    page = opened()
    fewer_steps(page, 100)
    page.get_by_role("button", name="Make both pictures").click()
    page.locator("#status").get_by_text(re.compile(r"step \d+ of 100")).wait_for()
    page.locator("button:visible", has_text="Stop").click()
    page.locator("#status progress").wait_for(state="detached")
    assert page.locator("#figures table").count() == 0
    fewer_steps(page, 2)
    figures, _ = make(page)
    assert figures["network evaluations"] == ["4", "4"]
