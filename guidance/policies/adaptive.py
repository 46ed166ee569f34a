r"""Adaptive Guidance (AG): stop evaluating the unconditional branch once it says nothing new.

.. math:: \gamma_t = \cos(p(x_t, c), p(x_t, \varnothing))

Classifier-free guidance while :math:`\gamma_t < \bar\gamma`; from then on the conditional
prediction alone, for good. A run of T steps whose first k are guided costs T + k network
evaluations per sample. For the same cost the rest of the run can keep its guidance, if at every
other step nothing is evaluated and the last guided prediction is taken once more (ours; see
`forecast`).

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..base import Policy, PolicyState, Step
from ..device import LaggedReads, to_device
from ..prediction import Space, dot, norm

Tail = Literal["cond", "forecast"]


def cosine(pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
    """gamma_t per sample over all non-batch dimensions, shape (B,), at least float32.

    1 where the predictions are equal, also where both are zero.
    """
    product = norm(pred_cond) * norm(pred_uncond)
    ratio = dot(pred_cond, pred_uncond) / product.where(product > 0, 1)
    return ratio.where(product > 0, (norm(pred_cond) == norm(pred_uncond)).to(ratio))


@dataclass(frozen=True)
class AdaptiveGuidance(Policy):
    """Adaptive Guidance: per sample, guidance until the two predictions agree.

    Args:
        threshold: gamma-bar, the cosine at which a sample's unconditional branch is dropped. Above
            1 it is never dropped. The value depends on model, scheduler and above all on `space`:
            the epsilon predictions of SDXL agree to 0.9999 from the first step on. The default, on
            denoised images, guides 18 of 50 steps on SDXL (w = 7) and 25 of 50 on a flow model
            (w = 4.5); the paper's own values (0.991 to 0.996) are for another model and space.
        space: "x0" compares denoised images, "native" the raw network outputs.
        tail: What follows: "cond", the conditional prediction alone, as in the paper; "forecast",
            nothing and both branches in turn, the guided prediction held in `space` meanwhile.
        lag: How many steps after its measurement a decision takes effect. None: 0 on the CPU, 1 on
            other devices, where the value then arrives without stalling the queue. A lag of 1
            costs at most one more unconditional evaluation per sample.

    Raises:
        ValueError: the threshold is not a number, the lag is negative, or a name is unknown.
    """

    name: ClassVar[str] = "ag"
    needs_gamma: ClassVar[bool] = True

    threshold: float = 0.999
    space: Space = "x0"
    lag: int | None = None
    tail: Tail = "cond"

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError("AdaptiveGuidance: threshold is NaN")
        if self.space not in ("x0", "native"):
            raise ValueError(f"AdaptiveGuidance: space is 'x0' or 'native', got {self.space!r}")
        if self.lag is not None and self.lag < 0:
            raise ValueError(f"AdaptiveGuidance: lag must be >= 0, got {self.lag}")
        if self.tail not in get_args(Tail):
            raise ValueError(f"AdaptiveGuidance: tail is 'cond' or 'forecast', got {self.tail!r}")

    def start(self, batch: int, on_cpu: bool) -> PolicyState:
        """A state in which every sample is still guided."""
        lag = self.lag if self.lag is not None else (0 if on_cpu else 1)
        latch = _Latch if self.tail == "cond" else _RestingLatch
        return latch(batch, self.threshold, lag)

    def may_forecast(self, total: int) -> bool:
        """Whether the tail is so."""
        return self.tail == "forecast"


class _Latch(PolicyState):
    """Samples leave the guided set once and never return."""

    def __init__(self, batch: int, threshold: float, lag: int) -> None:
        self.guided = [True] * batch
        self.threshold = threshold
        self.reads = LaggedReads(lag)

    def wanted(self, step: Step) -> list[bool]:
        for rows, gamma in self.reads.due(step.index):
            for row, value in zip(rows, gamma, strict=True):
                self.guided[row] &= value < self.threshold
        return list(self.guided)

    def observe(self, step: Step, rows: list[int], gamma: Tensor | None) -> None:
        self.reads.push(step.index, rows, gamma)


class _RestingLatch(_Latch):
    """Samples that have left the guided set rest at every other step; the others are guided."""

    def __init__(self, batch: int, threshold: float, lag: int) -> None:
        super().__init__(batch, threshold, lag)
        self.since = [0] * batch  # steps since a sample left
        self.planned = -1  # the step that this is of
        self.held: Tensor | None = None

    def wanted(self, step: Step) -> list[bool]:
        guided = super().wanted(step)
        self.planned = step.index
        self.since = [0 if g else n + 1 for g, n in zip(guided, self.since, strict=True)]
        return [n % 2 == 0 for n in self.since]

    def resting(self, step: Step) -> list[int]:
        if step.index != self.planned:
            return []
        return [row for row, n in enumerate(self.since) if n % 2]

    def forecast(self, step: Step) -> Tensor:
        return self.held

    def wants_guided(self, step: Step) -> bool:
        return True

    def keep_guided(self, step: Step, guided: Tensor) -> None:
        resting = self.resting(step)
        if resting:  # what they hold has been to the network's units and back
            rests = torch.zeros(len(guided), dtype=torch.bool)
            rests[resting] = True
            rests = to_device(rests, guided.device).view(-1, *(1,) * (guided.ndim - 1))
            guided = self.held.where(rests, guided)
        self.held = guided
