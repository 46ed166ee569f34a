"""What happens along ordinary guided runs, for those who fit or calibrate on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Policy, PolicyState, Step
from ..prediction import Space


@dataclass(frozen=True)
class Gather(Policy):
    """Both branches at every step, and a look at all predictions of a batch at its end.

    Args:
        see: Called with the conditional and the unconditional predictions of a whole run, both
            with shape (T, B, \\*). They are held until then.
        space: "native" gathers network outputs, "x0" denoised images.
    """

    name: ClassVar[str] = "gather"
    needs_history: ClassVar[bool] = True

    see: Callable[[Tensor, Tensor], None] = field(repr=False)
    space: Space = "native"

    def start(self, batch: int, on_cpu: bool) -> PolicyState:
        """A state that has gathered nothing yet."""
        return _Gathering(batch, self.see)


class _Gathering(PolicyState):
    def __init__(self, batch: int, see: Callable[[Tensor, Tensor], None]) -> None:
        self.batch, self.see = batch, see
        self.cond: list[Tensor] = []
        self.uncond: list[Tensor] = []

    def wanted(self, step: Step) -> list[bool]:
        return [True] * self.batch

    def keep(self, step: Step, pred_cond: Tensor, pred_uncond: Tensor) -> None:
        self.cond.append(pred_cond.clone())
        self.uncond.append(pred_uncond.clone())
        if step.index + 1 == step.total:
            self.see(torch.stack(self.cond), torch.stack(self.uncond))
