"""What happened during a run: evaluations, cosines, norms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

MEASURED = ("gamma", "cond_norm", "update_norm", "scale_factor", "parallel_share")


@dataclass
class StepRecord:
    """One step.

    Args:
        index: Network evaluation within the run, from 0.
        noise: sigma / alpha of the network's input; None where unknown.
        rows: The samples whose both branches were evaluated.
        skipped: The samples that evaluated nothing and reused past guided predictions.
        estimated: The samples whose unconditional prediction is an estimate.
        branches: How many branches a guided sample evaluates.
        unused: The samples all of whose branches were evaluated all the same, to learn how the
            pipeline guides.
        gamma: Cosine of the two predictions of the `guided` samples, with shape (len(guided),): in
            the policy's space, or for policies without one on denoised images where the noise level
            is known.
        cond_norm: L2 norm of the conditional prediction in the rule's space, likewise.
        update_norm: L2 norm of guided minus conditional prediction in the rule's space, likewise.
        scale_factor: `update_norm` in units of plain guidance's, (w - 1) times the norm of the
            difference of the two predictions; 1 for CFG.
        parallel_share: Squared cosine between that difference and the conditional prediction: the
            share of its square that is parallel to the picture.

    The tensors stay on the network's device until they are read.
    """

    index: int
    noise: float | None
    rows: list[int]
    skipped: list[int] = field(default_factory=list)
    estimated: list[int] = field(default_factory=list)
    branches: int = 2
    unused: list[int] = field(default_factory=list)
    gamma: Tensor | None = None
    cond_norm: Tensor | None = None
    update_norm: Tensor | None = None
    scale_factor: Tensor | None = None
    parallel_share: Tensor | None = None

    @property
    def guided(self) -> list[int]:
        """The samples that were guided, by predictions or estimates, ascending."""
        return sorted({*self.rows, *self.estimated})

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        values = {name: getattr(self, name) for name in MEASURED}
        lists = {name: v.float().tolist() for name, v in values.items() if v is not None}
        plain = {"step": self.index, "noise": self.noise, "rows": self.rows}
        plain |= {name: getattr(self, name) for name in ("skipped", "estimated", "unused")}
        return plain | lists


@dataclass
class Trace:
    """The steps of a run of `batch` samples."""

    batch: int
    steps: list[StepRecord] = field(default_factory=list)

    @property
    def nfe(self) -> list[int]:
        """Network evaluations of every sample: 1 a step, all branches if guided, 0 if skipped."""
        counts = [0] * self.batch
        for step in self.steps:
            whole, skipped = {*step.rows, *step.unused}, set(step.skipped)
            for row in range(self.batch):
                counts[row] += step.branches if row in whole else row not in skipped
        return counts

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dictionary a step, ready for JSON."""
        return [step.as_dict() for step in self.steps]

    def plot(self) -> Any:
        """What was measured over the steps, as a matplotlib figure; faint lines are samples.

        Panels without figures are left out: most need ``detailed_trace=True``.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: the run has no steps.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "trace.plot() needs matplotlib: pip install matplotlib"
            ) from error
        if not self.steps:
            raise ValueError("a trace without steps cannot be plotted")
        measured = [n for n in MEASURED if any(getattr(s, n) is not None for s in self.steps)]
        panels = ["evaluations", *measured]
        figure = Figure(figsize=(7, 2.2 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
        for name, axis in zip(panels, axes, strict=True):
            axis.set_ylabel(name.replace("_", " "))
            axis.grid(alpha=0.3)
            values = self._evaluations() if name == "evaluations" else self._series(name)
            for row in values:
                axis.plot(*zip(*row, strict=True), color="tab:blue", alpha=0.3, marker=".")
        for step in self.steps:
            if step.estimated:
                axes[0].axvspan(step.index - 0.5, step.index + 0.5, color="tab:orange", alpha=0.2)
        axes[0].set_title(f"network evaluations a sample: {sum(self.nfe) / self.batch:g}")
        axes[-1].set_xlabel("call of the denoiser (orange: estimated)")
        return figure

    def _evaluations(self) -> list[list[tuple[int, float]]]:
        """(step, evaluations of a sample on average), one line."""
        return [[(s.index, sum(Trace(self.batch, [s]).nfe) / self.batch) for s in self.steps]]

    def _series(self, name: str) -> list[list[tuple[int, float]]]:
        """(step, value) of every sample."""
        lines: list[list[tuple[int, float]]] = [[] for _ in range(self.batch)]
        for step in self.steps:
            values = getattr(step, name)
            if values is not None:
                for row, value in zip(step.guided, values.float().tolist(), strict=True):
                    lines[row].append((step.index, value))
        return [line for line in lines if line]
