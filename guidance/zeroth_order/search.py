r"""Descent along random gradient estimates.

A step asks for the losses of the token v and of n points beside it, and estimates the gradient
:math:`\hat g` from them (`forward_difference`). Noisy directions are taken out
(`low_variance_components`), Adam makes an update of it, and tokens may be averaged:

.. math:: \bar v_t = (1 - a_t)\, \bar v_{t-1} + a_t v_t, \qquad a_t = \frac{\eta + 1}{t + \eta}

needs no length of the run in advance; :math:`\eta = 0` is the mean of all tokens, with larger
:math:`\eta` early ones weigh less, as :math:`(i / t)^\eta`.

References:
    Seo et al., https://arxiv.org/abs/2503.14868 (all but the average).
    Kingma & Ba, "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980.
    Shamir & Zhang, "Stochastic Gradient Descent for Non-smooth Optimization", ICML 2013,
    https://arxiv.org/abs/1212.1824 (polynomial-decay averaging).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .estimates import forward_difference, perturbations
from .subspace import low_variance_components


@dataclass(frozen=True)
class Descent:
    """Settings of a descent; the defaults are ZOODiP's.

    Args:
        directions: Points beside the token, n.
        mu: Their distance, in units of the token.
        rate: Adam's learning rate.
        betas: Decays of Adam's first and second moment, in [0, 1).
        epsilon: Added to the root of Adam's second moment, in units of the estimate (loss per unit
            of the token): elements far below it hardly move. The published script has 1e-3 and
            divides estimates by sqrt((d + n - 1) / n): that is 1e-3 times this root here.
        warmup: Steps over which the rate rises to its value. Adam's first steps are as long as its
            later ones, however poor the first estimates are.
        subspace_tau: Tokens that Subspace Gradient keeps, and steps between two decompositions; 0
            switches it off.
        subspace_nu: Share of the variance that Subspace Gradient takes for noise, in [0, 1).
        average: eta of the average of all tokens; negative is off.

    Raises:
        ValueError: a setting out of range.
    """

    directions: int = 2
    mu: float = 1e-3
    rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    warmup: int = 0
    subspace_tau: int = 128
    subspace_nu: float = 1e-3
    average: float = -1.0

    def __post_init__(self) -> None:
        for name, least in (("directions", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("mu", "rate", "epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.subspace_tau < 2 and self.subspace_tau != 0:
            raise ValueError(f"subspace_tau must be 0 or at least 2, got {self.subspace_tau}")
        if not 0 <= self.subspace_nu < 1:
            raise ValueError(f"subspace_nu must lie in [0, 1), got {self.subspace_nu}")

    @property
    def evaluations(self) -> int:
        """Losses that a step takes, K = n + 1."""
        return self.directions + 1


class GradientSearch:
    """The descent: points to evaluate (`ask`), their losses (`tell`), the result so far (`value`).

    It never calls a network. Its points follow from its state, the seed and the step, so that
    processes that hold the same state only have to exchange losses.

    Args:
        initial: Where to begin, with shape (d,).
        settings: Of the descent.
        seed: Seed of the directions.

    `state` is everything that the next step depends on, by name: float32 tensors on the CPU, and
    the number of steps. A search with the same arguments continues from a copy of it.
    """

    def __init__(self, initial: Tensor, settings: Descent, seed: int = 0) -> None:
        self.settings, self.seed = settings, seed
        start = initial.detach().float().cpu().clone()
        self.state: dict[str, Tensor] = {
            "count": torch.tensor(0),
            "iterate": start,
            "first": torch.zeros_like(start),
            "second": torch.zeros_like(start),
            "average": torch.zeros_like(start),
            "history": torch.zeros(0, len(start)),
            "noise": torch.zeros(0, len(start)),
        }

    @property
    def value(self) -> Tensor:
        """The result so far, with shape (d,), float32: the average if there is one."""
        averaged = self.settings.average >= 0 and self.state["count"] > 0
        return self.state["average" if averaged else "iterate"]

    def _directions(self) -> Tensor:
        size, step = len(self.state["iterate"]), int(self.state["count"])
        return perturbations(size, self.seed, step, self.settings.directions)

    def ask(self) -> Tensor:
        """The points of the next step, with shape (K, d), float32: v, then v + mu u_k."""
        steps = self.settings.mu * self._directions()
        return self.state["iterate"] + torch.cat([torch.zeros(1, steps.shape[1]), steps])

    def tell(self, losses: Tensor) -> None:
        """Take the step; `losses`, with shape (K,), belong to the points of `ask`.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        settings, state = self.settings, self.state
        if not losses.isfinite().all():
            raise FloatingPointError(f"losses of step {state['count']} are not finite: {losses}")
        losses = losses.double().cpu()
        directions = self._directions().double()
        gradient = forward_difference(losses[1:], losses[0], directions, settings.mu).float()
        if len(noise := state["noise"]):
            gradient = gradient - noise.T @ (noise @ gradient)
        state["count"] = state["count"] + 1
        count = int(state["count"])
        state["iterate"] = state["iterate"] + self._adam(gradient, count)
        if settings.subspace_tau:
            state["history"] = torch.cat([state["history"], state["iterate"][None]])
            if len(state["history"]) == settings.subspace_tau:
                noise = low_variance_components(state["history"], settings.subspace_nu)
                state["noise"], state["history"] = noise.float(), state["history"][:0]
        if settings.average >= 0:
            weight = (settings.average + 1) / (count + settings.average)
            state["average"] = (1 - weight) * state["average"] + weight * state["iterate"]

    def _adam(self, gradient: Tensor, count: int) -> Tensor:
        """What the step of this number, from 1, adds to the token."""
        (a, b), state = self.settings.betas, self.state
        state["first"] = a * state["first"] + (1 - a) * gradient
        state["second"] = b * state["second"] + (1 - b) * gradient.square()
        first = state["first"] / (1 - a**count)
        second = state["second"] / (1 - b**count)
        rate = self.settings.rate * min(1.0, count / max(1, self.settings.warmup))
        return -rate * first / (second.sqrt() + self.settings.epsilon)
