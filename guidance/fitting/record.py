"""What happens along ordinary guided runs, for those who fit or calibrate on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..base import BOTH, Decision, Kept, Kind, Policy, PolicyState, SameForAll, Step

Recorded = Callable[[Tensor, Tensor], None]
KINDS: tuple[Kind, Kind] = ("cond", "uncond")


@dataclass(frozen=True)
class Record(Policy):
    """Both branches at every step; all predictions of the run are handed over at its end.

    Args:
        to: Called with the conditional and the unconditional network outputs of the whole run, both
            with shape (T, B, \\*), in their dtype and on their device, where they are held until
            then.

    Raises:
        ValueError: at the end of a run, the pipeline left some steps without guidance.
    """

    name: ClassVar[str] = "record"

    to: Recorded = field(repr=False)

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """A state that has recorded nothing yet."""
        return _Recording(batch, total, self.to)

    def decisions(self, total: int) -> Sequence[Decision]:
        """Both branches."""
        return (BOTH,)


class _Recording(SameForAll):
    """Everything is kept up to the end of the run."""

    def __init__(self, batch: int, total: int, to: Recorded) -> None:
        super().__init__(batch, lambda step: BOTH)
        self.total, self.to = total, to

    def keep_until(self, kind: Kind, step: int) -> int:
        return -1 if kind == "guided" else self.total

    def observe(self, step: Step, rows: Sequence[int], gamma: Tensor | None, kept: Kept) -> None:
        if step.index + 1 < self.total:
            return
        if len(kept) < 2 * self.total:
            raise ValueError("the pipeline left some steps without guidance: nothing was recorded")
        steps = range(self.total)
        cond, uncond = (torch.stack([kept[kind, i] for i in steps]) for kind in KINDS)
        self.to(cond, uncond)
