"""The mathematics of guidance, on tensors: rules, policies, and the state of a run."""

from .adaptive import AdaptiveGuidance, cosine
from .alternating import Extrapolate, Hold
from .apg import APG, apg
from .cfg import CFG, cfg
from .cfg_zero_star import CFGZeroStar, cfg_zero_star
from .composition import Guidance
from .forecast import Forecast
from .frequency_decoupled import FDG, fdg
from .linear_ag import Coefficients, LinearAG
from .magnitude_aware import MagnitudeAware, magnitude_aware
from .policy import Always, Interval, Policy, PolicyState, Step
from .prediction import PREDICTION_TYPES, NoiseLevel, PredictionType, Space
from .presets import PRESETS, available, resolve
from .regression import Gram, fit_coefficients, r_squared
from .rescale import CFGRescale, cfg_rescale
from .rule import Rule
from .run import NonFinitePredictionError, Run
from .saved import load_guidance, save_guidance
from .schedule import Schedule
from .stand_in import ExtrapolateDifference, HoldDifference, StandIn, Weights
from .tcfg import TCFG, tangential_damping, tcfg
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
