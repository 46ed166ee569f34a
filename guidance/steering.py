r"""Estimates fitted to a schedule while it runs: each brings the run back to its reference.

`fit_coefficients` regresses unconditional predictions along trajectories of ordinary guidance. A
run that is guided by estimates leaves them, and nothing in that regression knows. Here the
trajectories follow the schedule itself. Where it estimates, let :math:`g^*_t` be the guided
prediction with which the solver would arrive at the reference's next state; the coefficients are

.. math:: \arg\min_\beta \sum \Big\| \frac{g^*_t - c_t}{w - 1}
    - \sum_{i \le t} \beta^c_{t,i} \, c_i - \sum_{k < t} \beta^\Delta_{t,k} (c_k - u_k) \Big\|^2
    + \mathrm{ridge}, \qquad k \text{ evaluated}

and the run goes on with that estimate, so that it makes up for the errors of earlier ones. Any such
sum is one of LinearAG: :math:`\hat u_t = c_t - \sum \beta^c c_i - \sum \beta^\Delta (c_k - u_k)`.

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487 (the estimate)
    Ross et al., "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online
    Learning", AISTATS 2011, https://arxiv.org/abs/1011.0686 (fitting on states of one's own)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .linear_ag import Coefficients
from .policy import Policy, PolicyState, Step
from .regression import ridge_regression
from .schedule import Choice, Schedule


@dataclass(frozen=True)
class Steer(Policy):
    """Follows a schedule and fits its estimates on the way, on all samples of the batch at once.

    Args:
        choices: See `Schedule`; its own estimates are not used.
        guidance_scale: w of the run.
        aim: Step -> guided prediction that is wanted of it, with shape (B, \\*).
        see: Called at the end of the run with the coefficients.
        rows: Samples to fit on; None: all. The others are guided by what is found.
        ridge: Added to the diagonal, relative to the mean square of the regressors.
    """

    name: ClassVar[str] = "steer"
    needs_history: ClassVar[bool] = True

    choices: tuple[Choice, ...]
    guidance_scale: float
    aim: Callable[[int], Tensor] = field(repr=False)
    see: Callable[[Coefficients], None] = field(repr=False)
    rows: Sequence[int] | None = None
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        Schedule(self.choices)  # refuses choices that cannot be followed

    def start(self, batch: int, on_cpu: bool) -> PolicyState:
        """A state that has fitted nothing yet."""
        return _Steering(self, batch)


class _Steering(PolicyState):
    def __init__(self, policy: Steer, batch: int) -> None:
        self.policy, self.batch = policy, batch
        self.rows = list(range(batch)) if policy.rows is None else list(policy.rows)
        self.conds: list[Tensor] = []
        self.differences: dict[int, Tensor] = {}
        self.fitted: list[tuple[list[float], list[float]]] = []

    def wanted(self, step: Step) -> list[bool]:
        choices = Schedule(self.policy.choices).choices_for(step.total)
        return [choices[step.index] == "both"] * self.batch

    def estimate(self, step: Step, pred_cond: Tensor) -> Tensor | None:
        self.conds.append(pred_cond.clone())
        if self.policy.choices[step.index] == "cond":
            self._end(step)
            return None
        w = self.policy.guidance_scale
        aim = (self.policy.aim(step.index).float() - pred_cond.float()) / (w - 1)
        # Contiguous, with shape (K, B, *): what the regression reads and what the sum is made of.
        known = torch.stack([*self.conds, *self.differences.values()]).float()
        beta = ridge_regression(
            known[:, self.rows].flatten(1), aim[self.rows].flatten(), self.policy.ridge
        )
        difference = torch.einsum("k,k...->...", beta.to(known), known)
        self._end(step, beta.tolist())
        return (pred_cond.float() - difference).to(pred_cond.dtype)

    def keep(self, step: Step, pred_cond: Tensor, pred_uncond: Tensor) -> None:
        if self.policy.choices[step.index] == "both":
            self.conds.append(pred_cond.clone())
            self.differences[step.index] = pred_cond.float() - pred_uncond.float()
            self._end(step)

    def _end(self, step: Step, beta: Sequence[float] = ()) -> None:
        """Note the weights of a step, as those of an unconditional prediction."""
        t = step.index
        cond, uncond = [0.0] * (t + 1), [0.0] * t
        if beta:
            cond = [-value for value in beta[: t + 1]]
            for k, value in zip(self.differences, beta[t + 1 :], strict=True):
                cond[k] -= value
                uncond[k] += value
        cond[t] += 1
        self.fitted.append((cond, uncond))
        if t + 1 == step.total:
            self.policy.see(Coefficients(*zip(*self.fitted, strict=True)))
