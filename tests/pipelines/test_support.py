"""What ``python -m tests.seam_report`` stored: complete, within the limits, and of this code."""

import inspect
import json

import diffusers
import pytest
from diffusers.pipelines.deprecated.blip_diffusion.modeling_blip2 import Blip2QFormerModel

from pilotage.pipelines.seam.patterns import Pattern
from pilotage.pipelines.seam.support import LAYOUTS, REFUSED

from .. import seam_report
from ..docs.counts import rounded_up
from ..docs.support import page
from ..structure import ROOT
from .classes import BROKEN, definer, lineage, with_scale, written

AGAIN = "run: python -m tests.seam_report"
PLACES = ("works", "inferred", "refused", "unknown")


@pytest.fixture(scope="module")
def stored():
    return json.loads(seam_report.FIGURES.read_text())


@pytest.fixture(scope="module")
def classes(stored):
    return stored["classes"]


def test_it_is_of_the_versions_that_are_tested(stored):
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    found = stored["context"]["versions"]
    for name in ("diffusers", "transformers"):
        assert found[name] == pinned[name], AGAIN


def test_it_is_of_this_code(stored):
    now = seam_report.code()
    changed = {file for file in now | stored["code"] if now.get(file) != stored["code"].get(file)}
    assert not changed, f"{', '.join(sorted(changed))} changed: {AGAIN}"
    kinds = ("families", "one_branch", "refusals", "failures")
    assert {name for kind in kinds for name in stored[kind]} == set(seam_report.MEASURED), AGAIN


def test_every_class_with_a_scale_has_one_place(stored, classes):
    listed = [name for place in PLACES for name in classes["names"][place]]
    assert len(listed) == len(set(listed)) == classes["with_guidance"]
    for place in PLACES:
        assert classes[place] == len(classes["names"][place])
    assert classes["unknown"] == 0, classes["names"]["unknown"]
    assert all(classes["names"]["refused"].values())
    if stored["context"]["versions"]["diffusers"] == diffusers.__version__:
        assert set(listed) == set(with_scale()), AGAIN


def test_classes_that_work_have_a_family_that_shows_it(stored, classes):
    shown = {found["class"] for found in stored["families"].values()}
    assert set(classes["names"]["works"]) <= shown
    for name, base in classes["names"]["inferred"].items():
        assert definer(name, "__call__") == base and base in classes["names"]["works"]


def test_the_limits_hold(stored, classes):
    assert classes["works"] >= 150
    assert classes["works"] + classes["inferred"] >= 185
    assert len(stored["families"]) >= 80
    for name, found in stored["families"].items():
        assert seam_report.works(found), name
        assert found.get("forecast_error", 0.0) <= 1e-2, name
        assert found.get("resting_rows_ok", True), name
        assert "forecast_error" in found or found["no_forecast_error"], name
    assert not stored["failures"], stored["failures"]
    assert stored["learned"]["max_residual"] <= 1e-5
    assert len(stored["one_branch"]) >= 5
    for name, found in stored["one_branch"].items():
        assert found["cfg_bit_equal"] and found["one_branch_ok"], name
    assert len(stored["branches3"]) >= 4
    assert stored["modular"]["unknown"] == 0 and stored["modular"]["works"] >= 36
    assert all(found["ok"] for found in stored["schedulers"].values())


def test_the_page_is_made_of_it(stored):
    assert seam_report.PAGE.read_text() == page(stored), AGAIN


def test_what_is_known_beforehand_is_of_classes_that_exist(stored):
    if stored["context"]["versions"]["diffusers"] == diffusers.__version__:
        others = {*LAYOUTS, *REFUSED, *BROKEN} - set(written())
        assert all(hasattr(diffusers, name) for name in others), others  # modular ones


def test_what_diffusers_cannot_run():
    encode = diffusers.EasyAnimateControlPipeline.encode_prompt
    assert "text_encoder_index" not in inspect.signature(encode).parameters
    assert not hasattr(Blip2QFormerModel, "invert_attention_mask")
    assert len(BROKEN) == 2


