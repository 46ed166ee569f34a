"""Names, presets and the composition of rules and policies."""

import pytest

from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Always,
    CFGZeroStar,
    Guidance,
    Interval,
    MagnitudeAware,
    available,
    resolve,
)


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
    for threshold in ("0.991", "0.993", "0.9990", "0.9994", "0.9996"):
        for family in (None, "sdxl", "emoji"):
            found = resolve(f"apg+ag-{threshold}", family)
            assert found.policy == AdaptiveGuidance(float(threshold), space="native")
            assert isinstance(found.rule, APG)


@pytest.mark.parametrize(("old", "right"), [("0.994", "0.9994"), ("0.996", "0.9996")])
def test_thresholds_that_were_misread_say_so(old, right):
    with pytest.warns(FutureWarning, match=rf"misreading.*LDM-512 is {right}.*'ag-{right}'"):
        assert resolve(f"ag-{old}") == resolve(f"ag-{right}")
    assert f"ag-{old}" not in available()


def test_settings_by_model():
    """(w_low, w_high) of Table 8a; the others from their authors' examples."""
    scales = {
        "edm2-s": (1, 3),
        "edm2-xl": (1, 2),
        "dit": (1, 2),
        "sd2": (3, 7),
        "sdxl": (5, 10),
        "sd3": (3, 7),
    }
    for family, (low, high) in scales.items():
        rule = resolve("fdg", family).rule
        assert 1 + rule.low_scale * (high - 1) == pytest.approx(low)
    assert resolve("magnitude", "sd3.5").rule == MagnitudeAware(12.0)
    assert resolve("cfg-zero-star", "wan") == resolve("cfg-zero*", "wan")
    assert resolve("cfg-zero*", "wan").rule == CFGZeroStar(zero_steps=2)
    assert [resolve("tag", family).rule.eta for family in (None, "sdxl", "sd3")] == [
        1.15,
        1.2,
        1.05,
    ]
