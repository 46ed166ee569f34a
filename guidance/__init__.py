"""The mathematics of guidance, on tensors: rules, policies, and the state of a run."""

from .base import Always, Guidance, Interval, Policy, PolicyState, Rule, Step
from .fitting.regression import Gram, fit_coefficients, r_squared
from .policies.adaptive import AdaptiveGuidance, cosine
from .policies.alternating import Extrapolate, Hold
from .policies.fill import ExtrapolateDifference, HoldDifference, StandIn, Weights
from .policies.forecast import Forecast
from .policies.linear_ag import Coefficients, LinearAG
from .policies.schedule import Schedule
from .prediction import PREDICTION_TYPES, NoiseLevel, PredictionType, Space
from .presets import PRESETS, available, resolve
from .rules.apg import APG, apg
from .rules.cfg import CFG, cfg
from .rules.cfg_zero_star import CFGZeroStar, cfg_zero_star
from .rules.frequency_decoupled import FDG, fdg
from .rules.magnitude_aware import MagnitudeAware, magnitude_aware
from .rules.rescale import CFGRescale, cfg_rescale
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
    "TCFG",
    "AdaptiveGuidance",
    "Always",
    "CFGRescale",
    "CFGZeroStar",
    "Coefficients",
    "Extrapolate",
    "ExtrapolateDifference",
    "Forecast",
    "Gram",
    "Guidance",
    "Hold",
    "HoldDifference",
    "Interval",
    "LinearAG",
    "MagnitudeAware",
    "NoiseLevel",
    "NonFinitePredictionError",
    "Policy",
    "PolicyState",
    "PredictionType",
    "Rule",
    "Run",
    "Schedule",
    "Space",
    "StandIn",
    "Step",
    "StepRecord",
    "Trace",
    "Weights",
    "apg",
    "available",
    "cfg",
    "cfg_rescale",
    "cfg_zero_star",
    "cosine",
    "fdg",
    "fit_coefficients",
    "load_guidance",
    "magnitude_aware",
    "r_squared",
    "resolve",
    "save_guidance",
    "tangential_damping",
    "tcfg",
]
