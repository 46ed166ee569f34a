"""Names of guidance settings, and presets per model family."""

from __future__ import annotations

from .base import Always, Guidance, Interval, Policy, Rule
from .policies.adaptive import AdaptiveGuidance
from .policies.alternating import Extrapolate, Hold
from .policies.forecast import Forecast
from .policies.linear_ag import LinearAG
from .policies.schedule import Schedule
from .rules.apg import APG
from .rules.cfg import CFG
from .rules.cfg_zero_star import CFGZeroStar
from .rules.frequency_decoupled import FDG
from .rules.magnitude_aware import MagnitudeAware
from .rules.rescale import CFGRescale
from .rules.tcfg import TCFG

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (CFG, APG, CFGRescale, CFGZeroStar, TCFG, MagnitudeAware, FDG)
}
POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Always,
        Interval,
        AdaptiveGuidance,
        LinearAG,
        Hold,
        Extrapolate,
        Forecast,
        Schedule,
    )
}
# A star is awkward in shells.
ALIASES: dict[str, str] = {"cfg-zero-star": CFGZeroStar.name}

# APG: Table 10 of https://arxiv.org/abs/2410.02416 (eta = 0 throughout). The paper's thresholds are
# norms over all elements of the latents at the model's native size; here they are per element.
PRESETS: dict[str, dict[str, Rule | Policy]] = {
    # The embedded model (examples/emoji), chosen from examples/emoji/tune.py: a threshold that
    # takes away over a third of the excess saturation of CFG at w = 15 (smaller ones take more,
    # but bound the update at any w); 30 of 40 evaluations over 20 steps of DPM++ 2M at w = 7.5.
    "emoji": {
        "apg": APG(norm_threshold=0.05, momentum=-0.5),
        "ag": AdaptiveGuidance(threshold=0.9975),
    },
    "edm2-s": {"apg": APG(norm_threshold=2.5 / 128, momentum=-0.75)},
    "dit": {"apg": APG(norm_threshold=5 / 64, momentum=-0.5)},
    "sd2": {"apg": APG(norm_threshold=7.5 / 192, momentum=-0.75)},
    "sdxl": {
        "apg": APG(norm_threshold=15 / 256, momentum=-0.5),
        "interval": Interval(noise_low=0.28, noise_high=5.42),
    },
}

# Adaptive Guidance as its paper sets it (https://arxiv.org/abs/2312.12487, DPM++ 2M, 20 steps,
# w = 7.5): cosines of raw network outputs, on its own models. On networks that predict noise
# finely (SDXL) they stop guidance at once: calibrate instead.
LITERATURE: dict[str, Policy] = {
    f"ag-{threshold}": AdaptiveGuidance(threshold, space="native")
    for threshold in (0.991, 0.994, 0.996)
}


def available() -> list[str]:
    """Every name that `resolve` knows, without aliases and combinations."""
    return [*RULES, *POLICIES, *LITERATURE]


def resolve(guidance: str | Rule | Policy | Guidance, family: str | None = None) -> Guidance:
    """Turn what a user wrote into a `Guidance`.

    Args:
        guidance: A name ("cfg", "apg", "ag"), a combination of a rule and a policy ("apg+ag"), or
            a configured object.
        family: Model family whose presets the names stand for, e.g. "sdxl". Names without a preset
            there take the defaults of their class.

    Raises:
        ValueError: unknown name (the message lists the known ones), or two rules or policies.
        TypeError: neither a name nor a guidance object.
    """
    if isinstance(guidance, Guidance):
        return guidance
    if isinstance(guidance, Rule):
        return Guidance(rule=guidance)
    if isinstance(guidance, Policy):
        return Guidance(policy=guidance)
    if not isinstance(guidance, str):
        raise TypeError(
            f"guidance must be a name, a rule, a policy or None, got {type(guidance).__name__}"
        )
    parts: dict[str, Rule | Policy] = {}
    for written in guidance.lower().split("+"):
        name = ALIASES.get(written, written)
        kind = "rule" if name in RULES else "policy"
        if name not in available():
            raise ValueError(
                f"unknown guidance {guidance!r}: known are {', '.join(available())}, "
                "and a rule with a policy, such as 'apg+ag'"
            )
        if kind in parts:
            raise ValueError(f"{guidance!r} names two {'rules' if kind == 'rule' else 'policies'}")
        preset = LITERATURE.get(name) or PRESETS.get(family or "", {}).get(name)
        parts[kind] = preset if preset is not None else (RULES | POLICIES)[name]()
    return Guidance(**parts)
