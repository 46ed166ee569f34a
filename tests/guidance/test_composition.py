"""Names, presets and the composition of rules and policies."""

import pytest

from pilotage.guidance import APG, CFG, AdaptiveGuidance, Always, Guidance, Interval, resolve


def test_names():
    assert resolve("cfg") == Guidance(CFG(), Always())
    assert resolve("ag") == Guidance(CFG(), AdaptiveGuidance())
    assert resolve("APG+ag") == Guidance(APG(), AdaptiveGuidance())
    assert resolve("ag+apg") == resolve("apg+ag")


def test_objects():
    rule, policy = APG(eta=0.5), AdaptiveGuidance(0.9)
    assert rule | policy == Guidance(rule, policy)
    assert Guidance(rule) | policy == Guidance(rule, policy)
    assert resolve(rule) == Guidance(rule)
    assert resolve(policy) == Guidance(CFG(), policy)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'apgg'.*apg, cfg.*ag"):
        resolve("apgg")


@pytest.mark.parametrize("name", ["cfg+apg", "ag+interval", "ag+ag", "", "apg+"])
def test_impossible_combinations(name):
    with pytest.raises(ValueError, match="unknown guidance|names two"):
        resolve(name)


@pytest.mark.parametrize("value", [3, None, ["apg"], object()])
def test_wrong_type(value):
    with pytest.raises(TypeError, match="guidance must be"):
        resolve(value)


def test_two_policies():
    with pytest.raises(TypeError, match="already has the policy"):
        APG() | AdaptiveGuidance() | Interval(0, 5)


def test_literature_settings_are_names_on_any_model():
    """The thresholds of https://arxiv.org/abs/2312.12487, on raw network outputs."""
    for threshold in (0.991, 0.994, 0.996):
        for family in (None, "sdxl", "emoji"):
            found = resolve(f"apg+ag-{threshold}", family)
            assert found.policy == AdaptiveGuidance(threshold, space="native")
            assert isinstance(found.rule, APG)
