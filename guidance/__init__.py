"""The mathematics of guidance, on tensors: rules, policies, and the state of a run."""

from .adaptive import AdaptiveGuidance, cosine
from .apg import APG, apg
from .cfg import CFG, cfg
from .cfg_zero_star import CFGZeroStar, cfg_zero_star
from .composition import Guidance
from .frequency_decoupled import FDG, fdg
from .magnitude_aware import MagnitudeAware, magnitude_aware
from .policy import Always, Interval, Policy, PolicyState, Step
from .prediction import PREDICTION_TYPES, NoiseLevel, PredictionType, Space
from .presets import PRESETS, available, resolve
from .rescale import CFGRescale, cfg_rescale
from .rule import Rule
from .run import NonFinitePredictionError, Run
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
    "Guidance",
    "Interval",
    "MagnitudeAware",
    "NoiseLevel",
    "NonFinitePredictionError",
    "Policy",
    "PolicyState",
    "PredictionType",
    "Rule",
    "Run",
    "Space",
    "Step",
    "StepRecord",
    "Trace",
    "apg",
    "available",
    "cfg",
    "cfg_rescale",
    "cfg_zero_star",
    "cosine",
    "fdg",
    "magnitude_aware",
    "resolve",
    "tangential_damping",
    "tcfg",
]
