"""Forecast: after a first part of the run, only some steps evaluate the network at all.

The others take the last guided prediction once more. The solver still makes all its steps, and the
first ones, which decide what the picture will be, are those of the full run; a run with fewer steps
has others from the start. No coefficients are needed; `pilotage.pipelines.fitting.on_policy` fits better
forecasts to one model.

References:
    Ye et al., "Training-Free Adaptive Diffusion with Bounded Difference Approximation Strategy",
    NeurIPS 2024, https://arxiv.org/abs/2410.09873 (steps that reuse the last noise prediction;
    there each sample decides which)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..prediction import Space
from .fill import HoldDifference, StandIn
from .schedule import Choice, Stepwise


@dataclass(frozen=True)
class Forecast(Stepwise):
    """Both branches at first, then at every `period`-th step; nothing is evaluated at the others.

    Args:
        head: Share of the steps, from 0 to 1, that are all evaluated (at least one step is).
        period: After them, one step of so many is evaluated, the last of them. The defaults make
            24 network evaluations of 20 steps' 40.
        space: "x0" holds the guided denoised image, "native" the guided network output.

    Raises:
        ValueError: a setting is out of its range.
    """

    name: ClassVar[str] = "forecast"

    head: float = 0.2
    period: int = 2
    space: Space = "x0"

    def __post_init__(self) -> None:
        if not 0 <= self.head <= 1:
            raise ValueError(f"Forecast: head is a share of 0 to 1, got {self.head}")
        if self.period < 1:
            raise ValueError(f"Forecast: period must be >= 1, got {self.period}")
        if self.space not in ("x0", "native"):
            raise ValueError(f"Forecast: space is 'x0' or 'native', got {self.space!r}")

    def choices_for(self, total: int) -> tuple[Choice, ...]:
        """Evaluated steps, then evaluated and forecast ones in turn."""
        first = max(round(self.head * total), 1)
        later = range(1, total - first + 1)
        return (*["both"] * first, *("forecast" if i % self.period else "both" for i in later))

    @property
    def stands_in(self) -> StandIn:
        """The last guided prediction held."""
        return HoldDifference(self.space)
