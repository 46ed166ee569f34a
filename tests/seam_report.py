"""Write what the seam's tests find, family by family and scheduler by scheduler.

    python -m tests.seam_report

makes ``eval/results/seam.json`` and the table of ``pipelines/SUPPORT.md`` from the tests' own list
(tests/families.py) and the layouts (pipelines/seam/support.py).
"""

from pathlib import Path

import torch
from tqdm import tqdm

from pilotage.eval.record import write_figures
from pilotage.pipelines import LAYOUTS
from pilotage.pipelines.seam.layouts import Batched, TwoCalls

from .families import FAMILIES
from .pipelines.checks import (
    COVERED,
    NORM_MATCHED,
    ag_rows_ok,
    apg_error,
    cfg_bit_equal,
    forecast_error,
    resting_rows_ok,
)
from .pipelines.seam.test_noise_levels import cases, scheduler_agrees

ROOT = Path(__file__).resolve().parents[1]


def describe(layout):
    """A layout in words."""
    if isinstance(layout, TwoCalls):
        return "two calls, cond first" + (", norm matched" if layout.matches_norm else "")
    assert isinstance(layout, Batched)
    words = "one batch, " + ("[cond, uncond]" if layout.cond_first else "[uncond, cond]")
    if layout.listed:
        words += ", lists"
    if layout.channels:
        words += f", first {layout.channels} channels"
    return words


def measure():
    """Every family's figures and whether each scheduler's noise levels are right."""
    families = {}
    for name in tqdm(COVERED, unit="family"):
        families[name] = {
            "class": FAMILIES[name].cls,
            "layout": describe(LAYOUTS[FAMILIES[name].cls]),
            "cfg_bit_equal": cfg_bit_equal(name),
            "apg_max_rel_error": apg_error(name),
            "ag_rows_ok": ag_rows_ok(name),
        }
        if name not in NORM_MATCHED:
            families[name] |= {
                "forecast_error": forecast_error(name),
                "resting_rows_ok": resting_rows_ok(name),
            }
    schedulers = {}
    for name, settings in cases():
        ok = scheduler_agrees(name, settings)
        schedulers[name] = {"ok": ok and schedulers.get(name, {"ok": True})["ok"]}
    return {"families": families, "schedulers": schedulers}


def table(families):
    """SUPPORT.md: every class with a layout, the tested ones with what was found."""
    by_class = {}
    for name, found in families.items():
        by_class.setdefault(found["class"], []).append((name, found))
    lines = [
        "# Pipelines that take `guidance=`",
        "",
        "Made by `python -m tests.seam_report` from `pipelines/seam/support.py` and the tests'",
        "own list of families; do not edit. Classes without figures have the loop of a tested",
        "class and are checked at run time only.",
        "",
        "- *layout*: how a pipeline evaluates its branches: in one batch, in the order given, or",
        "  in two calls; *norm matched*: its guided prediction gets the norm of the conditional",
        "  one.",
        '- *CFG*: `guidance="cfg"` equals the stock pipeline bit for bit (batch 1 and 3, with and',
        "  without negative prompts).",
        "- *APG*: relative error against the paper's Algorithm 1 in float64 in the stock loop.",
        "- *AG*: the rows counted at the network are those that Adaptive Guidance promises.",
        "- *forecast*: error of a run in which every other step is skipped and reuses the last",
        "  guided prediction, against the stock loop with a scheduler that does so, in units of",
        "  what that changes; rows counted likewise. *refused*: where norms are matched no step",
        "  can be skipped.",
        "",
        "| pipeline | layout | tested as | CFG | APG | AG | forecast |",
        "|---|---|---|---|---|---|---|",
    ]
    for cls, layout in sorted(LAYOUTS.items()):
        for name, found in by_class.get(cls, [("–", None)]):
            figures = "– | – | – | – |"
            if found:
                cfg = "equal" if found["cfg_bit_equal"] else "DIFFERS"
                rows = "ok" if found["ag_rows_ok"] else "WRONG"
                figures = f"{cfg} | {found['apg_max_rel_error']:.0e} | {rows} |"
                forecast = "refused"
                if "forecast_error" in found:
                    counted = "" if found["resting_rows_ok"] else ", rows WRONG"
                    forecast = f"{found['forecast_error']:.0e}{counted}"
                figures += f" {forecast} |"
            lines.append(f"| {cls} | {describe(layout)} | {name} | {figures}")
    return "\n".join(lines) + "\n"


def main():
    """Measure and write both files."""
    torch.set_num_threads(1)
    figures = measure()
    write_figures(ROOT / "eval" / "results" / "seam.json", figures)
    (ROOT / "pipelines" / "SUPPORT.md").write_text(table(figures["families"]))


if __name__ == "__main__":
    main()
