"""The report in a real browser. Needs Chromium and the `browser` extra: ``pytest -m browser``."""

import io
import re

import pytest
from PIL import Image

from pilotage.eval.comparison.curves import CURVES, charts
from pilotage.eval.comparison.report import render

from ...chromium import chromium, until
from .comparisons import PROMPTS, SETTINGS, made_up

pytestmark = pytest.mark.browser
SEEDS = (0, 7)
PHONE = {"width": 390, "height": 800}
A4 = (595, 842)  # points
NAMES = [f"{method} w={w:g}" for method, w, *_ in SETTINGS[:5]] + ["cfg w=7.5, 15 steps"]
LOADED = "image => image.complete && image.naturalWidth > 0"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def requests():
    """What the page asked for."""
    return []


@pytest.fixture
def opened(browser, tmp_path, requests):
    """A function that opens the report; closing checks that it complained about nothing.

    Nor may it ask for anything but files of its folder.
    """
    pages, problems = [], []

    def open_(seeds=SEEDS, noise=None, **options):
        made = made_up(tmp_path, seeds=seeds)
        if noise is not None:
            Image.effect_noise((400, 400), 64).save(tmp_path / "pictures" / noise)
        path = tmp_path / "report.html"
        path.write_text(render(*made, tmp_path), encoding="utf-8")
        page = browser.new_page(**options)
        pages.append(page)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    for page in pages:
        page.close()
    assert problems == []
    inside = ("data:", tmp_path.as_uri())
    assert requests and all(url.startswith(inside) for url in requests)


