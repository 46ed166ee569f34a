"""Names of one's own, and settings as files."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Coefficients,
    ExtrapolateDifference,
    Guidance,
    Interval,
    Pattern,
    Rule,
    Schedule,
    available,
    extrapolate,
    forecast,
    hold,
    linear_ag,
    load_guidance,
    register,
    registry,
    resolve,
    save_guidance,
)
from pilotage.guidance.saved import from_dict

COEFFICIENTS = Coefficients(
    ((1.0,), (1.0, -1.0)), ((), (1.0,)), identity={"networks": {"unet": "1"}}
)


@dataclass(frozen=True)
class Half(Rule):
    """Half of the update."""

    name: ClassVar[str] = "half"

    share: float = 0.5

    def combine(self, predictions, step, w, state):
        cond, uncond = predictions.pair("native")
        return cond + self.share * (w - 1) * (cond - uncond), None


@pytest.fixture
def names(monkeypatch):
    """Names that are known for one test only."""
    monkeypatch.setattr(registry, "NAMES", dict(registry.NAMES))
    types = {kind: dict(of) for kind, of in registry.TYPES.items()}
    monkeypatch.setattr(registry, "TYPES", types)
    monkeypatch.setattr("pilotage.guidance.presets.NAMES", registry.NAMES)
    monkeypatch.setattr("pilotage.guidance.saved.TYPES", registry.TYPES)


def test_a_rule_of_ones_own_is_a_name_everywhere(names, tmp_path):
    assert register(Half) is Half
    assert "half" in available()
    assert resolve("half+ag") == Half() | AdaptiveGuidance()
    path = tmp_path / "mine.json"
    save_guidance(path, Guidance(Half(0.25)))
    assert load_guidance(path) == Guidance(Half(0.25))
    register(Half)  # the same again, as when a notebook cell is run twice
    register(lambda: forecast(first=0.5), name="late")
    assert resolve("half+late").policy == forecast(first=0.5)


def test_installed_packages_bring_their_names(names, tmp_path, monkeypatch):
    """What the command line knows of a rule that no script of the user's has imported."""
    about = tmp_path / "somebody-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[pilotage.guidance]\nany = somebodys_rules\n")
    (tmp_path / "somebodys_rules.py").write_text(
        "from dataclasses import dataclass\n"
        "from pilotage.guidance import APG, register\n"
        "@register\n"
        "@dataclass(frozen=True)\n"
        "class Theirs(APG):\n"
        "    name = 'theirs'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_installed.cache_clear()
    assert type(resolve("theirs+ag").rule).__name__ == "Theirs"
    assert "theirs" in available()
    registry.load_installed.cache_clear()


def test_names_that_are_refused(names):
    @dataclass(frozen=True)
    class Taken(Rule):
        name: ClassVar[str] = "apg"

    @dataclass(frozen=True)
    class Plus(Rule):
        name: ClassVar[str] = "a+b"

    @dataclass(frozen=True)
    class Inherited(APG):
        pass

    class Plain(Rule):
        name = "plain"

    for thing, error, message in (
        (Taken, ValueError, "'apg' is pilotage.guidance.rules.apg.APG already"),
        (Plus, ValueError, r"got 'a\+b'"),
        (Inherited, TypeError, "no name of its own"),
        (Plain, TypeError, "frozen dataclass"),
        (int, TypeError, "Rule, Policy or Fill"),
        (len, TypeError, "takes a class, or a function with name"),
    ):
        with pytest.raises(error, match=message):
            register(thing)
    for name in ("forecast", "cfg-zero-star", "ag-0.991"):
        with pytest.raises(ValueError, match=f"'{name}' exists already"):
            register(len, name=name)
    with pytest.raises(TypeError, match="not by name="):
        register(Half, name="other")
    register(lambda: 5, name="five")
    with pytest.raises(TypeError, match="'five' stands for 5"):
        resolve("five")


@pytest.mark.parametrize("annotation", [ClassVar[str], str])
def test_settings_of_the_wrong_kind(names, annotation):
    @dataclass(frozen=True)
    class Unnamed(Rule):
        strength: float

        name: annotation = "unnamed"

    message = "strength a default" if annotation is not str else "no name of its own"
    with pytest.raises(TypeError, match=message):
        register(Unnamed)


def test_a_package_that_cannot_be_imported_is_named(names, tmp_path, monkeypatch):
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[pilotage.guidance]\nany = no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_installed.cache_clear()
    with (
        pytest.warns(UserWarning, match="broken announces guidance .*no_such_module"),
        pytest.raises(ValueError, match="unknown guidance 'apgg'"),
    ):
        resolve("apgg")
    registry.load_installed.cache_clear()


@pytest.mark.parametrize(
    "guidance",
    [
        APG(eta=0.3) | AdaptiveGuidance(math.inf, then="forecast"),
        CFG() | Interval(noise_low=0.3, noise_high=math.inf),
        Guidance(CFG(), forecast()),
        CFG() | Schedule(("both", "estimate"), fill=COEFFICIENTS),
        CFG() | Schedule(Pattern(0.3, 3, then="estimate"), fill=ExtrapolateDifference("x0")),
        CFG() | Schedule(("both", "cond"), factors=(1.0, 0.5), identity={"a": [1, None]}),
        Guidance(APG(eta=np.float32(0.25))),
        CFG() | Schedule(("both", "cond"), factors=np.ones(2, np.float32)),
    ],
)
def test_settings_survive_a_file(guidance, tmp_path):
    path = tmp_path / "settings.json"
    save_guidance(path, guidance, {"nfe": 25})
    json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON
    assert load_guidance(path) == guidance


@pytest.mark.parametrize("written", ["apg(eta=0.5)", APG(eta=0.5), AdaptiveGuidance(0.98)])
def test_what_a_pipeline_takes_can_be_saved(written, tmp_path):
    save_guidance(tmp_path / "mine.json", written)
    assert load_guidance(tmp_path / "mine.json") == resolve(written)
    with pytest.raises(TypeError, match="got int"):
        save_guidance(tmp_path / "other.json", 3)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="Half has no name"):
        save_guidance(tmp_path / "half.json", Guidance(Half()))
    odd = CFG() | Schedule(("both",), identity={"tensor": torch.ones(1)})
    with pytest.raises((ValueError, TypeError)):
        save_guidance(tmp_path / "odd.json", odd)
    assert not any(tmp_path.iterdir())


