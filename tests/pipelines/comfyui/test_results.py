"""What was measured within the real ComfyUI, as it is stored (``examples.studies.comfyui``)."""

import json
from pathlib import Path

import pytest

from pilotage.pipelines.comfyui import methods

RESULTS = Path(__file__).parents[3] / "eval" / "results" / "comfyui.json"


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text())


def test_every_sampler_and_rule_agrees_with_float64(results):
    assert len(results["samplers"]) == 42
    assert results["rules"].keys() == methods("rule").keys()
    errors = [s["max_error"] for s in results["samplers"].values()]
    assert results["max_error"] == max(*errors, *results["rules"].values()) <= 1e-4


def test_evaluations_are_those_counted_at_the_network(results):
    ag, forecast, hold = (results[f"{n}_evaluations"] for n in ("ag", "forecast", "hold"))
    for found in (ag, forecast, hold):
        assert found["rows_at_the_network"] == sum(found["of_every_sample"])
    assert forecast["of_every_sample"] == [24] and hold["of_every_sample"] == [25]
    assert all(20 < count < 40 for count in ag["of_every_sample"])


def test_every_case_passed(results):
    cases = results["state_cases"]
    assert set(cases.values()) == {"passed"}
    for name in ("interrupted_run", "two_models", "scale_of_1", "patches_before", "patches_after"):
        assert any(name in case for case in cases), name
