"""The report: what it says follows from the figures, and prompts stay text."""

import html.parser
import re

import pytest
from PIL import Image

from pilotage.eval.comparison.answer import answer
from pilotage.eval.comparison.report import CURVES, LARGEST, draw_curves, render

from .comparisons import PROMPTS, SETTINGS, made_up


class Page(html.parser.HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))

    def handle_data(self, data):
        self.texts.append(data)


def test_prompts_and_settings_are_text_never_markup(tmp_path):
    text = render(*made_up(tmp_path))
    page = Page(text)
    assert "script" not in page.tags
    assert not any(name.startswith("on") for attrs in page.attributes for name in attrs)
    assert "<script>alert" not in text and "onerror=alert(1)>" not in text
    assert PROMPTS[2] in page.texts and "cfg<settings>" in page.texts
    assert any(attrs.get("alt", "").startswith(PROMPTS[2]) for attrs in page.attributes)


def test_page_needs_nothing_from_elsewhere(tmp_path):
    """What it links to lies beside it: the figures, and a folder of pictures for each setting."""
    page = Page(render(*made_up(tmp_path)))
    sources = [attrs["src"] for attrs in page.attributes if "src" in attrs]
    assert len(sources) == len(SETTINGS) * len(PROMPTS) + len(CURVES)
    assert all(source.startswith("data:image/") for source in sources)
    links = [attrs["href"] for attrs in page.attributes if "href" in attrs]
    assert links[:3] == ["data:,", "cells.csv", "cells.json"]
    assert len(links) == 3 + len(SETTINGS) and all((tmp_path / x).is_dir() for x in links[3:])
    policy = next(a["content"] for a in page.attributes if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_page_has_names_for_everything(tmp_path):
    page = Page(render(*made_up(tmp_path)))
    for tag, attrs in zip(page.tags, page.attributes, strict=True):
        assert tag != "img" or attrs["alt"]
        assert tag != "th" or "scope" in attrs
    assert page.tags.count("caption") == page.tags.count("table") == 2
    assert page.tags.count("h1") == 1


def test_the_table_tells_values_and_intervals(tmp_path):
    text = render(*made_up(tmp_path))
    assert "<td>14.5<small>13.5 to 15.5</small></td>" in text and "<td>–</td>" in text
    assert "<small>at the cost of ag w=7.5, 20 steps</small>" in text


def test_large_pictures_are_embedded_smaller(tmp_path):
    rows, facts, samples = made_up(tmp_path)
    Image.effect_noise((1024, 512), 64).save(samples[0].paths[0])
    text = render(rows, facts, samples)
    assert text.count("data:image/webp") == 1 and len(text) < 1024 * LARGEST


@pytest.mark.parametrize("x", CURVES)
def test_curves_show_every_value(tmp_path, x):
    """A marker a value, a line a method and number of steps, names as they are."""
    rows, facts, _ = made_up(tmp_path)
    rows = [row | {"method": f"$<{row['method']}"} for row in rows]
    drawn = draw_curves(rows, x, facts["real"]).decode()
    _, names = CURVES[x]
    known = sum(row.get(name) is not None for row in rows for name in names)
    legend = 4  # cfg, apg, ag, and cfg with fewer steps
    markers = [use for use in re.findall("<use [^>]*>", drawn) if "stroke: #000000" not in use]
    assert len(markers) == known + legend  # ticks are black
    assert "$&lt;cfg, 20 steps" in drawn and "$&lt;cfg, fewer steps" in drawn
    assert drawn == draw_curves(rows, x, facts["real"]).decode()
    assert draw_curves([row | {x: None} for row in rows], x) == b""


def test_without_a_reference_what_needs_one_is_left_out(tmp_path):
    text = render(*made_up(tmp_path, fd=False))
    assert "Fréchet" not in text and "real pictures" not in text
    assert "quality was not measured" in text and "Over guidance scale w" in text


def test_the_answer_follows_from_the_figures(tmp_path):
    rows, *_ = made_up(tmp_path)
    first, *rest = answer(rows)
    assert first == "Lowest Fréchet distance: apg w=7.5, 20 steps, 9 (95 % interval 8 to 10)."
    assert rest == [
        "At the nearest cost (30.2 and 30 evaluations), ag w=7.5, 20 steps is better than "
        "cfg w=7.5, 15 steps: 14.5 against 18."
    ]
    rows[4] |= {"fd": 10.5, "fd_interval": [9.5, 11.5]}
    assert any("Cheapest whose interval overlaps" in t and "ag w=7.5" in t for t in answer(rows))
    rows[5] |= {"fd": 10.0, "fd_interval": [9.0, 11.0]}
    assert any("no better and no worse" in text for text in answer(rows))


def test_without_intervals_there_is_no_verdict(tmp_path):
    rows, *_ = made_up(tmp_path)
    for row in rows:
        row |= {"fd": None, "fd_interval": None}
        row |= {"alignment": row["nfe"], "alignment_interval": None}
    first, second = answer(rows)
    assert first.startswith("Highest alignment: cfg") and "no verdict" in second