FIRST = {
    "forecast": ({"head": 0.3, "period": 3, "space": "x0"}, forecast(0.3, 3)),
    "ag": (
        {"threshold": 0.99, "space": "native", "lag": None, "tail": "forecast"},
        AdaptiveGuidance(0.99, "native", then="forecast"),
    ),
    "linear-ag": (
        {
            "period": 2,
            "head": 0.5,
            "tail": "linear",
            "coefficients": {
                "name": "linear",
                "cond": [[1.0], [1.0, -1.0]],
                "uncond": [[], [1.0]],
                "intercept": [],
                "guided": [],
                "space": "native",
                "identity": {"networks": {"unet": "1"}},
            },
        },
        Schedule(Pattern(0.5, 2, then="estimate"), fill=COEFFICIENTS),
    ),
    "schedule": (
        {
            "choices": ["both", "forecast"],
            "factors": [],
            "stand_in": {"name": "extrapolate", "space": "x0"},
            "identity": None,
        },
        Schedule(("both", "forecast"), fill=ExtrapolateDifference("x0")),
    ),
    "interval": (
        {"start_step": 0, "stop_step": None, "noise_low": 0.3},
        Interval(noise_low=0.3),
    ),
}


def test_files_and_names_of_version_0_1_keep_what_followed_then():
    """Its default was the conditional branch alone."""
    import pilotage.guidance as guidance

    for name, make in (("hold", hold), ("extrapolate", extrapolate)):
        config = {"rule": {"name": "cfg"}, "policy": {"name": name, "period": 2}}
        assert from_dict(config).policy == make(then="cond") != make()
    with pytest.warns(FutureWarning, match="Extrapolate is called extrapolate now"):
        assert guidance.Extrapolate() == extrapolate(then="cond")
    with pytest.warns(FutureWarning, match="LinearAG"):
        assert guidance.LinearAG(coefficients=COEFFICIENTS) == linear_ag(COEFFICIENTS, then="cond")


@pytest.mark.parametrize("name", FIRST)
def test_files_of_version_0_1(name, tmp_path):
    settings, expected = FIRST[name]
    config = {"rule": {"name": "apg", "eta": 0.5}, "policy": {"name": name, **settings}}
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"format": "pilotage-guidance-1", "guidance": config}))
    assert load_guidance(path) == APG(eta=0.5) | expected


def test_files_of_version_0_1_with_an_intercept_say_to_fit_again(tmp_path):
    settings = json.loads(json.dumps(FIRST["linear-ag"][0]))
    settings["coefficients"]["intercept"] = [0.1, 0.2]
    config = {"rule": {"name": "cfg"}, "policy": {"name": "linear-ag", **settings}}
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"format": "pilotage-guidance-1", "guidance": config}))
    with pytest.raises(ValueError, match="intercept.*fit them again"):
        load_guidance(path)


def test_names_of_version_0_1_warn():
    import pilotage.guidance as guidance

    with pytest.warns(FutureWarning, match="Forecast is called forecast now"):
        old = guidance.Forecast
    assert old(head=0.3, period=3) == forecast(0.3, 3)
    with pytest.warns(FutureWarning, match="hold"):
        assert guidance.Hold(tail="hold") == guidance.hold(then="estimate")
    with pytest.warns(FutureWarning, match="linear_ag"):
        old = guidance.LinearAG(2, 1.0, "linear", COEFFICIENTS)
    assert old == guidance.linear_ag(COEFFICIENTS, 2, 1.0, "estimate")
