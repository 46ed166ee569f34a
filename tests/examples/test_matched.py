"""The study of rules at matched strength: what it covers, its differences, what it stored."""

import json
from pathlib import Path

import pytest

from examples.studies.matched import RULES, SCALES, STEPS, lines, reversed_, settings
from pilotage.eval.comparison.plan import BASELINE

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "eval/results/matched.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/results/matched.md").read_text(encoding="utf-8")


def test_every_rule_stands_beside_cfg_at_every_strength():
    found = {(one.method, one.scale) for one in settings()}
    assert found == {(name, scale) for name in (BASELINE, *RULES) for scale in SCALES}
    assert len(RULES) >= 10 and len(SCALES) >= 4
    assert {one.steps for one in settings()} == {STEPS}


def test_a_difference_the_other_way_round():
    found = reversed_({"difference": 2.0, "interval": [-1.0, 5.0], "needed": 90})
    assert found == {"difference": -2.0, "interval": [-5.0, 1.0]}
    assert reversed_({"difference": 0.5, "interval": None})["interval"] is None


def test_what_is_stored_is_of_this_code():
    assert STORED["strengths"] == list(SCALES) and STORED["steps"] == STEPS
    assert STORED["rules"].keys() == RULES.keys()
    wanted = {(name, scale) for name in (BASELINE, *RULES) for scale in SCALES}
    nominal = {(row["rule"], row["as_cfg"]): row for row in STORED["equal_scale"]}
    same = {(row["rule"], row["as_cfg"]): row for row in STORED["equal_strength"]}
    assert nominal.keys() == wanted
    for (name, scale), row in nominal.items():
        assert row["w"] == scale and row["n"] == STORED["prompts"]
        if name == BASELINE:
            assert same[name, scale] == row and not row["minus_cfg"]
            continue
        found = STORED["rules"][name][f"{scale:g}"]
        assert (found is None) == ((name, scale) not in same)
        assert found is None or same[name, scale]["w"] == found
    for (name, scale), row in (nominal | same).items():
        for metric, one in row["minus_cfg"].items():
            if metric in row:
                expected = row[metric] - nominal[BASELINE, scale][metric]
                assert one["difference"] == pytest.approx(expected, rel=1e-3, abs=1e-3), name
            low, high = one["interval"]
            assert low <= one["difference"] <= high


@pytest.mark.parametrize(
    ("table", "metric"),
    [("equal_strength", "fd"), ("equal_scale", "fd"), ("equal_strength", "saturation")],
)
def test_the_page_has_what_is_stored(table, metric):
    assert "\n".join(lines(STORED, table, metric)) in PAGE


def test_a_rule_without_such_a_scale_says_so():
    row = {"rule": "tag", "as_cfg": 3.0, "w": 2.5}
    row["minus_cfg"] = {"fd": {"difference": -1.0, "interval": [-2.0, 0.5]}}
    figures = {"rules": {"tag": {}}, "strengths": [3.0, 5.0], "equal_strength": [row]}
    assert lines(figures, "equal_strength", "fd") == ["| `tag` | 2.5: −1 | no such scale |"]
    row["minus_cfg"]["fd"]["interval"] = [-2.0, -0.5]
    figures["equal_scale"] = figures["equal_strength"]
    assert lines(figures, "equal_scale", "fd") == ["| `tag` | **−1** | no such scale |"]
