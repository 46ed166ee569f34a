"""The mathematics of guidance, on tensors: rules, policies, and the state of a run."""

from .adaptive import AdaptiveGuidance, cosine
from .apg import APG, apg
from .cfg import CFG, cfg
from .composition import Guidance
from .policy import Always, Interval, Policy, PolicyState, Step
from .prediction import PREDICTION_TYPES, NoiseLevel, PredictionType, Space
from .presets import PRESETS, available, resolve
from .rule import Rule
from .run import NonFinitePredictionError, Run
from .trace import StepRecord, Trace

__all__ = [
    "APG",
    "CFG",
    "PREDICTION_TYPES",
    "PRESETS",
    "AdaptiveGuidance",
    "Always",
    "Guidance",
    "Interval",
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
    "cosine",
    "resolve",
]
