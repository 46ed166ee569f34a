"""Write what the seam's tests find: ``eval/results/seam.json`` and ``pipelines/SUPPORT.md``.

    python -m tests.seam_report                # about eight minutes on two cores
    python -m tests.seam_report --only sd wan  # measures these again
    python -m tests.seam_report --list         # classes of diffusers without a family

Every family of the tests (tests/families) is measured in turn: the checks that the tests make, and
what was learned of its pipeline. What a family fails or refuses is written down, not raised.
Figures are kept in cache/seam.json as they come, so that an interrupted run goes on where it was;
they hold as long as the code that they are made by and the versions stay the same. Both files are
written once every family has figures.
"""

import argparse
import json
import math
import warnings

import diffusers
import torch
import transformers
from tqdm import tqdm

from pilotage.eval.record import versions, write_figures
from pilotage.guidance.files import write_json, write_text
from pilotage.pipelines import UnknownSchedulerError, guided
from pilotage.pipelines.seam.layouts import LayoutError
from pilotage.pipelines.seam.support import REFUSED

from .docs.support import page
from .families import FAMILIES
from .pipelines import checks
from .pipelines.classes import definer, lineage, with_scale
from .pipelines.seam.test_noise_levels import cases, scheduler_agrees
from .structure import ROOT, code_of

FIGURES = ROOT / "eval" / "results" / "seam.json"
PAGE = ROOT / "pipelines" / "SUPPORT.md"
KEPT = ROOT / "cache" / "seam.json"
# What the figures depend on.
CODE = (
    *("guidance/run.py", "pipelines/guided.py", "pipelines/seam/*.py"),
    *("tests/components.py", "tests/families/*.py", "tests/oracles/*.py"),
    "tests/pipelines/checks.py",
)
REFUSALS = (LayoutError, UnknownSchedulerError)
MEASURED = [name for name, family in FAMILIES.items() if family.scheduler == "scheduler"]
LIMIT = 1e-4  # of the relative error of APG


def code() -> dict[str, str]:
    """Fingerprints of the files of `CODE`."""
    return code_of(path for pattern in CODE for path in ROOT.glob(pattern))


def works(found: dict) -> bool:
    """Whether a family does all that its class is counted for."""
    error = found.get("apg_max_rel_error", math.inf)
    return found.get("cfg_bit_equal", False) and error <= LIMIT and found.get("ag_rows_ok", False)


def measure(name: str) -> dict:
    """A family's figures, as far as it has them, and why it has no others."""
    found: dict = {"class": FAMILIES[name].cls}
    try:
        for figure, value in figures(name):
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"{figure} is {value}")
            found[figure] = value
    except REFUSALS as refusal:
        found["refused"] = str(refusal)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def figures(name: str):
    """(figure, value) of a family, in the order in which they are to be had."""
    yield "cfg_bit_equal", checks.cfg_bit_equal(name)
    if FAMILIES[name].layout == "one":
        yield "layout", "one branch"
        yield "one_branch_ok", checks.one_branch_ok(name)
    pattern = pattern_of(name)
    yield "branches", pattern.branches
    yield "layout", describe(pattern)
    if not pattern.norm:
        yield "residual", pattern.residual
    yield "apg_max_rel_error", checks.apg_error(name)
    yield "ag_rows_ok", checks.ag_rows_ok(name)
    try:
        yield "forecast_error", checks.forecast_error(name)
        yield "resting_rows_ok", checks.resting_rows_ok(name)
    except REFUSALS as refusal:
        yield "no_forecast", str(refusal)


def pattern_of(name: str):
    """What was learned of a family's pipeline."""
    pipe = guided(FAMILIES[name].build())
    checks.run(pipe, checks.paper_call(name) | {"guidance": "apg"})
    return pipe.guidance_pattern


