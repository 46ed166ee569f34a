"""Controls made from the dataclasses of rules and policies."""

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import pytest

from pilotage.eval.embedded import load_embedded
from pilotage.eval.ui.controls import argument_help, guidance_text, methods
from pilotage.guidance import APG, AdaptiveGuidance, Interval, Rule, registry, resolve


@pytest.fixture(scope="module")
def pipe():
    return load_embedded()


def held(known):
    """What the controls hold in the beginning."""
    return {name: [one.shown for one in method.settings] for name, method in known.items()}


def change(known, name, **values):
    """What the controls hold when some of one method were changed."""
    result = held(known)
    names = [one.name for one in known[name].settings]
    for setting, value in values.items():
        result[name][names.index(setting)] = value
    return result


def test_every_setting_of_every_method_has_a_control(pipe):
    known = methods(pipe)
    assert {"cfg", "apg", "ag", "interval", "schedule", "forecast", "searched"} <= set(known)
    for kind in ("rule", "policy"):
        for name, part in registry.TYPES[kind].items():
            # What a policy was fitted on, and a policy within one, have no control.
            without = {"identity", "policy"}
            expected = {field.name for field in fields(part)} - without
            assert {one.name for one in known[name].settings} == expected, name


def test_untouched_controls_say_what_the_name_says(pipe):
    known = methods(pipe)
    for name, method in known.items():
        rule, policy = (name, "always") if method.kind == "rule" else ("cfg", name)
        assert guidance_text(known, rule, policy, held(known)) == name.replace("always", "cfg")
    for rule in ("apg", "rescale"):
        for policy in ("ag", "forecast"):
            assert guidance_text(known, rule, policy, held(known)) == f"{rule}+{policy}"


def test_changed_controls_are_changed_settings(pipe):
    known = methods(pipe)
    text = guidance_text(known, "apg", "ag", change(known, "apg", eta=0.5, space="native"))
    preset = pipe.resolve_guidance("apg+ag")
    changed = replace(preset.rule, eta=0.5, space="native") | preset.policy
    assert pipe.resolve_guidance(text) == changed
    text = guidance_text(known, "cfg", "interval", change(known, "interval", stop_step=5))
    assert pipe.resolve_guidance(text).policy == Interval(stop_step=5)
    text = guidance_text(known, "cfg", "interval", change(known, "interval", noise_high=2))
    assert pipe.resolve_guidance(text).policy == Interval(noise_high=2.0)
    changed = change(known, "schedule", choices="both, cond", factors="1, 0.5", fill="extrapolate")
    policy = pipe.resolve_guidance(guidance_text(known, "cfg", "schedule", changed)).policy
    assert policy.choices == ("both", "cond") and policy.factors == (1.0, 0.5)
    assert policy.fill.name == "extrapolate"


def test_defaults_are_the_presets_of_the_model(pipe):
    threshold = next(one for one in methods(pipe)["ag"].settings if one.name == "threshold")
    assert threshold.default == pipe.resolve_guidance("ag").policy.threshold
    assert threshold.default != AdaptiveGuidance().threshold
    assert "cosine" in threshold.help


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("apg", {"eta": None}, "eta is empty"),
        ("fdg", {"levels": 2.5}, "levels must be a whole number"),
        ("schedule", {"choices": "both", "factors": "1, much"}, "factors must be numbers"),
    ],
)
def test_controls_that_hold_nothing_usable(pipe, method, values, message):
    known = methods(pipe)
    rule, policy = ("cfg", method) if known[method].kind == "policy" else (method, "always")
    with pytest.raises(ValueError, match=message):
        guidance_text(known, rule, policy, change(known, method, **values))


def test_what_is_saved_with_a_model_goes_alone(pipe):
    known = methods(pipe)
    with pytest.raises(ValueError, match="choose cfg beside it"):
        guidance_text(known, "apg", "searched", held(known))


def test_a_rule_of_ones_own_has_controls(pipe, monkeypatch):
    for kind, types in registry.TYPES.items():
        monkeypatch.setitem(registry.TYPES, kind, dict(types))
    before = dict(registry.NAMES)

    @registry.register
    @dataclass(frozen=True)
    class Mine(Rule):
        """A rule of one's own.

        Args:
            strength: How strong. More is said here.
            often, seldom: When; it
                goes on.
        """

        name: ClassVar[str] = "mine"
        strength: float = math.inf
        often: int | None = None
        seldom: bool = False
        kind: Literal["a", "b"] = "b"

    try:
        mine = methods(pipe)["mine"]
        assert [(one.kind, one.shown, one.help) for one in mine.settings] == [
            ("number", None, "How strong."),
            ("whole", None, "When"),
            ("switch", False, "When"),
            ("choice", "b", ""),
        ]
        assert resolve(mine.text([2, 3, True, "a"])).rule == Mine(2.0, 3, True, "a")
        assert mine.text([None, None, False, "b"]) == "mine"
    finally:
        registry.NAMES.clear()
        registry.NAMES.update(before)


def test_help_is_the_first_sentence():
    assert argument_help(APG)["momentum"] == "Negative momentum (paper: -0.5 or -0.75)."
