"""What the names of guidance stand for, and presets per model family."""

from __future__ import annotations

import functools

from .base import Always, Guidance, Policy, Rule
from .names import unknown
from .policies.adaptive import AdaptiveGuidance
from .policies.interval import Interval
from .registry import NAMES, load_installed, register
from .rules.apg import APG
from .rules.cfg import CFG

register(Always)

# APG: Table 10 of https://arxiv.org/abs/2410.02416 (eta = 0 throughout). The paper's thresholds are
# norms over all elements of the latents at the model's native size; here they are per element.
PRESETS: dict[str, dict[str, Rule | Policy]] = {
    # The embedded model (examples/emoji), chosen by examples/studies/tune.py: a threshold that
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
for _name in LITERATURE:
    register(functools.partial(LITERATURE.__getitem__, _name), name=_name)


def available() -> list[str]:
    """Every name that `resolve` knows, rules first, without combinations."""
    load_installed()
    rules = [
        name for name, make in NAMES.items() if isinstance(make, type) and issubclass(make, Rule)
    ]
    return [*rules, *(name for name in NAMES if name not in rules)]


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
        return Guidance(guidance)
    if isinstance(guidance, Policy):
        return Guidance(CFG(), guidance)
    if not isinstance(guidance, str):
        raise TypeError(
            f"guidance must be a name, a rule, a policy or None, got {type(guidance).__name__}"
        )
    rule: Rule | None = None
    policy: Policy | None = None
    for name in guidance.lower().split("+"):
        part = _part(name, family)
        if part is None:
            raise unknown(
                "guidance", name, available(), ", and a rule with a policy, such as 'apg+ag'"
            )
        if isinstance(part, Rule) and rule is None:
            rule = part
        elif isinstance(part, Policy) and policy is None:
            policy = part
        else:
            kind = "rules" if isinstance(part, Rule) else "policies"
            raise ValueError(f"{guidance!r} names two {kind}")
    return Guidance(rule or CFG(), policy or Always())


def _part(name: str, family: str | None) -> Rule | Policy | None:
    """What one name stands for; None: nothing."""
    preset = PRESETS.get(family or "", {}).get(name)
    if preset is not None:
        return preset
    if name not in NAMES:
        load_installed()
    if name not in NAMES:
        return None
    part = NAMES[name]()
    if not isinstance(part, (Rule, Policy)):
        raise TypeError(f"{name!r} stands for {part!r}, expected a rule or a policy")
    return part