def describe(pattern) -> str:
    """A pattern in words."""
    names = ["uncond" if pattern.branches == 2 else "another"] * pattern.branches
    names[pattern.main] = "cond"
    calls = [[names.pop(0) for _ in range(count)] for count in pattern.calls]
    listed = ", then ".join(f"[{', '.join(call)}]" if len(call) > 1 else call[0] for call in calls)
    kinds = {
        "negated": pattern.sign < 0,
        "norm of cond": pattern.norm == "match",
        "norm at most cond's": pattern.norm == "limit",
        {"behind": "the part behind"}.get(pattern.part, pattern.part): bool(pattern.part),
    }
    counted = "one batch" if len(calls) == 1 else f"{len(calls)} calls"
    return "; ".join([f"{counted}: {listed}", *(kind for kind, is_so in kinds.items() if is_so)])


def classes(families: dict[str, dict]) -> dict:
    """Which of the classes with a scale work, share a tested loop, are refused, are not known.

    A class is refused beforehand, or because every family of it is.
    """
    taken = with_scale()
    of_class: dict[str, list[dict]] = {name: [] for name in taken}
    for found in families.values():
        of_class.setdefault(found["class"], []).append(found)
    tested = sorted(name for name in taken if any(map(works, of_class[name])))
    inferred, refused, unknown = {}, {}, []
    for name in taken:
        if name in tested:
            continue
        loop, known = definer(name, "__call__"), [b for b in lineage(name) if b in REFUSED]
        if known:
            refused[name] = REFUSED[known[0]]
        elif loop in tested and not of_class[name]:
            inferred[name] = loop
        elif of_class[name] and all("refused" in found for found in of_class[name]):
            refused[name] = of_class[name][0]["refused"]
        else:
            unknown.append(name)
    names = {"works": tested, "inferred": inferred, "refused": refused, "unknown": unknown}
    counts = {place: len(listed) for place, listed in names.items()}
    return {"with_guidance": len(taken), **counts, "names": names}


def summary(families: dict[str, dict]) -> dict:
    """All that is written, of the families' figures."""
    kinds: dict[str, dict] = {"families": {}, "one_branch": {}, "refusals": {}, "failures": {}}
    for name, found in families.items():
        marks = {"error": "failures", "one_branch_ok": "one_branch", "refused": "refusals"}
        kind = next((kind for mark, kind in marks.items() if mark in found), "families")
        kinds[kind][name] = found
    guides = kinds["families"]
    learned = [found["residual"] for found in guides.values() if "residual" in found]
    schedulers: dict[str, dict] = {}
    for name, settings in cases():
        ok = scheduler_agrees(name, settings)
        schedulers[name] = {"ok": ok and schedulers.get(name, {"ok": True})["ok"]}
    return {
        "classes": classes(families),
        **kinds,
        "branches3": {name: found for name, found in guides.items() if found["branches"] > 2},
        "learned": {"affine": len(learned), "max_residual": max(learned, default=0.0)},
        "schedulers": schedulers,
        "code": code(),
    }


def kept() -> dict[str, dict]:
    """The families' figures that still hold."""
    if not KEPT.is_file():
        return {}
    stored = json.loads(KEPT.read_text())
    same = stored["code"] == code() and stored["versions"] == versions()
    return stored["families"] if same else {}


def without_family() -> list[str]:
    """Classes with a scale that no family is of."""
    covered = {family.cls for family in FAMILIES.values()}
    return [name for name in with_scale() if name not in covered]


def main() -> int:
    """Measure what has no figures yet, then write both files; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="only print classes without a family")
    parser.add_argument(
        *("--only",),
        nargs="+",
        metavar="FAMILY",
        choices=MEASURED,
        help="measure these, print them",
    )
    args = parser.parse_args()
    if args.list:
        for name in without_family():
            refused = [base for base in lineage(name) if base in REFUSED]
            print(name, f"(refused: {REFUSED[refused[0]]})" if refused else "")
        return 0
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    families = kept()
    todo = args.only or [name for name in MEASURED if name not in families]
    for name in (bar := tqdm(todo, unit="family")):
        bar.set_postfix_str(name)
        families[name] = measure(name)
        write_json(KEPT, {"code": code(), "versions": versions(), "families": families})
    if args.only:
        print(json.dumps({name: families[name] for name in args.only}, indent=1))
        return 0
    write_figures(FIGURES, summary({name: families[name] for name in MEASURED}))
    stored = json.loads(FIGURES.read_text())
    write_text(PAGE, page(stored))
    for place, count in stored["classes"].items():
        print(place, count if place != "names" else "")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
