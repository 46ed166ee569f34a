"""The study of paired verdicts, small; its figures are in ``eval/results/report.json``."""

import json
from pathlib import Path

from examples.studies import paired

RESULTS = Path(__file__).parents[2] / "eval/results/report.json"


def test_a_clear_difference_is_called_and_its_absence_is_not():
    """Six standard errors, where the settings' own intervals overlap; and none at all."""
    right, overlapping = paired.power(6, 1, 10)
    assert right == overlapping == 1
    found = [paired.of_means(paired.figures(2, seed), seed)[0].clear for seed in range(40)]
    assert sum(found) <= 7  # 2 expected; more than 7: chance of .001
    assert set(paired.of_sets(0)) == {
        *("fd", "kid", "precision", "recall", "density", "coverage"),
    }


def test_recorded_figures():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["paired"]
    assert found["power"]["4 standard errors"] >= 0.95
    assert found["marginal_overlap"] == 1
    assert {"means", "fd", "any_of_18"} < set(found["false_positives"])
    assert max(found["false_positives"].values()) <= 0.07
