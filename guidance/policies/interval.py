"""Guidance within a window of steps or noise levels.

References:
    Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution
    Quality in Diffusion Models", NeurIPS 2024, https://arxiv.org/abs/2404.07724
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..base import BOTH, COND, Decision, Policy, PolicyState, SameForAll, Step
from ..registry import register


@register
@dataclass(frozen=True)
class Interval(Policy):
    """Guidance within a window only; outside it the conditional prediction stands alone.

    Args:
        start_step, stop_step: Guided while ``start_step <= index < stop_step``; network
            evaluations counted from 0, so a second-order scheduler has about twice its steps.
        noise_low, noise_high: Guided while ``noise_low < sigma/alpha <= noise_high``, in units of
            the data (SDXL in the paper: 0.28 and 5.42).

    Raises:
        ValueError: a window is empty.
    """

    name: ClassVar[str] = "interval"

    start_step: int = 0
    stop_step: int | None = None
    noise_low: float = 0.0
    noise_high: float = math.inf

    def __post_init__(self) -> None:
        if self.stop_step is not None and self.stop_step <= self.start_step:
            raise ValueError(f"Interval: empty steps [{self.start_step}, {self.stop_step})")
        if not self.noise_low < self.noise_high:
            raise ValueError(f"Interval: empty noise window ({self.noise_low}, {self.noise_high}]")

    @property
    def needs_noise(self) -> bool:
        """Whether a noise window is set."""
        return self.noise_low > 0 or self.noise_high < math.inf

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """A state that guides every sample within the window."""
        return SameForAll(batch, lambda step: BOTH if self._holds(step) else COND)

    def decisions(self, total: int) -> Sequence[Decision]:
        """Both branches, or the conditional one."""
        return (BOTH, COND)

    def _holds(self, step: Step) -> bool:
        stop = step.total if self.stop_step is None else self.stop_step
        if not self.start_step <= step.index < stop:
            return False
        if not self.needs_noise:
            return True
        if step.level is None:
            raise ValueError(f"the noise level of step {step.index} is not known")
        return self.noise_low < step.level.ratio <= self.noise_high
