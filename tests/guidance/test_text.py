"""Guidance written as text, with settings in brackets."""

import inspect
import math

import pytest

from pilotage.guidance import (
    APG,
    AdaptiveGuidance,
    CFGZeroStar,
    HoldDifference,
    Interval,
    Schedule,
    hold,
    resolve,
)
from pilotage.guidance.presets import NAMES, PRESETS, maker
from pilotage.guidance.text import parse, written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apg(eta=0.5)", APG(eta=0.5)),
        ("APG( eta=-1, space=native )", APG(eta=-1, space="native")),
        (
            "apg(eta=1e+0)+ag(lag=2, then=forecast)",
            APG(1.0) | AdaptiveGuidance(0.999, "x0", 2, "forecast"),
        ),
        ("cfg-zero*(optimized_scale=False)", CFGZeroStar(optimized_scale=False)),
        ("interval(stop_step=5, noise_high=inf)", Interval(stop_step=5)),
        ("hold(period=3)", hold(period=3)),
        ("ag-0.991(lag=0)", AdaptiveGuidance(0.991, "native", 0)),
        (
            "schedule(choices=(both, estimate), factors=(1, 2.5), fill=hold(space=x0))",
            Schedule(("both", "estimate"), (1.0, 2.5), HoldDifference("x0")),
        ),
    ],
)
def test_settings_in_brackets(text, expected):
    assert resolve(text) == resolve(expected)


def test_other_settings_are_those_of_the_model_family():
    preset = PRESETS["emoji"]["apg"]
    assert preset != APG()
    assert resolve("apg(eta=0.5)", "emoji").rule == APG(0.5, preset.norm_threshold, preset.momentum)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apg(eta=0.5", "is not a name with settings"),
        ("apg(0.5)", "is not a name with settings"),
        ("apg(eta=__import__('os').getcwd())", "is not a name with settings"),
        ("apg(eta=hold)x", "is not a name with settings"),
        ("apg(beta=1)", "has no setting 'beta': it has eta, norm_threshold"),
        ("cfg(eta=1)", "has no setting 'eta': it has none"),
        ("apg(eta=much)", "a setting of 'apg' is not what it should be"),
        ("apg(norm_threshold=-1)", "norm_threshold must be >= 0"),
        ("agp(eta=1)", "unknown guidance 'agp'"),
        ("apg(eta=1)+cfg", "names two rules"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        resolve(text)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"a": 0.1, "b": -3, "c": True, "d": None, "e": math.inf},
        {"a": "native", "b": "two words", "c": "inf"},
        {"a": ("both", "cond"), "b": (1.5,), "c": (), "d": HoldDifference("x0")},
    ],
)
def test_written_text_says_the_same(settings):
    assert parse(written("name", settings)) == [("name", settings)]


def test_every_name_without_a_fit_takes_its_settings_as_keywords():
    for name in NAMES:
        make = maker(name, "emoji")
        defaults = {key: one.default for key, one in inspect.signature(make).parameters.items()}
        if name in ("schedule", "linear-ag"):  # nothing without choices, or coefficients
            continue
        assert make(**defaults) == make()
