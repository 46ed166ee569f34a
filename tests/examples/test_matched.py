"""The study of rules at matched strength: what it covers, and its differences."""

from examples.studies.matched import RULES, SCALES, STEPS, reversed_, settings
from pilotage.eval.comparison.plan import BASELINE


def test_every_rule_stands_beside_cfg_at_every_strength():
    found = {(one.method, one.scale) for one in settings()}
    assert found == {(name, scale) for name in (BASELINE, *RULES) for scale in SCALES}
    assert len(RULES) >= 10 and len(SCALES) >= 4
    assert {one.steps for one in settings()} == {STEPS}


def test_a_difference_the_other_way_round():
    found = reversed_({"difference": 2.0, "interval": [-1.0, 5.0], "needed": 90})
    assert found == {"difference": -2.0, "interval": [-5.0, 1.0]}
    assert reversed_({"difference": 0.5, "interval": None})["interval"] is None
