"""Every page of a method has a picture of what the method does today, or says why it has none."""

import json
import re

import pytest
from PIL import Image

from examples.studies.method_pictures import PICTURES, PROMPTS, RESULTS, SHOWN, named, with_caption

from .counts import ROOT

STORED = json.loads((ROOT / RESULTS).read_text())
METHODS = {path.stem for path in (ROOT / "docs/methods").glob("*.md")} - {"index"}
# Pages whose picture another command makes, or which say why there is none.
OTHERS = {"analytic-denoisers", "teleportation", "zeroth-order-personalization", "smc"}


def test_every_page_is_here():
    assert {*SHOWN, *OTHERS} == METHODS and STORED["methods"].keys() == SHOWN.keys()
    assert tuple(STORED["prompts"]) == PROMPTS
    for name in OTHERS:
        page = (ROOT / f"docs/methods/{name}.md").read_text()
        assert re.search(r"!\[[^\]]+\]\(\.\./(pictures|figures)/|No picture:", page), name


@pytest.mark.parametrize("name", SHOWN)
def test_the_picture_is_of_todays_settings(name):
    shown, made = SHOWN[name], STORED["methods"][name]
    assert made["guidance"] == str(named(shown.guidance)), "run the command again"
    assert (made["beside"], made["beside_scale"]) == (str(named(shown.upper[0])), shown.upper[1])
    assert made["scale"] == shown.scale
    file = ROOT / PICTURES / f"{name}.webp"
    assert file.stat().st_size <= 40_000
    with Image.open(file) as picture:
        assert picture.format == "WEBP"
    page = (ROOT / f"docs/methods/{name}.md").read_text()
    assert page == with_caption(name, made, ROOT)
