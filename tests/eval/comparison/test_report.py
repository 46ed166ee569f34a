"""The report: what it says follows from the figures, and prompts stay text."""

import html.parser
import re

import pytest
from PIL import Image

from pilotage.eval.comparison.answer import answer
from pilotage.eval.comparison.report import CURVES, LARGEST, draw_curves, render

from .comparisons import PROMPTS, SETTINGS, made_up, paired


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
    assert "<td>14.5<small>5.5 to 23.5</small></td>" in text and "<td>–</td>" in text
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


def test_the_answer_follows_from_the_paired_differences(tmp_path):
    """The settings' own intervals overlap, all of them, and decide nothing."""
    rows, facts, _ = made_up(tmp_path)
    assert answer(rows, facts) == [
        "Lowest Fréchet distance of the settings asked for: apg w=7.5, 20 steps, 9 (95 % interval "
        "0 to 18). It is better than all 4 others.",
        "Beside CFG with fewer steps at the nearest cost, better: ag w=7.5, 20 steps (14.5 against "
        "18).",
    ]
    lead, cheapest, equal = answer(*made_up(tmp_path, half=5.8)[:2])
    assert lead.endswith(
        "better than 1 of the 4 others; 32 prompts cannot tell it from cfg w=3, 20 steps (about 90 "
        "would), apg w=3, 20 steps (about 90 would), ag w=7.5, 20 steps (about 90 would)."
    )
    assert cheapest.startswith("Cheapest that is not clearly worse: ag w=7.5, 20 steps, 14.5")
    assert equal.endswith(
        "cost, 32 prompts cannot tell: ag w=7.5, 20 steps (14.5 against 18) (about 90 would)."
    )


def labels_to(rows, **changed):
    return {row["label"]: changed.get(row["kind"], row["fd"]) for row in rows}


def test_an_added_baseline_never_wins_but_is_told(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    rows[5] |= {"fd": 2.0, "fd_interval": [1.0, 3.0]}
    facts["comparisons"] = paired(labels_to(rows), 2)
    lead, equal, above = answer(rows, facts)
    assert lead.startswith("Lowest Fréchet distance of the settings asked for: apg w=7.5, 20 steps")
    assert "worse: ag w=7.5, 20 steps (14.5 against 2)" in equal
    assert above.startswith(
        "Better than all asked for, though added for comparison only: cfg w=7.5, 15 steps, 2 (95"
    )
    facts["comparisons"] = paired(labels_to(rows), 7.5)  # not clearly better: not told
    assert not any("added" in text for text in answer(rows, facts))


def test_alignment_is_better_where_it_is_higher(tmp_path):
    rows, facts, _ = made_up(tmp_path, fd=False)
    for row, value in zip(rows, (1, 2, 3, 4, 9, 5), strict=True):
        row |= {"alignment": value, "alignment_interval": [0, 10]}
    values = {row["label"]: row["alignment"] for row in rows}
    facts["comparisons"] = paired(values, 0.5, "alignment")
    first, second = answer(rows, facts)
    assert first.startswith("Highest alignment of the settings asked for: ag w=7.5, 20 steps, 9")
    assert "better than all 4 others" in first and "better: ag" in second


def test_equal_settings_few_prompts_and_one_prompt(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    for one in facts["comparisons"]:
        one |= {"difference": 0.0, "interval": [0.0, 0.0], "needed": None}
    facts["resampled"] = {"unit": "prompts", "count": 4}
    lead, *rest = answer(rows, facts)
    assert (
        "gives the same as cfg w=3, 20 steps, cfg w=7.5, 20 steps, apg w=3, 20 steps and 1" in lead
    )
    assert "the same: ag w=7.5" in rest[1] and rest[-1].startswith("Only 4 prompts")
    facts["comparisons"] = paired(labels_to(rows), 50, needed=None)
    facts["resampled"] = {"unit": "pictures", "count": 12}
    lead, *_, last = answer(rows, facts)
    assert (
        "(95 % interval 0 to 18). 12 pictures of one prompt cannot tell it from" in lead
        and "would" not in lead
    )
    assert "say nothing about others" in last


def test_the_sentences_are_few(tmp_path):
    """However many settings there are."""
    rows, facts, _ = made_up(tmp_path)
    for i in range(18):
        rows.append(rows[2] | {"label": f"mine {i}", "fd": 10.0 + i / 10})
        plain = {"label": f"cfg {i}", "kind": "equal nfe", "matches": [f"mine {i}"]}
        rows.append(rows[5] | plain | {"fd": 12 + i / 10, "nfe": 39.0})
    facts["comparisons"] = paired(labels_to(rows), 5)
    found = answer(rows, facts)
    assert len(found) <= 4 and max(map(len, found)) < 420


def test_without_resamples_there_is_no_verdict(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    first, second = answer(rows, facts | {"comparisons": []})
    assert first.startswith("Lowest Fréchet distance") and "no verdict" in second
    assert len(answer(rows[:1], facts | {"comparisons": []})) == 1
