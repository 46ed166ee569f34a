"""Write what the seam's tests find: ``eval/results/seam.json`` and ``pipelines/SUPPORT.md``.

    python -m tests.seam_report                # about eight minutes on two cores
    python -m tests.seam_report --only sd wan  # only measures these again, and prints them
    python -m tests.seam_report --list         # classes of diffusers without a family

Every family of the tests (tests/families) is measured in turn: the checks that the tests make, and
what was learned of its pipeline. What a family fails or refuses is written down, not raised.
Figures are kept in cache/seam.json as they come, so that an interrupted run goes on where it was;
they hold as long as the code that they are made by and the versions stay the same. Both files are
written once every family has figures.
"""

import argparse
import functools
import json
import math
import warnings

import diffusers
import torch
import transformers
from tqdm import tqdm

from pilotage.eval.record import versions, write_figures
from pilotage.guidance import APG
from pilotage.guidance.files import write_json, write_text
from pilotage.pipelines import UnknownSchedulerError, guided
from pilotage.pipelines.seam.layouts import LayoutError, OptionError
from pilotage.pipelines.seam.support import REFUSED

from .docs.support import page
from .families import FAMILIES
from .modular.checks import modular_entry, modular_names
from .pipelines import checks
from .pipelines.classes import BROKEN, definer, lineage, with_scale
from .pipelines.seam.test_noise_levels import cases, scheduler_agrees
from .structure import ROOT, code_of

FIGURES = ROOT / "eval" / "results" / "seam.json"
PAGE = ROOT / "pipelines" / "SUPPORT.md"
KEPT = ROOT / "cache" / "seam.json"
# What the figures depend on.
CODE = (
    *("guidance/run.py", "pipelines/guided.py", "pipelines/guiders.py", "pipelines/seam/*.py"),
    *("tests/components.py", "tests/families/*.py", "tests/modular/*.py", "tests/oracles/*.py"),
    "tests/pipelines/checks.py",
)
REFUSALS = (LayoutError, OptionError, UnknownSchedulerError)
MEASURED = [name for name, family in FAMILIES.items() if family.scheduler == "scheduler"]
ONE_BRANCH = (
    "it evaluates one branch, its scale is an input of a distilled network: rules have nothing to "
    "act on; policies that skip steps work"
)
LIMIT = 1e-4  # of the relative error of APG


@functools.cache
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
    for check in (checks.forecast_error, checks.resting_rows_ok):
        try:
            yield check.__name__, check(name)
        except REFUSALS as refusal:
            yield f"no_{check.__name__}", str(refusal)


def pattern_of(name: str):
    """What was learned of a family's pipeline."""
    family = FAMILIES[name]
    native = family.space == "native" or family.layout == "one"
    pipe, guidance = guided(family.build()), APG(space="native") if native else "apg"
    checks.run(pipe, checks.paper_call(name) | {"guidance": guidance})
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
        f"steps {pattern.part}": bool(pattern.part),
        "given places left out": pattern.kept is not None,
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
        loop, known = definer(name, "__call__"), REFUSED | BROKEN
        reasons = [known[base] for base in lineage(name) if base in known]
        if reasons:
            refused[name] = reasons[0]
        elif loop in tested and not of_class[name]:
            inferred[name] = loop
        elif of_class[name] and all("one_branch_ok" in found for found in of_class[name]):
            refused[name] = ONE_BRANCH
        elif of_class[name] and all("refused" in found for found in of_class[name]):
            refused[name] = of_class[name][0]["refused"]
        else:
            unknown.append(name)
    names = {"works": tested, "inferred": inferred, "refused": refused, "unknown": unknown}
    counts = {place: len(listed) for place, listed in names.items()}
    return {"with_guidance": len(taken), **counts, "names": names}


def summary(families: dict[str, dict], modular: dict[str, dict]) -> dict:
    """All that is written, of the families' figures and what was found of modular pipelines."""
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
        "modular": {
            state: sum(found["state"] == state for found in modular.values())
            for state in ("works", "refused", "unknown")
        }
        | {"names": modular},
        "schedulers": schedulers,
        "code": code(),
    }


def kept() -> dict:
    """What was measured by this code with these versions; empty if nothing was."""
    now = {"code": code(), "versions": versions()}
    found = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    if any(found.get(key) != value for key, value in now.items()):
        return now | {"families": {}, "modular": {}}
    return found


def main() -> int:
    """Measure what has no figures yet, then write both files; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="only print classes without a family")
    only = parser.add_argument("--only", nargs="+", choices=MEASURED, help="measure these again")
    only.metavar = "FAMILY"
    args = parser.parse_args()
    if args.list:
        covered = {family.cls for family in FAMILIES.values()}
        reasons = classes({})["names"]["refused"]
        for name in (name for name in with_scale() if name not in covered):
            print(name, f"(refused: {reasons[name]})" if name in reasons else "")
        return 0
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    found = kept()
    families, guiders = found["families"], found["modular"]
    jobs = [(families, name, measure) for name in args.only or MEASURED]
    jobs += [(guiders, name, modular_entry) for name in ([] if args.only else modular_names())]
    todo = [job for job in jobs if args.only or job[1] not in job[0]]
    for place, name, measured in (bar := tqdm(todo, unit="pipeline")):
        bar.set_postfix_str(name)
        place[name] = measured(name)
        write_json(KEPT, found)
    if args.only:
        print(json.dumps({name: families[name] for name in args.only}, indent=1))
        return 0
    write_figures(FIGURES, summary(families, guiders))
    stored = json.loads(FIGURES.read_text())
    write_text(PAGE, page(stored))
    counts = {place: count for place, count in stored["classes"].items() if place != "names"}
    print(", ".join(f"{place} {count}" for place, count in counts.items()))
    for name, failed in stored["failures"].items():
        print(f"{name}: {failed['error']}")
    return 1 if stored["failures"] or counts["unknown"] or stored["modular"]["unknown"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