def colour(page, selector):
    """Red, green and blue in the left half of an element, as the browser draws it."""
    picture = Image.open(io.BytesIO(page.locator(selector).screenshot()))
    return picture.convert("RGB").getpixel((picture.width // 4, picture.height // 2))


def shown(page):
    """What the viewer shows: the picture, and the two settings."""
    return (
        page.locator("#shown").text_content(),
        page.locator("#tag-first").text_content(),
        page.locator("#tag-second").text_content(),
    )


def test_charts_and_pictures_are_shown(opened, tmp_path):
    page = opened()
    drawn = page.locator(".charts img")
    assert drawn.count() == sum(map(len, charts(made_up(tmp_path)[0]).values()))
    assert set(charts(made_up(tmp_path)[0])) == set(CURVES)
    pictures = page.locator(".pictures img")
    assert pictures.count() == len(SETTINGS) * len(PROMPTS) * len(SEEDS)
    for image in [*drawn.all(), *page.locator(".strip img").all(), pictures.last]:
        image.scroll_into_view_if_needed()
        until(page, LOADED, image.element_handle())


def test_pictures_load_when_they_come_near(opened, requests):
    page = opened(seeds=range(60))
    last = page.locator(".pictures img").last
    url = last.evaluate("image => image.src")
    first = page.locator(".pictures img").first
    first.scroll_into_view_if_needed()
    until(page, LOADED, first.element_handle())
    assert first.evaluate("image => image.src") in requests and url not in requests
    last.scroll_into_view_if_needed()
    until(page, LOADED, last.element_handle())
    assert url in requests


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out(opened, width, scheme):
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """
        width => [...document.querySelectorAll("body *")].filter(element =>
            !element.closest(".scroll, dialog") &&
            element.getBoundingClientRect().right > width + 0.5
        ).map(element => element.outerHTML.slice(0, 80))
    """
    assert page.evaluate(outside, width) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable(opened, scheme):
    """Contrast of at least 4.5 (WCAG AA) between text and ground."""
    page = opened(color_scheme=scheme)
    page.locator("[data-compare]").click()
    pairs = page.evaluate("""() => {
        const ground = element => {
            for (let one = element; one; one = one.parentElement) {
                const colour = getComputedStyle(one).backgroundColor;
                if (!/^rgba\\(.*, 0\\)$/.test(colour)) return colour;
            }
        };
        const texts = "p, a, h1, h2, h3, th, td, dt, dd, small, button, pre, figcaption";
        return [...document.querySelectorAll(texts)]
            .filter(element => element.checkVisibility() && element.textContent.trim())
            .map(element => [getComputedStyle(element).color, ground(element), element.outerHTML]);
    }""")
    assert len(pairs) > 100
    for text, ground, element in pairs:
        light, dark = sorted((luminance(text), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, element)


def luminance(colour):
    """Relative luminance (WCAG) of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_first_tab_skips_to_the_answer(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "answer"
    assert page.url.endswith("#answer")


def test_lines_can_be_copied(opened):
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    page.locator("[data-copy]").first.click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "pilotage generate -g apg 'a fox'"


def test_hidden_columns_are_said(opened):
    page = opened(viewport=PHONE)
    hint = page.locator(".hint").first
    hint.get_by_text("columns to the right").wait_for()
    hidden = int(hint.text_content().split()[0])
    assert 0 < hidden < len(SETTINGS)
    page.locator(".scroll").first.evaluate("box => { box.scrollLeft = 10_000; }")
    until(page, "hint => hint.textContent === ''", hint.element_handle())
    first = page.locator(".pictures tbody th").first  # stays where it is
    assert first.bounding_box()["x"] >= 0


def test_arrows_move_picture_and_setting(opened):
    page = opened()
    page.locator("[data-compare]").click()
    assert shown(page) == (f"{PROMPTS[0]} · seed 0", "cfg w=7.5", "apg w=7.5")
    page.keyboard.press("ArrowDown")
    assert shown(page)[0] == f"{PROMPTS[0]} · seed 7"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert shown(page)[0] == f"{PROMPTS[2]} · seed 7"
    seen = [shown(page)[2]]
    for _ in range(len(SETTINGS) - 2):
        page.keyboard.press("ArrowRight")
        seen.append(shown(page)[2])
    assert sorted(seen) == sorted(set(NAMES) - {"cfg w=7.5"})  # all but the first
    page.keyboard.press("ArrowLeft")
    assert shown(page)[1:] == ("cfg w=7.5", seen[-2])
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    assert page.evaluate("document.activeElement.hasAttribute('data-compare')")


def test_the_picture_that_is_chosen_is_shown_in_full(opened, requests):
    """The table shows a thumbnail, the viewer the file itself."""
    file = "ag-w7.5-s20/0-1.png"
    page = opened(noise=file)
    chosen = page.locator(".pictures tbody tr").nth(2).locator("td a").nth(4)
    assert chosen.locator("img").get_attribute("src").endswith("0-1.webp")
    assert not any(url.endswith(file) for url in requests)
    chosen.click()
    assert shown(page) == (f"{PROMPTS[1]} · seed 0", "cfg w=7.5", "ag w=7.5")
    until(page, "end => document.getElementById('second').src.endsWith(end)", file)
    assert page.locator("#file-second").get_attribute("href").endswith(file)


def test_slide_flip_and_difference(opened):
    """By the colours of the pictures: red is the setting's number times 40."""
    page = opened()
    page.locator("[data-compare]").click()  # the settings 1 and 3
    assert colour(page, "#stage") == (40, 0, 120)
    page.locator("#at").fill("10")
    assert colour(page, "#stage") == (120, 0, 120)
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 50)
    page.mouse.up()
    assert page.locator("#at").input_value() == "80" and colour(page, "#stage") == (40, 0, 120)

    page.get_by_role("button", name="Flip").click()
    assert colour(page, "#stage") == (40, 0, 120)
    assert not page.locator("#tag-second").is_visible()
    page.locator("#stage").click()
    assert colour(page, "#stage") == (120, 0, 120)
    page.locator("#stage").press(" ")
    assert colour(page, "#stage") == (40, 0, 120)

    page.get_by_role("button", name="Difference").click()
    assert colour(page, "#stage") == (255, 0, 0)  # four times 80 is more than there is
    page.locator("#choose-second").select_option("apg w=3")  # 80: a difference of 40
    assert abs(colour(page, "#stage")[0] - 160) <= 1
    page.locator("#choose-second").select_option("cfg w=7.5")
    assert colour(page, "#stage") == (0, 0, 0)


def test_a_phone_has_buttons_for_all(opened):
    page = opened(viewport=PHONE, has_touch=True)
    page.locator(".strip a").last.tap()
    inside = page.locator("#viewer").bounding_box()
    assert inside["x"] >= 0 and inside["width"] <= PHONE["width"]
    assert page.locator("#viewer").evaluate("box => box.scrollWidth <= box.clientWidth")
    page.get_by_role("button", name="Next picture").tap()
    assert shown(page)[0] == f"{PROMPTS[0]} · seed 7"
    page.get_by_role("button", name="Previous picture").tap()
    page.get_by_role("button", name="Previous picture").tap()
    assert shown(page)[0] == f"{PROMPTS[2]} · seed 7"
    page.get_by_role("button", name="Close").tap()
    assert not page.locator("#viewer").is_visible()


def test_without_scripts_pictures_are_links(opened):
    page = opened(java_script_enabled=False)
    assert not page.locator("[data-compare]").is_visible()
    page.locator(".pictures td a").nth(1).click()
    assert page.url.endswith(".png")


def test_on_paper_nothing_is_cut(opened):
    """A4, every table in the width of the page, verdicts open."""
    page = opened()
    content = page.pdf(prefer_css_page_size=True).decode("latin-1")
    boxes = re.findall(r"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert boxes and all((round(float(w)), round(float(h))) == A4 for w, h in boxes)
    assert page.locator("details").evaluate("details => details.open")
    page.emulate_media(media="print")
    width = round((210 - 2 * 14) / 25.4 * 96)  # pixels between the margins
    page.set_viewport_size({"width": width, "height": 1000})
    outside = """
        width => [...document.querySelectorAll("body *")].filter(element =>
            element.checkVisibility() &&
            (element.getBoundingClientRect().right > width + 1 ||
             element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0)
        ).map(element => element.outerHTML.slice(0, 80))
    """
    assert page.evaluate(outside, width) == []


def test_printing_waits_for_all_pictures(opened):
    """Also for those far below, which were not loaded."""
    page = opened(seeds=range(60))
    page.evaluate("""() => {
        const whole = image => !image.src || image.complete && image.naturalWidth > 0;
        window.printed = new Promise(printed => {
            window.print = () => printed([...document.images].every(whole));
        });
    }""")
    page.get_by_role("button", name="Print").click()
    assert page.evaluate("window.printed")
