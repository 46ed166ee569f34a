"""The page: everything in it has a name, comes from beside it, and prompts stay text."""

import base64
import hashlib
import html.parser
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from pilotage.eval.comparison import report
from pilotage.eval.comparison.curves import CURVES, charts, draw_curve, legend, value_range
from pilotage.eval.comparison.report import beside_what_they_match, render
from pilotage.eval.comparison.thumbnails import LARGEST, LIGHT, thumbnail

from .comparisons import PROMPTS, SETTINGS, made_up

SEEDS = (0, 7)


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

    def every(self, tag):
        return [a for t, a in zip(self.tags, self.attributes, strict=True) if t == tag]


def rendered(folder, **options):
    return render(*made_up(folder, **options), folder)


def test_prompts_and_settings_are_text_never_markup(tmp_path):
    text = rendered(tmp_path)
    page = Page(text)
    assert page.tags.count("script") == 1
    assert not any(name.startswith("on") for attrs in page.attributes for name in attrs)
    assert "<script>alert" not in text and "onerror=alert(1)>" not in text
    assert PROMPTS[2] in page.texts and "cfg<settings>" in page.texts
    assert any((attrs.get("alt") or "").startswith(PROMPTS[2]) for attrs in page.attributes)


def test_only_the_own_script_may_run(tmp_path):
    text = rendered(tmp_path)
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert script == Path(report.__file__).with_suffix(".js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in Page(text).attributes if "http-equiv" in a)
    assert policy == (
        "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_page_needs_nothing_from_elsewhere(tmp_path):
    """What it names lies beside it: figures, pictures, and a folder of these for each setting."""
    page = Page(rendered(tmp_path, seeds=SEEDS))
    (tmp_path / "cells.csv").touch()
    (tmp_path / "cells.json").touch()
    named = [a[key] for a in page.attributes for key in ("href", "src") if key in a]
    beside = [name for name in named if not name.startswith(("data:", "#"))]
    assert all((tmp_path / unquote(name)).exists() for name in beside)
    originals = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")}
    assert len(originals) == len(SETTINGS) * len(PROMPTS) * len(SEEDS)
    assert originals <= set(beside)


def test_all_prompts_and_seeds_are_there_prompt_by_prompt(tmp_path):
    page = Page(rendered(tmp_path, seeds=SEEDS))
    lazy = [a for a in page.every("img") if a.get("loading") == "lazy"]
    assert len(lazy) == len(SETTINGS) * len(PROMPTS) * len(SEEDS)
    for place, image in enumerate(lazy):
        row = place // len(SETTINGS)
        prompt, seed = row // len(SEEDS), row % len(SEEDS)
        assert Path(image["src"]).name == f"{SEEDS[seed]}-{prompt}.png"
        assert image["alt"].startswith(f"{PROMPTS[prompt]}, seed {SEEDS[seed]}: ")


def test_page_has_names_for_everything(tmp_path):
    page = Page(rendered(tmp_path))
    ids = {attrs["id"] for attrs in page.attributes if "id" in attrs}
    for tag, attrs in zip(page.tags, page.attributes, strict=True):
        if tag == "img":  # those of the viewer get their texts with their pictures
            assert attrs["alt"] or "src" not in attrs
        assert tag != "th" or "scope" in attrs
        assert tag != "input" or attrs["aria-label"]
        assert attrs.get("aria-labelledby", "answer") in ids
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
        if "scroll" in attrs.get("class", "").split():
            assert attrs["tabindex"] == "0" and attrs["aria-label"]
    assert page.tags.count("h1") == page.tags.count("main") == 1
    assert page.attributes[page.tags.index("a")]["href"] == "#answer"  # skip link, first


def test_the_table_tells_values_and_intervals(tmp_path):
    text = rendered(tmp_path)
    assert '<td data-name="Fréchet distance">14.5<small>5.5 to 23.5</small></td>' in text
    assert '<td data-name="SSIM to CFG">–' in text
    assert "<small>added: at the cost of ag w=7.5</small>" in text


def test_baselines_of_equal_cost_stand_beside_what_they_match(tmp_path):
    rows, _, _ = made_up(tmp_path)
    assert beside_what_they_match(rows) == [0, 1, 2, 3, 4, 5]
    assert beside_what_they_match([rows[i] for i in (4, 0, 5, 1)]) == [0, 2, 1, 3]
    assert beside_what_they_match([rows[i] for i in (5, 0, 4)]) == [1, 2, 0]


def test_large_pictures_are_shown_smaller(tmp_path):
    rows, facts, samples = made_up(tmp_path)
    large = samples[0].paths[0]
    Image.effect_noise((1024, 512), 64).save(large)
    before = large.read_bytes()
    page = Page(render(rows, facts, samples, tmp_path))
    (small,) = (tmp_path / "thumbnails").rglob("*.webp")
    sources = [attrs.get("src") for attrs in page.every("img")]
    assert str(small.relative_to(tmp_path)) in sources
    assert str(large.relative_to(tmp_path)) not in sources
    assert any(a.get("href") == str(large.relative_to(tmp_path)) for a in page.every("a"))
    with Image.open(small) as image:
        assert image.format == "WEBP" and image.size == (LARGEST, LARGEST // 2)
    assert large.read_bytes() == before
    sizes = {(a["width"], a["height"]) for a in page.every("img") if a.get("loading")}
    assert sizes == {(str(LARGEST), str(LARGEST // 2))}


def test_thumbnails_are_made_once(tmp_path):
    path = tmp_path / "cfg" / "a.png"
    path.parent.mkdir()
    Image.effect_noise((400, 400), 64).save(path)
    assert path.stat().st_size > LIGHT
    small = thumbnail(path, tmp_path)
    os.utime(small, ns=(path.stat().st_mtime_ns,) * 2)
    made = small.stat().st_mtime_ns
    assert thumbnail(path, tmp_path).stat().st_mtime_ns == made
    os.utime(path, ns=(made + 1,) * 2)  # made anew
    assert thumbnail(path, tmp_path).stat().st_mtime_ns > made
    Image.new("RGB", (400, 400)).save(path)
    assert thumbnail(path, tmp_path) == path  # light enough


@pytest.mark.parametrize("x", CURVES)
def test_curves_show_every_value(tmp_path, x):
    """A marker a value, an interval a bar, names as they are."""
    rows, facts, _ = made_up(tmp_path)
    drawn = 0
    for name in charts(rows)[x]:
        svg = draw_curve(rows, x, name, facts["real"].get(name)).decode()
        known = [row for row in rows if row.get(name) is not None]
        markers = [use for use in re.findall("<use [^>]*>", svg) if "stroke: #6b7280" not in use]
        assert len(markers) == len(known)
        bars = [row for row in known if row.get(f"{name}_interval")]
        groups = re.findall('<g id="LineCollection_.*?</g>', svg, re.DOTALL)
        assert sum(group.count("<path") for group in groups) == len(bars)
        assert svg == draw_curve(rows, x, name, facts["real"].get(name)).decode()
        drawn += 1
    assert drawn and x not in charts([row | {x: None} for row in rows])


def test_the_legend_names_methods_and_steps(tmp_path):
    rows, _, _ = made_up(tmp_path)
    entries = {one["text"]: one for one in legend(rows)}
    assert set(entries) == {"cfg, 20 steps", "apg, 20 steps", "ag, 20 steps", "cfg, fewer steps"}
    assert entries["cfg, fewer steps"]["line"] == "none"
    assert entries["cfg, fewer steps"]["colour"] == entries["cfg, 20 steps"]["colour"]
    assert len({one["colour"] for one in entries.values()}) == 3


def test_axes_end_where_the_data_do(tmp_path):
    rows, _, _ = made_up(tmp_path)
    low, high = value_range(rows, "ssim")
    assert high == 1 and 0.7 < low < 0.86  # its lowest interval begins at .85
    low, high = value_range(rows, "fd")  # from 0 to 27
    assert low == 0 and 27 < high < 30
    assert value_range([{"saturation": 0.5}], "saturation", 0.2)[0] < 0.2
    low, high = value_range([{"kid": 0.0}], "kid")
    assert low < 0 < high


def test_without_a_reference_what_needs_one_is_left_out(tmp_path):
    text = rendered(tmp_path, fd=False)
    assert "Fréchet" not in text and "real pictures</" not in text
    assert "quality was not measured" in text and "Over guidance scale w" in text
    assert 'id="verdicts"' not in text
