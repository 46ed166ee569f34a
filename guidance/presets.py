"""What the names of guidance stand for, and presets per model family."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast, get_type_hints

from .base import Always, Guidance, Policy, Rule
from .names import unknown
from .policies.adaptive import AdaptiveGuidance
from .policies.interval import Interval
from .registry import NAMES, load_installed, register
from .rules.apg import APG
from .rules.cfg import CFG
from .rules.cfg_zero_star import CFGZeroStar
from .rules.frequency_decoupled import FDG
from .rules.history_guided import HiGS
from .rules.magnitude_aware import MagnitudeAware
from .rules.tangential_amplifying import TAG
from .text import parse

register(Always)

# Settings that their authors used on a model, where they are not the defaults of the class:
#   apg: Table 10 of https://arxiv.org/abs/2410.02416 (eta = 0 throughout). The paper's thresholds
#     are norms over all elements of the latents at the model's native size; here per element.
#   cfg-zero*: the first 2 of 50 steps, https://github.com/WeichenFan/CFG-Zero-star (text to video).
#   fdg: Table 8a of https://arxiv.org/abs/2506.19713, w_low of w as (w_low - 1) / (w - 1).
#   higs: Table 10 of https://arxiv.org/abs/2509.22300; for SDXL, timestep 400 as a noise level.
#   magnitude: sd35_sample.py of https://github.com/xiaomomy/MAMBO-G (with w = 18).
#   tag: Table 16 of https://arxiv.org/abs/2510.04533 (unguided, 50 steps).
PRESETS: dict[str, dict[str, Rule | Policy]] = {
    # The embedded model (examples/emoji), chosen by examples/studies/tune.py: a threshold that
    # takes away over a third of the excess saturation of CFG at w = 15 (smaller ones take more,
    # but bound the update at any w); 30 of 40 evaluations over 20 steps of DPM++ 2M at w = 7.5.
    "emoji": {
        "apg": APG(norm_threshold=0.05, momentum=-0.5),
        "ag": AdaptiveGuidance(threshold=0.9975),
    },
    "edm2-s": {"apg": APG(norm_threshold=2.5 / 128, momentum=-0.75), "fdg": FDG(0.0)},  # 1 of 3
    "edm2-xl": {"fdg": FDG(0.0)},  # 1 of 2
    "dit": {
        "apg": APG(norm_threshold=5 / 64, momentum=-0.5),
        "fdg": FDG(0.0),  # 1 of 2
        "higs": HiGS(weight=2.0, noise_low=0.3),
    },
    "sd2": {
        "apg": APG(norm_threshold=7.5 / 192, momentum=-0.75),
        "fdg": FDG(1 / 3),  # 3 of 7
    },
    "sdxl": {
        "apg": APG(norm_threshold=15 / 256, momentum=-0.5),
        "fdg": FDG(4 / 9),  # 5 of 10
        "higs": HiGS(noise_low=0.538),
        "interval": Interval(noise_low=0.28, noise_high=5.42),
        "tag": TAG(1.2),
    },
    "sd3": {"fdg": FDG(1 / 3), "tag": TAG(1.05)},  # 3 of 7
    "sd3.5": {"magnitude": MagnitudeAware(12.0)},
    "wan": dict.fromkeys(("cfg-zero*", "cfg-zero-star"), CFGZeroStar(zero_steps=2)),
}

# Adaptive Guidance as its paper sets it (https://arxiv.org/abs/2312.12487, DPM++ 2M, 20 steps,
# w = 7.5): cosines of raw network outputs, the first two for EMU-768, the others for LDM-512. On
# networks that predict noise finely (SDXL) they stop guidance at once: calibrate instead.
LITERATURE: dict[str, Policy] = {
    f"ag-{threshold}": AdaptiveGuidance(float(threshold), space="native")
    for threshold in ("0.991", "0.993", "0.9990", "0.9994", "0.9996")
}


def _changed(part: Rule | Policy) -> Callable[..., Rule | Policy]:
    """A function that makes a part with some settings changed, which its signature lists."""
    known = inspect.signature(type(part)).parameters.values()

    @functools.wraps(type(part), assigned=("__doc__",), updated=())
    def make(**settings: Any) -> Rule | Policy:
        return replace(cast(Any, part), **settings)

    own = [one.replace(default=getattr(part, one.name)) for one in known]
    vars(make)["__signature__"] = inspect.Signature(own)
    make.__annotations__ = get_type_hints(type(part))
    return make


for _name, _part in LITERATURE.items():
    register(_changed(_part), name=_name)

# Names of version 0.1, to go with version 0.3, whose thresholds the paper does not have.
MISREAD = {"ag-0.994": "ag-0.9994", "ag-0.996": "ag-0.9996"}


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
        guidance: A name ("cfg", "apg", "ag"), a combination of a rule and a policy ("apg+ag"),
            either with changed settings ("apg(eta=0.5)+ag(threshold=0.99)"), or a configured
            object.
        family: Model family whose presets the names stand for, e.g. "sdxl". Names without a preset
            there take the defaults of their class.

    Raises:
        ValueError: unknown name or setting (the message lists the known ones), a setting out of
            its range, or two rules or policies.
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
    for name, settings in parse(guidance):
        make = maker(name, family)
        if make is None:
            raise unknown(
                "guidance", name, available(), ", and a rule with a policy, such as 'apg+ag'"
            )
        part = _configured(name, make, settings)
        if isinstance(part, Rule) and rule is None:
            rule = part
        elif isinstance(part, Policy) and policy is None:
            policy = part
        else:
            kind = "rules" if isinstance(part, Rule) else "policies"
            raise ValueError(f"{guidance!r} names two {kind}")
    return Guidance(rule or CFG(), policy or Always())


def maker(name: str, family: str | None = None) -> Callable[..., Rule | Policy] | None:
    """What makes the rule or policy of one name, its settings as keywords; None: nothing does.

    Its signature lists the settings, with the defaults that they have in the model family.
    """
    if name in MISREAD:
        right = MISREAD[name]
        warnings.warn(
            f"{name!r} is a misreading of the paper, whose threshold for LDM-512 is "
            f"{right.removeprefix('ag-')}: it now means {right!r}",
            FutureWarning,
            stacklevel=3,
        )
        name = right
    preset = PRESETS.get(family or "", {}).get(name)
    if preset is not None:
        return _changed(preset)
    if name not in NAMES:
        load_installed()
    return NAMES.get(name)


def _configured(
    name: str, make: Callable[..., Rule | Policy], settings: dict[str, Any]
) -> Rule | Policy:
    known = inspect.signature(make).parameters if settings else {}
    for setting in settings:
        if setting not in known:
            listed = f"has {', '.join(known)}" if known else "has none"
            raise ValueError(f"{name!r} has no setting {setting!r}: it {listed}")
    try:
        part = make(**settings)
    except TypeError as error:
        raise ValueError(f"a setting of {name!r} is not what it should be: {error}") from error
    if not isinstance(part, (Rule, Policy)):
        raise TypeError(f"{name!r} stands for {part!r}, expected a rule or a policy")
    return part
