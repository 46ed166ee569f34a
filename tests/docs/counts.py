"""The support counts that README.md and docs/pipelines.md give, written into both.

    python -m tests.docs.counts

The known classes come from the package, what was tested from the figures of the seam's tests.
"""

import json
import re
from pathlib import Path

import diffusers

from pilotage.pipelines.seam.support import LAYOUTS

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "eval" / "results" / "seam.json"
# Page -> where the list of classes lies, seen from it.
PAGES = {"README.md": "pipelines/SUPPORT.md", "docs/pipelines.md": "support.md"}
MARKED = re.compile(r"(<!-- counts[^>]*-->\n).*?(\n<!-- end of counts -->)", re.DOTALL)


def counts() -> tuple[int, int]:
    """Classes of diffusers whose branches are known, and families tested end to end."""
    known = sum(hasattr(diffusers, name) for name in LAYOUTS)
    families = json.loads(FIGURES.read_text())["families"].values()
    return known, sum(family["cfg_bit_equal"] and family["ag_rows_ok"] for family in families)


def text(page: str) -> str:
    """The sentence with both counts for a page."""
    known, tested = counts()
    made = json.loads(FIGURES.read_text())["context"]
    machine = f"{made['machine']['cores']} cores of an {made['machine']['processor']}"
    return (
        f"Today **{known}** pipeline classes of diffusers take `guidance=`, every other one is "
        f"refused with the reason;\n**{tested}** families were tested end to end, as tiny real "
        f"pipelines (`{made['command']}`,\n"
        f"{machine}, {made['date']}: [the list]({PAGES[page]}))."
    )


def with_counts(page: str) -> str:
    """A page with the sentence between its markers."""
    return MARKED.sub(lambda match: match[1] + text(page) + match[2], (ROOT / page).read_text())


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(with_counts(page))
