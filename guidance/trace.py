"""What happened during a run: evaluations, cosines, norms."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class StepRecord:
    """One step.

    Args:
        index: Network evaluation within the run, from 0.
        noise: sigma / alpha of the network's input; None where unknown.
        rows: The samples whose both branches were evaluated.
        gamma: Cosine of the two predictions, with shape (len(rows),): in the policy's space, or for
            policies without one on denoised images where the noise level is known.
        cond_norm: L2 norm of the conditional prediction in the rule's space, likewise.
        update_norm: L2 norm of guided minus conditional prediction in the rule's space, likewise.

    The tensors stay on the network's device until they are read.
    """

    index: int
    noise: float | None
    rows: list[int]
    gamma: Tensor | None = None
    cond_norm: Tensor | None = None
    update_norm: Tensor | None = None

    def as_dict(self) -> dict:
        """Plain numbers and lists."""
        tensors = ("gamma", "cond_norm", "update_norm")
        values = {name: getattr(self, name) for name in tensors}
        lists = {name: v.float().tolist() for name, v in values.items() if v is not None}
        return {"step": self.index, "noise": self.noise, "rows": self.rows, **lists}


@dataclass
class Trace:
    """The steps of a run of `batch` samples."""

    batch: int
    steps: list[StepRecord] = field(default_factory=list)

    @property
    def nfe(self) -> list[int]:
        """Network evaluations of every sample: 1 a step, 2 where both branches ran."""
        counts = [len(self.steps)] * self.batch
        for step in self.steps:
            for row in step.rows:
                counts[row] += 1
        return counts

    def as_dicts(self) -> list[dict]:
        """One dictionary a step, ready for JSON."""
        return [step.as_dict() for step in self.steps]
