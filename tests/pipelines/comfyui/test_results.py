"""What was measured within the real ComfyUI, as it is stored (``examples.studies.comfyui``)."""

import json
from pathlib import Path

import pytest

from pilotage.guidance.registry import NAMES
from pilotage.pipelines.comfyui import methods

RESULTS = Path(__file__).parents[3] / "eval" / "results" / "comfyui.json"


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text())


def test_every_sampler_and_rule_agrees_with_float64(results):
    assert len(results["samplers"]) == 42
    own = {name for name in methods("rule") if NAMES[name].__module__.startswith("pilotage.")}
    assert results["rules"].keys() == own  # other tests register rules of their own
    errors = [s["max_error"] for s in results["samplers"].values()]
    assert results["max_error"] == max(*errors, *results["rules"].values()) <= 1e-4


def test_evaluations(results):
    """Rows counted at the network, which the command compares with the trace."""
    assert results["full_evaluations"] == 40
    assert results["forecast_evaluations"] == 24 and results["hold_evaluations"] == 25
    assert 20 < results["ag_evaluations"] < 40
    assert len(set(results["ag_evaluations_of_three"])) > 1  # each stops on its own


def test_every_case_passed(results):
    cases = results["state_cases"]
    assert set(cases.values()) == {"passed"}
    for name in ("interrupted_run", "two_models", "scale_of_1", "patches_before", "patches_after"):
        assert any(name in case for case in cases), name
