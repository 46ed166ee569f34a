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

Where a step evaluates neither branch, :math:`g^*_t` itself is regressed on the last few guided
predictions: :math:`\hat g_t = \sum \beta^g_{t,i} \, g_i`, i not forecast.

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487 (the estimate)
    Ross et al., "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online
    Learning", AISTATS 2011, https://arxiv.org/abs/1011.0686 (fitting on states of one's own)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Policy, PolicyState, Step
from ..policies.fill import Coefficients
from ..policies.schedule import Choice, Schedule
from .regression import ridge_regression


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
        recent: Guided predictions that a forecast is made of, at most.

    Raises:
        ValueError: the choices cannot be followed, or `recent` is not positive.
    """

    name: ClassVar[str] = "steer"
    needs_history: ClassVar[bool] = True

    choices: tuple[Choice, ...]
    guidance_scale: float
    aim: Callable[[int], Tensor] = field(repr=False)
    see: Callable[[Coefficients], None] = field(repr=False)
    rows: Sequence[int] | None = None
    ridge: float = 1e-4
    recent: int = 4

    def __post_init__(self) -> None:
        if self.recent < 1:
            raise ValueError(f"Steer: recent must be at least 1, got {self.recent}")
        Schedule(self.choices)  # refuses choices that cannot be followed

    def may_forecast(self, total: int) -> bool:
        """Whether any step is forecast."""
        return "forecast" in self.choices

    def start(self, batch: int, on_cpu: bool) -> PolicyState:
        """A state that has fitted nothing yet."""
        return _Steering(self, batch)


class _Steering(PolicyState):
    def __init__(self, policy: Steer, batch: int) -> None:
        self.policy, self.batch = policy, batch
        self.rows = list(range(batch)) if policy.rows is None else list(policy.rows)
        self.conds: dict[int, Tensor] = {}
        self.differences: dict[int, Tensor] = {}
        self.guided: dict[int, Tensor] = {}
        # Weights of every step, as Coefficients holds them: conditional, unconditional, guided.
        self.fitted: list[tuple[list[float], list[float], list[float]]] = []

    def wanted(self, step: Step) -> list[bool]:
        choices = Schedule(self.policy.choices).choices_for(step.total)
        return [choices[step.index] == "both"] * self.batch

    def estimate(self, step: Step, pred_cond: Tensor) -> Tensor | None:
        self.conds[step.index] = pred_cond.clone()
        if self.policy.choices[step.index] == "cond":
            self._end(step)
            return None
        w = self.policy.guidance_scale
        aim = (self.policy.aim(step.index).float() - pred_cond.float()) / (w - 1)
        known = [*self.conds.values(), *self.differences.values()]
        difference, beta = self._nearest(known, aim)
        count = len(self.conds)
        self._end(
            step,
            dict(zip(self.conds, beta[:count], strict=True)),
            dict(zip(self.differences, beta[count:], strict=True)),
        )
        return (pred_cond.float() - difference).to(pred_cond.dtype)

    def keep(self, step: Step, pred_cond: Tensor, pred_uncond: Tensor) -> None:
        if self.policy.choices[step.index] == "both":
            self.conds[step.index] = pred_cond.clone()
            self.differences[step.index] = pred_cond.float() - pred_uncond.float()
            self._end(step)

    def resting(self, step: Step) -> list[int]:
        rests = self.policy.choices[step.index] == "forecast"
        return list(range(self.batch)) if rests else []

    def forecast(self, step: Step) -> Tensor:
        guided, beta = self._nearest([*self.guided.values()], self.policy.aim(step.index).float())
        self._end(step, guided=dict(zip(self.guided, beta, strict=True)))
        return guided

    def wants_guided(self, step: Step) -> bool:
        return "forecast" in self.policy.choices[step.index + 1 :]

    def keep_guided(self, step: Step, guided: Tensor) -> None:
        self.guided[step.index] = guided.clone()
        for old in [*self.guided][: -self.policy.recent]:
            del self.guided[old]

    def _nearest(self, known: Sequence[Tensor], aim: Tensor) -> tuple[Tensor, list[float]]:
        """The weighted sum of K tensors (B, \\*) nearest to `aim`, and its weights."""
        # Contiguous, with shape (K, B, *): what the regression reads and what the sum is made of.
        stacked = torch.stack([*known]).float()
        rows = self.rows
        beta = ridge_regression(stacked[:, rows].flatten(1), aim[rows].flatten(), self.policy.ridge)
        return torch.einsum("k,k...->...", beta.to(stacked), stacked), beta.tolist()

    def _end(
        self,
        step: Step,
        conds: Mapping[int, float] | None = None,
        differences: Mapping[int, float] | None = None,
        guided: Mapping[int, float] | None = None,
    ) -> None:
        """Note the weights of a step: of c - u as those of u, and those of a forecast."""
        t = step.index
        cond, uncond = [0.0] * (t + 1), [0.0] * t
        cond[t] = 1.0
        for i, value in (conds or {}).items():
            cond[i] -= value
        for k, value in (differences or {}).items():
            cond[k] -= value
            uncond[k] += value
        forecast = [(guided or {}).get(i, 0.0) for i in range(t)]
        self.fitted.append((cond, uncond, forecast))
        if t + 1 == step.total:
            cond, uncond, forecast = zip(*self.fitted, strict=True)
            self.policy.see(Coefficients(cond, uncond, guided=forecast))
