"""The mathematics of guidance, on tensors: rules, policies, and the state of a run."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from .base import (
    Always,
    Decision,
    Fill,
    Guidance,
    Policy,
    PolicyState,
    Predictions,
    Rule,
    Step,
    Weights,
)
from .fitting.regression import Gram, fit_coefficients, r_squared
from .policies.adaptive import AdaptiveGuidance
from .policies.fill import Coefficients, ExtrapolateDifference, HoldDifference
from .policies.interval import Interval
from .policies.scales import SampleScales, ScaleSchedule
from .policies.schedule import Pattern, Schedule, extrapolate, forecast, gate, hold, linear_ag
from .prediction import PREDICTION_TYPES, NoiseLevel, PredictionType, Space, cosine
from .presets import PRESETS, available, resolve
from .registry import register
from .rules.apg import APG, apg
from .rules.cfg import CFG, cfg
from .rules.cfg_plus_plus import CFGPlusPlus, cfg_plus_plus_scale
from .rules.cfg_zero_star import CFGZeroStar, cfg_zero_star
from .rules.frequency_decoupled import FDG, fdg
from .rules.history_guided import HiGS
from .rules.magnitude_aware import MagnitudeAware, magnitude_aware
from .rules.momentum import Momentum
from .rules.rescale import CFGRescale, cfg_rescale
from .rules.sliding_mode import SMC
from .rules.tangential_amplifying import TAG
from .rules.tcfg import TCFG, tangential_damping, tcfg
from .run import NonFinitePredictionError, Run
from .saved import load_guidance, save_guidance
from .trace import StepRecord, Trace

__all__ = [
    "APG",
    "CFG",
    "FDG",
    "PREDICTION_TYPES",
    "PRESETS",
    "SMC",
    "TAG",
    "TCFG",
    "AdaptiveGuidance",
    "Always",
    "CFGPlusPlus",
    "CFGRescale",
    "CFGZeroStar",
    "Coefficients",
    "Decision",
    "ExtrapolateDifference",
    "Fill",
    "Gram",
    "Guidance",
    "HiGS",
    "HoldDifference",
    "Interval",
    "MagnitudeAware",
    "Momentum",
    "NoiseLevel",
    "NonFinitePredictionError",
    "Pattern",
    "Policy",
    "PolicyState",
    "PredictionType",
    "Predictions",
    "Rule",
    "Run",
    "SampleScales",
    "ScaleSchedule",
    "Schedule",
    "Space",
    "Step",
    "StepRecord",
    "Trace",
    "Weights",
    "apg",
    "available",
    "cfg",
    "cfg_plus_plus_scale",
    "cfg_rescale",
    "cfg_zero_star",
    "cosine",
    "extrapolate",
    "fdg",
    "fit_coefficients",
    "forecast",
    "gate",
    "hold",
    "linear_ag",
    "load_guidance",
    "magnitude_aware",
    "r_squared",
    "register",
    "resolve",
    "save_guidance",
    "tangential_damping",
    "tcfg",
]


def _first(make: Callable[..., Schedule], *order: str) -> Callable[..., Schedule]:
    """A setting of `Schedule` with the arguments that its class had in version 0.1, in order."""

    @functools.wraps(make)
    def call(*args: Any, **settings: Any) -> Schedule:
        settings |= dict(zip(order, args, strict=False))
        for old, new in (("head", "first"), ("tail", "then")):
            if old in settings:
                settings[new] = settings.pop(old)
        if make is not forecast:
            settings.setdefault("then", "cond")  # what version 0.1 did
        if settings.get("then") in ("hold", "extrapolate", "linear"):
            settings["then"] = "estimate"
        return make(**settings)

    return call


# Names of version 0.1, to go with version 0.3 -> what they are called now, and what they give.
_RENAMED: dict[str, tuple[str, Any]] = {
    "Extrapolate": ("extrapolate", _first(extrapolate, "period", "head", "tail", "space")),
    "Forecast": ("forecast", _first(forecast, "head", "period", "space")),
    "Hold": ("hold", _first(hold, "period", "head", "tail", "space")),
    "LinearAG": ("linear_ag", _first(linear_ag, "period", "head", "tail", "coefficients")),
    "StandIn": ("Fill", Fill),
}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    now, value = _RENAMED[name]
    warnings.warn(f"{name} is called {now} now", FutureWarning, stacklevel=2)
    return value
