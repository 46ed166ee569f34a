"""What README.md and pages of docs/ say of the tested pipelines, written into them.

    python -m tests.docs.counts

All of it comes from the figures that ``python -m tests.seam_report`` stores.
"""

import json
import math
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "eval" / "results" / "seam.json"
MARKED = re.compile(r"(<!-- counts[^>]*-->\n).*?(\n<!-- end of counts -->)", re.DOTALL)

CLASSES = """\
Of the **{with_guidance}** pipeline classes of diffusers {diffusers} that take a guidance scale,
**{works}** were run here as tiny real pipelines (CFG as the stock pipeline, bit for bit; APG as the
paper's algorithm in float64; evaluations counted){shared}; **{one_branch}** evaluate one branch,
of which policies can skip steps; **{refused}** are refused, each with its reason ({made}:
[the list]({listed}))."""
FIGURES_TEXT = """\
The seam, on {families} tiny real pipelines with several branches ({branches3} of them with three or
more), {one_branch} with one, and {schedulers} schedulers: `"cfg"` bit-equal in all; `"apg"` within
{apg} of Algorithm 1 in float64 inside the stock loop; a run that reuses every other guided
prediction agrees with the stock loop whose scheduler does so, within {forecast} of what that
changes; where a pipeline makes a sum of its branches ({affine} of them), its weights are found by
least squares, and at most {residual} of it is left over in fp32 ({made}:
[seam.json](../figures/seam.json))."""
# Page -> its text, and the list of classes seen from it.
PAGES = {
    "README.md": (CLASSES, "pipelines/SUPPORT.md"),
    "docs/pipelines.md": (CLASSES, "support.md"),
    "docs/results/seam.md": (FIGURES_TEXT, ""),
}


def values(stored: dict) -> dict[str, object]:
    """What the texts name."""
    context, found = stored["context"], stored["classes"]
    machine = f"{context['machine']['cores']} cores of an {context['machine']['processor']}"
    one = {family["class"] for family in stored["one_branch"].values()}
    one &= set(found["names"]["refused"])
    return {
        "with_guidance": found["with_guidance"],
        "works": found["works"],
        "shared": f", {found['inferred']} share a tested loop" if found["inferred"] else "",
        "refused": found["refused"] - len(one),
        "diffusers": context["versions"]["diffusers"],
        "made": f"`{context['command']}`, {machine}, {context['date']}",
        "one_branch": len(one),
        "families": len(stored["families"]),
        "branches3": len(stored["branches3"]),
        "schedulers": len(stored["schedulers"]),
        "apg": largest(stored, "apg_max_rel_error"),
        "forecast": largest(stored, "forecast_error"),
        "affine": stored["learned"]["affine"],
        "residual": rounded_up(stored["learned"]["max_residual"]),
    }


def largest(stored: dict, figure: str) -> str:
    """The largest of a figure of the families that have it."""
    families = stored["families"].values()
    return rounded_up(max(found[figure] for found in families if figure in found))


def rounded_up(value: float) -> str:
    """A number with two digits, so that what is at most the one is at most the other."""
    if not value:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.1e}".replace("e-0", "e-")


def with_counts(page: str) -> str:
    """A page with its text between its markers."""
    template, listed = PAGES[page]
    text = template.format(listed=listed, **values(json.loads(FIGURES.read_text())))
    whole = re.sub("`.*?`", lambda match: match[0].replace(" ", "\0"), " ".join(text.split()))
    text = textwrap.fill(whole, 118, break_on_hyphens=False).replace("\0", " ")
    return MARKED.sub(lambda match: match[1] + text + match[2], (ROOT / page).read_text())


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(with_counts(page))