def test_classes_are_read_as_they_are_written():
    found = set(with_scale())
    assert {"StableVideoDiffusionPipeline", "StableCascadeCombinedPipeline"} <= found
    assert {"HunyuanVideo15Pipeline", "LEditsPPPipelineStableDiffusion"} <= found
    # Without classifier-free guidance, deprecated, and not public.
    assert not {"DDPMPipeline", "AudioLDMPipeline", "DiffusionPipeline"} & found
    for name in found:
        cls = getattr(diffusers, name)
        if issubclass(cls, diffusers.DiffusionPipeline):  # else something it needs is missing
            assert set(lineage(name)) <= {base.__name__ for base in cls.__mro__}
            assert definer(name, "__call__") == cls.__call__.__qualname__.split(".")[0]


def test_the_page_says_what_was_found():
    """On made-up figures, one of each kind."""
    good = {"class": "A", "layout": "l", "cfg_bit_equal": True, "branches": 2, "ag_rows_ok": True}
    good |= {"apg_max_rel_error": 1.26e-7, "forecast_error": 0.0, "resting_rows_ok": True}
    counts = {"with_guidance": 4, "works": 1, "inferred": 1, "refused": 2, "unknown": 0}
    text = page(
        {
            "classes": counts
            | {
                "names": {
                    "works": ["A"],
                    "inferred": {"B": "A"},
                    "refused": {"C": "one | branch", "D": "no\nplace"},
                }
            },
            "families": {"a": good, "a2": good | {"ag_rows_ok": False, "cfg_bit_equal": False}},
            "one_branch": {"c": {"class": "C", "cfg_bit_equal": True, "one_branch_ok": True}},
            "refusals": {"a3": {"class": "A", "refused": "given frames"}},
            "branches3": {},
            "learned": {"affine": 1, "max_residual": 1.21e-7},
            "modular": {"works": 1, "refused": 1, "unknown": 0}
            | {
                "names": {
                    "M": {"ok": True, "state": "works", "reason": "", "apg_error": 2e-7},
                    "N": {"ok": False, "state": "refused", "reason": "tokens"},
                }
            },
            "schedulers": {"S": {"ok": True}, "T": {"ok": False}},
            "context": {
                "versions": {"diffusers": "1.2.3"},
                "machine": {"cores": 2, "processor": "P"},
                "command": "c",
                "date": "d",
            },
        }
    )
    for line in (
        "| A | l | a | equal | 1e-07 | ok | 0 |",
        "| A | l | a2 | DIFFERS | 1e-07 | WRONG | 0 |",
        "| C | c | equal | ok |",
        "| B | A |",
        "| A | a3 | given frames |",
        "| D |  | no place |",
        "| M | 2e-07 |",
        "| N | tokens |",
    ):
        assert line in text.splitlines()
    assert "Of these 1 were run here, 1 share a tested loop, 1" in text
    assert "one \\| branch" not in text and "T" not in text.splitlines()[-1].split(", ")
    assert rounded_up(1.21e-7) == "1.3e-7" and rounded_up(0.0) == "0"


def test_a_family_that_raises_is_written_down(monkeypatch):
    def broken(name):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(seam_report.checks, "apg_error", broken)
    found = seam_report.measure("dit")
    assert found["error"] == "ZeroDivisionError: of all things" and found["cfg_bit_equal"]
    placed = seam_report.classes({"dit": found})
    assert "DiTPipeline" in placed["names"]["unknown"] and not placed["works"]
    placed = seam_report.classes({"dit": found | {"apg_max_rel_error": 0.0, "ag_rows_ok": True}})
    assert placed["names"]["works"] == ["DiTPipeline"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (Pattern((2,), main=1), "one batch: [uncond, cond]"),
        (Pattern((1, 1), sign=-1), "2 calls: cond, then uncond; negated"),
        (Pattern((1, 2), main=2), "2 calls: another, then [another, cond]"),
        (Pattern((2,), part="behind", norm="match"), "one batch: [cond, uncond]; norm of cond; "),
    ],
)
def test_patterns_in_words(pattern, words):
    assert seam_report.describe(pattern).startswith(words)


def test_only_the_figures_of_the_same_code_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(seam_report, "KEPT", tmp_path / "seam.json")
    assert seam_report.kept()["families"] == {}
    monkeypatch.setattr(seam_report, "measure", lambda name: {"class": name})
    monkeypatch.setattr("sys.argv", ["seam_report", "--only", "sd"])
    assert seam_report.main() == 0
    assert seam_report.kept()["families"] == {"sd": {"class": "sd"}}
    monkeypatch.setattr(seam_report, "code", lambda: {"pipelines/guided.py": "other"})
    assert seam_report.kept()["families"] == {}
