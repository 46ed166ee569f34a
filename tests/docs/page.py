"""``python -m tests.docs.page``: the picture of ``pilotage ui`` in README and docs.

Needs Chromium and the `browser` extra.
"""

import tempfile
from pathlib import Path

from pilotage.eval.embedded import load_embedded
from pilotage.eval.ui.address import free_port
from pilotage.eval.ui.serve import keep_private
from pilotage.eval.ui.studio import Studio

from ..chromium import chromium
from ..structure import ROOT

PICTURE = ROOT / "docs" / "pictures" / "ui.png"
PROMPT = "noto style fox"
SIZE = {"width": 1280, "height": 1260}


def main() -> None:
    """CFG and APG with Adaptive Guidance at w = 12, photographed."""
    with tempfile.TemporaryDirectory() as folder:
        keep_private(Path(folder))
        from pilotage.eval.ui.server import launch

        studio = Studio(load_embedded(), Path(folder))
        served, address = launch(studio, "127.0.0.1", free_port("127.0.0.1", 0))
        with chromium() as browser:
            page = browser.new_page(viewport=SIZE)
            page.goto(address)
            page.locator("#prompt textarea").fill(PROMPT)
            for side in ("left", "right"):
                scale = page.locator(f"#{side}").get_by_label("number input for Guidance scale")
                scale.fill("12")
            page.locator("#right-policy input").click()
            page.get_by_role("option", name="ag", exact=True).click()
            page.get_by_role("button", name="Make both pictures").click()
            page.locator("#figures table").wait_for()
            page.locator("#picture canvas, #picture svg.marks").nth(2).wait_for()
            page.screenshot(path=PICTURE)
        served.close(verbose=False)


if __name__ == "__main__":
    main()
