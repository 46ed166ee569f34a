"""The report: what it says follows from the figures, and prompts stay text."""

import html.parser
import re

import pytest

from pilotage.eval.comparison.answer import answer
from pilotage.eval.comparison.charts import Point, Series, chart, ticks
from pilotage.eval.comparison.report import OVER_COST, OVER_EFFECTIVE, OVER_SCALE, render

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
    assert page.tags.count("script") == 1
    assert not any(name.startswith("on") for attrs in page.attributes for name in attrs)
    assert "<script>alert" not in text and "onerror=alert(1)>" not in text
    assert PROMPTS[2] in page.texts and "cfg<settings>" in page.texts
    assert any(attrs.get("alt", "").startswith(PROMPTS[2]) for attrs in page.attributes)


def test_page_needs_nothing_from_elsewhere(tmp_path):
    page = Page(render(*made_up(tmp_path)))
    sources = [
        attrs[name] for attrs in page.attributes for name in ("src", "href") if name in attrs
    ]
    assert len(sources) == len(SETTINGS) * len(PROMPTS) + 1  # and the empty icon
    assert all(source.startswith("data:") for source in sources)
    policy = next(a["content"] for a in page.attributes if "http-equiv" in a)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_page_has_names_for_everything(tmp_path):
    page = Page(render(*made_up(tmp_path)))
    for tag, attrs in zip(page.tags, page.attributes, strict=True):
        assert tag != "img" or "alt" in attrs
        assert tag != "svg" or "aria-label" in attrs or attrs.get("aria-hidden") == "true"
        assert tag != "th" or "scope" in attrs
    assert page.tags.count("caption") == page.tags.count("table") == 2
    assert page.tags.count("h1") == 1


def test_charts_show_every_cell_that_has_a_value(tmp_path):
    rows, facts, cells = made_up(tmp_path)
    text = render(rows, facts, cells)
    figures = re.findall(r'<figure data-metric="(\w+)" data-over="(\w+)"(.*?)</figure>', text, re.S)
    names = {over: {metric for metric, x, _ in figures if x == over} for _, over, _ in figures}
    wanted = {"w": OVER_SCALE, "effective_guidance": OVER_EFFECTIVE, "nfe": OVER_COST}
    for over, metrics in wanted.items():
        assert names[over] == {m for m in metrics if any(r.get(m) is not None for r in rows)}
    for metric, over, body in figures:
        known = [r for r in rows if r.get(metric) is not None and r.get(over) is not None]
        assert body.count('class="point"') == len(known) > 0
        assert f'data-points="{len(known)}"' in body
        bars = [r for r in known if r.get(f"{metric}_interval")]
        assert body.count('class="error"') == len(bars)


def test_without_a_reference_what_needs_one_is_left_out(tmp_path):
    text = render(*made_up(tmp_path, fd=False))
    assert "Fréchet" not in text and "real pictures" not in text
    assert "quality was not measured" in text and "Saturation over guidance scale w" in text


