r"""Every rule as one linear combination whose coefficients follow from a few inner products.

In the rule's space (:math:`D = a_x x_t + a_p \, \mathrm{pred}`; ``a_x = 0, a_p = 1`` in the native
one), with :math:`m = D_c - D_u + \beta m_{prev}`, every rule here returns

.. math:: D = D_c + c \, D_c + b \, m + u \, D_u

with one c, b, u per sample (of shape (B,), or floats where the sums they follow from are); the
network's own prediction is then

.. math::
    \mathrm{pred} = (1 + c) p_c + b (p_c - p_u) + u \, p_u
    + \frac{b \beta}{a_p} m_{prev} + \frac{(c + u) a_x}{a_p} x_t

so that one read gives the inner products, and one more read and one write the result. The two
predictions are subtracted from each other first, before anything is squared or scaled.
"""

from __future__ import annotations

import math

import torch

from ..base import Rule
from ..rules.apg import APG
from ..rules.cfg import CFG
from ..rules.cfg_zero_star import CFGZeroStar
from ..rules.magnitude_aware import MagnitudeAware
from ..rules.rescale import CFGRescale
from ..rules.tcfg import TCFG
from .scalars import Number, at_least, at_most, exp, hypot, rsqrt, sqrt, where

RULES: tuple[type[Rule], ...] = (CFG, CFGRescale, APG, CFGZeroStar, TCFG, MagnitudeAware)

Settings = tuple[float, float, float]
"""APG: eta, radius (L2; 0 is off), beta. CFG-Zero*: zero steps, whether the scale is optimized.
Rescale: phi. Magnitude-aware: alpha. What is left over is 0."""

TINY = torch.finfo(torch.float32).tiny


def has_formula(rule: Rule) -> bool:
    """Whether a rule is one of `RULES`; a subclass of one may combine differently and is not."""
    return type(rule) in RULES


def settings_of(rule: Rule, elements: int) -> Settings:
    """The numbers of a rule's formula.

    Args:
        rule: The rule.
        elements: Number of elements of a sample.

    Raises:
        ValueError: the rule is no linear combination of this kind.
    """
    if not has_formula(rule):
        known = ", ".join(kind.__name__ for kind in RULES)
        raise ValueError(f"guide_step does not know the rule {rule!r}: expected one of {known}")
    if isinstance(rule, APG):
        unit = math.sqrt(elements) if rule.threshold_unit == "rms" else 1.0
        return rule.eta, rule.norm_threshold * unit, rule.momentum
    if isinstance(rule, CFGZeroStar):
        return float(rule.zero_steps), float(rule.optimized_scale), 0.0
    if isinstance(rule, CFGRescale):
        return rule.phi, 0.0, 0.0
    if isinstance(rule, MagnitudeAware):
        return rule.alpha, 0.0, 0.0
    return 0.0, 0.0, 0.0


def apg(scale: Number, settings: Settings, mm: Number | None, mc: Number, cc: Number) -> tuple:
    """(c, b) of APG from <m, m> (None: no threshold), <m, D_c> and <D_c, D_c>.

    Here and below `scale` is w - 1.
    """
    eta, radius, _ = settings
    # An all-zero update is not scaled; an all-zero conditional prediction has no parallel part.
    b = scale if mm is None else at_most(rsqrt(mm) * radius, 1.0) * scale
    return mc / at_least(cc, TINY) * b * (eta - 1), b


def rescale(
    scale: Number, phi: float, spread_cond: Number, spread: Number, norm: Number, eps: float
) -> tuple:
    """(c, b) of CFG rescale from the deviations of D_c and of the guided D, and the latter's norm.

    The deviations are times sqrt(n), like the norm; `eps` is of the precision they have.
    """
    # A prediction that is constant to rounding has no spread to rescale and is left alone.
    varies = spread > 16 * eps * norm
    c = where(varies, phi * (spread_cond / where(varies, spread, 1.0) - 1), 0.0)
    return c, scale * (1 + c)


def zero_star(scale: Number, cu: Number, uu: Number) -> tuple:
    """(c, u) of CFG-Zero* from <D_c, D_u> and <D_u, D_u>."""
    return scale, -scale * cu / where(uu > 0, uu, 1.0)


def tcfg(scale: Number, cu: Number, excess: Number) -> tuple:
    """(c, b) of TCFG from <D_c, D_u> and ``excess = <D_u, D_u> - <D_c, D_c>``.

    p'_u = x D_c + y D_u (see `guidance/tcfg.py`), so that b = scale * y and
    c = scale * (1 - x - y), written without the cancellation that 1 - x - y has where the
    predictions nearly agree.
    """
    root = hypot(excess, 2 * cu)
    safe = where(root > 0, root, 1.0)
    ratio = excess / safe
    near = ratio * (excess / where(cu > 0, root + 2 * cu, 1.0))
    gap = where(root > 0, where(cu > 0, near, 1 - 2 * cu / safe), 1.0)
    return scale * (gap - ratio) / 2, scale * (1 + ratio) / 2


def magnitude_aware(scale: Number, alpha: float, mm: Number, uu: Number) -> Number:
    """The coefficient b of magnitude-aware guidance from <m, m> and <D_u, D_u>."""
    length = alpha * sqrt(mm)
    # Nothing is damped without an update or with alpha = 0, be D_u zero or not.
    return scale * exp(-where(length > 0, length * rsqrt(uu), 0.0))
