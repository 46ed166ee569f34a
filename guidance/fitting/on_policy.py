r"""Estimates fitted to a schedule while it runs: each brings the run back to its reference.

`fit_coefficients` regresses unconditional predictions along trajectories of ordinary guidance. A
run that is guided by estimates departs from them, and nothing in that regression knows. Here the
trajectories follow the schedule itself. Where it estimates, let :math:`g^*_t` be the guided
prediction with which the solver would arrive at the reference's next state; the coefficients are

.. math:: \arg\min_\beta \sum \Big\| \frac{g^*_t - c_t}{w - 1}
    - \sum_{i \le t} \beta^c_{t,i} \, c_i - \sum_{k < t} \beta^\Delta_{t,k} (c_k - u_k) \Big\|^2
    + \mathrm{ridge}, \qquad k \text{ evaluated}

and the run goes on with that estimate, so that it makes up for the errors of earlier ones. Any such
sum is one of LinearAG: :math:`\hat u_t = c_t - \sum \beta^c c_i - \sum \beta^\Delta (c_k - u_k)`.

Where a step is skipped, :math:`g^*_t` itself is regressed on the last four guided predictions:
:math:`\hat g_t = \sum \beta^g_{t,i} \, g_i`, i not skipped. A schedule of evaluated and skipped
steps may be *corrected* as well: its evaluated steps are regressed likewise, on their own
prediction and the last four. The weights then are those of a multistep solver fitted to the model,
and the reference may be a run of more steps than a solver of fixed weights could follow. What is
penalised is the distance to weights that hold the last prediction, or keep the step's own.

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487 (the estimate)
    Shaul et al., "Bespoke Solvers for Generative Flow Models", ICLR 2024,
    https://arxiv.org/abs/2310.19075 (solvers fitted to one model)
    Ross et al., "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online
    Learning", AISTATS 2011, https://arxiv.org/abs/1011.0686 (fitting on states of one's own)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Decision, Kept, Kind, Policy, PolicyState, SameForAll, Step, Weights
from ..policies.fill import Coefficients
from ..policies.schedule import Choice, Schedule
from ..prediction import Space, accumulate
from .regression import ridge_regression

RECENT = 4  # How many guided predictions a skipped step reuses, at most.


@dataclass(frozen=True)
class FitOnPolicy(Policy):
    """Follows a schedule and fits its estimates on the way, on all samples of the batch at once.

    Args:
        choices: See `Schedule`.
        guidance_scale: w of the run.
        aim: Step -> the guided network output that is wanted of it, with shape (B, \\*).
        to: Called with the coefficients once the last of them is fitted.
        rows: Samples to fit on. The others are guided by what is found.
        ridge: Added to the diagonal, relative to the mean square of the regressors.
        space: Where predictions are kept and summed.
        correct: Correct evaluated steps, of a schedule that evaluates both branches or nothing.

    Raises:
        ValueError: the choices cannot be followed or corrected; in a run, a prediction is NaN or
            infinite, or the pipeline left a step without guidance.
    """

    name: ClassVar[str] = "fit-on-policy"

    choices: tuple[Choice, ...]
    guidance_scale: float
    aim: Callable[[int], Tensor] = field(repr=False)
    to: Callable[[Coefficients], None] = field(repr=False)
    rows: Sequence[int]
    ridge: float = 1e-4
    space: Space = "native"
    correct: bool = False

    def __post_init__(self) -> None:
        if self.correct and not set(self.choices) <= {"both", "forecast"}:
            raise ValueError("only schedules of 'both' and 'forecast' are corrected")
        self.decisions(len(self.choices))

    def decisions(self, total: int) -> Sequence[Decision]:
        """Those of the schedule, with other weights than those that will be fitted."""
        decisions = Schedule(self.choices).decisions(total)
        own = (Decision(reuse=Weights(guided={step: 1.0})) for step in range(total))
        return [
            o if self.correct and i and not d.skips else d
            for i, (d, o) in enumerate(zip(decisions, own, strict=True))
        ]

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """A state that has fitted nothing yet."""
        return _Fitting(self, batch, self.decisions(total))


class _Fitting(SameForAll):
    """Follows the schedule; the weights of a step are fitted when they are needed."""

    def __init__(self, policy: FitOnPolicy, batch: int, decisions: Sequence[Decision]) -> None:
        fitted = [
            replace(decision, reuse=partial(self._fit, step)) if decision.reuse else decision
            for step, decision in enumerate(decisions)
        ]
        super().__init__(batch, lambda step: fitted[step.index])
        self.policy = policy
        self.terms = _terms(policy.choices, policy.correct)
        self.last_use = {term: step for step, terms in self.terms.items() for term in terms}
        self.weights: dict[int, Weights] = {}
        self._hand_over_if_done()

    def decide(self, step: Step) -> Sequence[Decision]:
        self.step = step
        return super().decide(step)

    def keep_until(self, kind: Kind, step: int) -> int:
        return self.last_use.get((kind, step), -1)

    def _fit(self, step: int, kept: Kept) -> Weights:
        """The weights whose sum is nearest to what is wanted of a step."""
        terms, estimates = self.terms[step], self.policy.choices[step] == "estimate"
        if missing := sorted({i for kind, i in terms if (kind, i) not in kept}):
            raise ValueError(
                f"step {step} cannot be fitted: at step {missing[0]} the pipeline did not guide"
            )
        aim = self._aim(step)
        if estimates:
            aim = (aim - accumulate(kept["cond", step])) / (self.policy.guidance_scale - 1)
        known = torch.stack([_regressor(term, kept) for term in terms])
        near = None if estimates else known[-1]  # the newest: its own, or what would be held
        if near is not None:
            aim = aim - near
        rows = list(self.policy.rows)
        beta = ridge_regression(
            known[:, rows].flatten(1), aim[rows].flatten(), self.policy.ridge
        ).tolist()
        if near is not None:
            beta[-1] += 1
            weights = Weights(guided={i: b for (_, i), b in zip(terms, beta, strict=True)})
        else:
            cond, uncond = {step: 1.0}, {}
            for (kind, i), b in zip(terms, beta, strict=True):
                cond[i] = cond.get(i, 0.0) - b
                if kind == "uncond":
                    uncond[i] = b
            weights = Weights(cond, uncond)
        self.weights[step] = weights
        self._hand_over_if_done()
        return weights

    def _aim(self, step: int) -> Tensor:
        """What is wanted of a step, in the policy's space, with shape (B, \\*)."""
        aim, now = self.policy.aim(step), self.step
        if self.policy.space == "native":
            return accumulate(aim)
        level, x_t = now.known()
        if x_t.shape != aim.shape:
            raise ValueError(
                f"the network's input has shape {tuple(x_t.shape)}, what it predicts "
                f"{tuple(aim.shape)}: this fit needs them to be the same"
            )
        return level.to_x0(aim, x_t)

    def _hand_over_if_done(self) -> None:
        if len(self.weights) < len(self.terms):
            return
        conds, unconds, guided = [], [], []
        for step in range(len(self.policy.choices)):
            of = self.weights.get(step, Weights())
            cond = of.cond or {step: 1.0}
            conds.append(tuple(cond.get(i, 0.0) for i in range(step + 1)))
            unconds.append(tuple(of.uncond.get(i, 0.0) for i in range(step)))
            own = step in of.guided
            guided.append(tuple(of.guided.get(i, 0.0) for i in range(step + own)))
        space = self.policy.space
        self.policy.to(Coefficients(tuple(conds), tuple(unconds), tuple(guided), space))


def _terms(choices: Sequence[Choice], correct: bool) -> dict[int, list[tuple[Kind, int]]]:
    """Step -> what it is made of, if it is; "uncond" stands for the difference c - u."""
    found: dict[int, list[tuple[Kind, int]]] = {}
    for step, choice in enumerate(choices):
        evaluated = [i for i in range(step) if choices[i] != "forecast"]
        if choice == "forecast":
            found[step] = [("guided", i) for i in evaluated[-RECENT:]]
        elif choice == "estimate":
            both = [i for i in evaluated if choices[i] == "both"]
            found[step] = [("cond", i) for i in [*evaluated, step]]
            found[step] += [("uncond", i) for i in both]
        elif correct and evaluated:
            found[step] = [("guided", i) for i in [*evaluated[-RECENT:], step]]
    return found


def _regressor(term: tuple[Kind, int], kept: Kept) -> Tensor:
    """One of what a step is made of, with shape (B, \\*), at least float32."""
    kind, step = term
    value = accumulate(kept[term])
    return accumulate(kept["cond", step]) - value if kind == "uncond" else value