def test_the_answer_follows_from_the_figures(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    first, *rest = answer(rows, facts["real"])
    assert first == "Lowest Fréchet distance: apg w=7.5, 20 steps, 9 (95 % interval 8 to 10)."
    assert "Best at each scale: w=3: cfg (no difference from apg); w=7.5: apg." in rest
    assert (
        "At the nearest cost (30.2 and 30 evaluations), ag w=7.5, 20 steps is better than "
        "cfg w=7.5, 15 steps: 14.5 against 18."
    ) in rest
    rows[4] |= {"fd": 10.5, "fd_interval": [9.5, 11.5]}
    texts = answer(rows, facts["real"])
    assert any("Cheapest whose interval overlaps" in t and "ag w=7.5" in t for t in texts)
    rows[5] |= {"fd": 10.0, "fd_interval": [9.0, 11.0]}
    assert any("no better and no worse" in text for text in answer(rows))
    assert "real pictures" not in " ".join(answer(rows))


def test_the_answer_names_steps_where_there_are_several(tmp_path):
    rows, *_ = made_up(tmp_path)
    rows.append(rows[3] | {"label": "apg w=7.5, 5 steps", "steps": 5, "fd": 8.5})
    assert any("w=7.5: apg, 5 steps (no difference from apg, 20 steps)" in t for t in answer(rows))


def test_without_intervals_there_is_no_verdict(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    for row in rows:
        row |= {"fd": None, "fd_interval": None}
        row |= {"alignment": row["nfe"], "alignment_interval": None}
    first, second, *rest = answer(rows, facts["real"])
    assert first.startswith("Highest alignment: cfg") and "no verdict" in second
    text = " ".join(rest)
    assert not any(word in text for word in ("better", "worse", "Best", "Cheapest"))


def test_charts_tell_numbers_of_steps_apart(tmp_path):
    rows, facts, cells = made_up(tmp_path)
    for row in rows[:4]:
        rows.append(row | {"steps": 5, "label": row["label"].replace("20", "5"), "nfe": 10.0})
    text = render(rows, facts, cells)
    (chart_,) = re.findall(r'<figure data-metric="fd" data-over="w".*?</figure>', text, re.S)
    keys = re.findall(r'<li><svg class="key (s\d)".*?</svg>(.*?)</li>', chart_)
    assert [name for _, name in keys] == [
        *("cfg, 20 steps", "apg, 20 steps", "ag, 20 steps", "cfg, fewer steps"),
        *("cfg, 5 steps", "apg, 5 steps"),
    ]
    drawn = re.findall(r'<li><svg class="key s\d"[^>]*>(.*?)</svg>', chart_)
    assert drawn[0] == drawn[1] != drawn[4] == drawn[5]  # steps: dash and shape
    assert keys[0][0] == keys[4][0] != keys[1][0] == keys[5][0]  # methods: colour
    assert "stroke-dasharray" in drawn[4] and len(set(drawn[:1] + drawn[3:5])) == 3


def test_places_on_the_axis(tmp_path):
    """Dodged series stand beside each other, closer than to the next place."""
    places = [1.0, 1.05, 9.0]
    series = [Series(f"{i}", [Point(x, 1, "") for x in places]) for i in range(12)]
    for dodge in (False, True):
        drawn = chart(series, "x", "y", "about", dodge=dodge)
        found = [float(x) for x in re.findall(r'cx="([\d.]+)" cy="[\d.]+" r="4.5"/></g>', drawn)]
        groups = [[x for i, x in enumerate(found) if i % 3 == place] for place in range(3)]
        assert [len(set(group)) for group in groups] == ([12] * 3 if dodge else [1] * 3)
        assert max(groups[0]) < min(groups[1]) and max(groups[1]) < min(groups[2])


def test_cost_is_not_shifted(tmp_path):
    text = render(*made_up(tmp_path))
    (chart_,) = re.findall(r'<figure data-metric="fd" data-over="nfe".*?</figure>', text, re.S)
    drawn = re.search(r"<svg class=.chart.*?</svg>(?=<ul)", chart_, re.S).group()
    assert len(set(re.findall(r'class="error" d="M([\d.]+) ', drawn))) == len(
        {setting[5] for setting in SETTINGS}
    )


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1.5, 15), (-3e-4, 2e-4), (0.1999, 0.2001), (12, 13), (0, 4e6)]
)
def test_ticks_are_round_and_span_the_values(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 9 and found == sorted(found)
    assert found[0] <= low + 1e-9 * (high - low) and found[-1] >= high - 1e-9 * (high - low)
    steps = {
        round((b - a) / (found[1] - found[0]), 6) for a, b in zip(found, found[1:], strict=False)
    }
    assert steps == {1}


def test_a_chart_keeps_its_points_inside():
    points = [Point(x, y, "<i>", y - 1, y + 2) for x, y in ((1, 3), (5, -2), (9, 100))]
    drawn = chart([Series("a<b", points)], "x", "y", "about")
    for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4.5"/></g>', drawn):
        assert 62 <= float(x) <= 466 and 12 <= float(y) <= 284
    assert "a&lt;b" in drawn and "<i>" not in drawn
    assert chart([Series("empty")], "x", "y", "about") == ""
    assert "point" in chart([Series("one", [Point(2, 0, "")])], "x", "y", "about")
