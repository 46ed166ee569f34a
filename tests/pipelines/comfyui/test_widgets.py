"""Inputs of nodes, made from the settings of rules and policies."""

import json
import math
from dataclasses import dataclass

import pytest

from pilotage.guidance import APG, CFGZeroStar, Interval, Rule, forecast
from pilotage.guidance import registry as registry_module
from pilotage.guidance.registry import register
from pilotage.pipelines.comfyui import make, methods, widgets


def test_every_setting_has_an_input():
    found = widgets(APG)
    assert list(found) == ["eta", "norm_threshold", "momentum", "threshold_unit", "space"]
    assert found["momentum"][0] == "FLOAT" and found["momentum"][1]["default"] == -0.5
    assert found["threshold_unit"] == (
        ["l2", "rms"],
        {
            "tooltip": '"rms" (per element, the default) or "l2" (over all elements, the paper).',
            "default": "rms",
        },
    )
    assert widgets(CFGZeroStar)["zero_steps"][0] == "INT"
    assert widgets(CFGZeroStar)["optimized_scale"][0] == "BOOLEAN"
    assert "Share of the steps" in widgets(forecast)["first"][1]["tooltip"]


@pytest.mark.parametrize("kind", ["rule", "policy"])
def test_inputs_left_alone_make_the_defaults(kind):
    for name, maker in methods(kind).items():
        found = widgets(maker)
        json.dumps(found, allow_nan=False)  # as ComfyUI hands them to its page
        values = {setting: options["default"] for setting, (_, options) in found.items()}
        assert make(maker, values) == maker(), name


def test_what_has_inputs():
    assert {"cfg", "apg", "rescale", "cfg-zero*", "tcfg"} <= set(methods("rule"))
    assert {"ag", "interval", "forecast", "hold", "always"} <= set(methods("policy"))
    without = {"schedule", "linear-ag", "ag-0.991", "cfg-zero-star"}  # fitted, or second names
    assert not without & {*methods("rule"), *methods("policy")}


def test_numbers_that_may_be_missing_or_infinite_are_text():
    found = widgets(Interval)
    assert [found[n][0] for n in ("stop_step", "noise_high")] == ["STRING", "STRING"]
    assert [found[n][1]["default"] for n in ("stop_step", "noise_high")] == ["none", "inf"]
    made = make(Interval, {"start_step": 2, "stop_step": "7", "noise_high": "5.42"})
    assert made == Interval(2, 7, noise_high=5.42)
    assert make(Interval, {"stop_step": " None ", "noise_high": "inf"}).noise_high == math.inf
    with pytest.raises(ValueError, match="stop_step: expected a whole number, or none, got '7.5'"):
        make(Interval, {"stop_step": "7.5"})
    with pytest.raises(ValueError, match="noise_high: expected a number, got 'none'"):
        make(Interval, {"noise_high": "none"})


def test_rules_of_ones_own_have_inputs(monkeypatch):
    for table in (registry_module.NAMES, registry_module.TYPES["rule"]):
        monkeypatch.setitem(table, "ramp", None)
        del table["ramp"]

    @register
    @dataclass(frozen=True)
    class Ramp(Rule):
        """CFG whose strength rises.

        Args:
            power: How steeply.
        """

        name = "ramp"
        power: float = 2.0

    assert widgets(methods("rule")["ramp"])["power"][1]["tooltip"] == "How steeply."
