r"""Adaptive Guidance (AG): stop evaluating the unconditional branch once it says nothing new.

.. math:: \gamma_t = \cos(p(x_t, c), p(x_t, \varnothing))

Classifier-free guidance while :math:`\gamma_t < \bar\gamma`; from then on the conditional
prediction alone, for good. A run of T steps whose first k are guided costs T + k network
evaluations per sample. For the same cost the rest of the run can keep its guidance, if every other
step is skipped and reuses the last guided prediction (ours; see `pilotage.guidance.forecast`).

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..base import BOTH, COND, Decision, Kept, Kind, Policy, PolicyState, Step, Weights
from ..device import LaggedReads
from ..prediction import Space, check_space
from ..registry import register

Then = Literal["cond", "forecast"]


@register
@dataclass(frozen=True)
class AdaptiveGuidance(Policy):
    """Adaptive Guidance: per sample, guidance until the two predictions agree.

    Args:
        threshold: gamma-bar, the cosine at which a sample's unconditional branch is dropped. Above
            1 it is never dropped. The value depends on model, scheduler and above all on `space`:
            the epsilon predictions of SDXL agree to 0.9999 from the first step on. The default, on
            denoised images, guides 18 of 50 steps on SDXL (w = 7) and 25 of 50 on a flow model
            (w = 4.5); the paper's own are for other models and the native space: 0.991 (29.6 of
            40 evaluations) and 0.993 for EMU-768, 0.9990 to 0.9996 for LDM-512.
        space: "x0" compares denoised images, "native" the raw network outputs.
        lag: How many steps after its measurement a decision takes effect. None: 0 on the CPU, 1 on
            other devices, where the value then arrives without stalling the queue. A lag of 1
            costs at most one more unconditional evaluation per sample.
        then: What follows: "cond", the conditional prediction alone, as in the paper; "forecast",
            skipped steps and guided ones in turn, the guided prediction held in `space` meanwhile.

    Raises:
        ValueError: the threshold is not a number, the lag is negative, or a name is unknown.
    """

    name: ClassVar[str] = "ag"
    needs_gamma: ClassVar[bool] = True

    threshold: float = 0.999
    space: Space = "x0"
    lag: int | None = None
    then: Then = "cond"

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError("AdaptiveGuidance: threshold is NaN")
        check_space("AdaptiveGuidance", self.space)
        if self.lag is not None and not (isinstance(self.lag, int) and self.lag >= 0):
            raise ValueError(f"AdaptiveGuidance: lag must be a whole number >= 0, got {self.lag!r}")
        if self.then not in get_args(Then):
            raise ValueError(f"AdaptiveGuidance: then is 'cond' or 'forecast', got {self.then!r}")

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """A state in which every sample is still guided."""
        lag = self.lag if self.lag is not None else (0 if on_cpu else 1)
        return _Latch(self, batch, lag)

    def decisions(self, total: int) -> Sequence[Decision]:
        """Both branches, and what follows."""
        return (BOTH, COND if self.then == "cond" else Decision((), reuse=Weights()))


class _Latch(PolicyState):
    """Samples stop being guided once and for good, or are skipped at every other step then."""

    def __init__(self, policy: AdaptiveGuidance, batch: int, lag: int) -> None:
        self.policy, self.reads = policy, LaggedReads(lag)
        self.stopped_for = [0] * batch  # steps since a sample stopped, 0: it has not
        self.stopped = [False] * batch

    def decide(self, step: Step) -> Sequence[Decision]:
        for rows, gamma in self.reads.due(step.index):
            for row, value in zip(rows, gamma, strict=True):
                self.stopped[row] |= not value < self.policy.threshold
        self.stopped_for = [
            n + 1 if stopped else 0
            for n, stopped in zip(self.stopped_for, self.stopped, strict=True)
        ]
        if self.policy.then == "cond":
            self.settled = all(self.stopped)
            return [COND if stopped else BOTH for stopped in self.stopped]
        skip = Decision((), reuse=Weights(guided={step.index - 1: 1.0}))
        return [skip if n % 2 else BOTH for n in self.stopped_for]

    def keep_until(self, kind: Kind, step: int) -> int:
        return step + 1 if kind == "guided" and self.policy.then == "forecast" else -1

    def observe(self, step: Step, rows: Sequence[int], gamma: Tensor | None, kept: Kept) -> None:
        if gamma is not None:
            self.reads.push(step.index, rows, gamma)
