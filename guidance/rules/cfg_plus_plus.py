r"""CFG++: the picture is guided, the noise put back is the unconditional one.

A DDIM or Euler step denoises with the guided prediction and adds noise again from the unconditional
one, which keeps the run on the path of the unconditional model:

.. math:: x' = \alpha' \, D\bigl(\varepsilon_u + \lambda (\varepsilon_c - \varepsilon_u)\bigr)
    + \sigma' \varepsilon_u

The step is linear in the predictions, so it is an ordinary step at the scale

.. math:: w_t = \lambda \, \frac{\alpha' \sigma}{\alpha' \sigma - \alpha \sigma'}

with :math:`\alpha, \sigma` the noise level now and :math:`\alpha', \sigma'` the next one: high
where steps are short, :math:`\lambda` at the last one (:math:`\sigma' = 0`) and at a first one
without any signal (:math:`\alpha = 0`).

References:
    Chung et al., "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models",
    ICLR 2025, https://arxiv.org/abs/2406.08070
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import NoiseLevel, accumulate
from ..registry import register
from .cfg import cfg


def cfg_plus_plus_scale(
    strength: float, level: NoiseLevel, next_level: NoiseLevel
) -> float | Tensor:
    """The guidance scale w_t at which an ordinary step is one of CFG++.

    Args:
        strength: lambda.
        level: alpha and sigma of the network's input.
        next_level: alpha and sigma that the step goes to.

    Returns:
        w_t, a number, or a 0-d tensor where the noise levels are.
    """
    forward, backward = next_level.alpha * level.sigma, level.alpha * next_level.sigma
    return strength * forward / (forward - backward)


@register
@dataclass(frozen=True)
class CFGPlusPlus(Rule):
    """CFG++ on Euler and DDIM (eta = 0).

    Args:
        strength: lambda, from 0 (the unconditional prediction) to 1. The paper compares 0.2, 0.4,
            0.6, 0.8, 1.0 with scales of 2, 5, 7.5, 9, 12.5; 0.6 is our default.

    The pipeline's ``guidance_scale`` only has to be above 1, so that both branches are evaluated.

    Raises:
        ValueError: the strength is not a positive number.
    """

    name: ClassVar[str] = "cfg-pp"  # a plus joins a rule and a policy
    needs_next_level: ClassVar[bool] = True

    strength: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise ValueError(f"CFGPlusPlus: strength must be positive, got {self.strength}")

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, None]:
        """`cfg` at `cfg_plus_plus_scale`; w is not read."""
        scale = cfg_plus_plus_scale(self.strength, *step.levels())
        cond, uncond = predictions.pair("native")
        return cfg(accumulate(cond), accumulate(uncond), scale), None
