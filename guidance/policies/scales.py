r"""The guidance scale over the run, and for every sample of a batch.

What is multiplied is w - 1, the strength of the guidance, so that w = 1 stays no guidance:
:math:`w_t = 1 + f_t (w - 1)`. With p from 0 at the first step to 1 at the last one, f is

.. math::
    \text{linear: } 2 p, \qquad \text{cosine: } 1 - \cos \pi p, \qquad
    \text{beta: } \frac{p^{a - 1} (1 - p)^{b - 1}}{B(a, b)}, \; a = 2, \, b = 3

each divided by its mean over the run, so that guidance is moved, not added.

References:
    Wang et al., "Analysis of Classifier-Free Guidance Weight Schedulers", TMLR 2024,
    https://arxiv.org/abs/2404.13040 (linear, cosine; whether w or w - 1 rises there is not
    confirmed)
    Malarz et al., "Classifier-free Guidance with Adaptive Scaling", ECAI 2025,
    https://arxiv.org/abs/2502.10574 (beta; there the update is also divided by its norm)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..base import Always, Decision, Kept, Kind, Policy, PolicyState, Step
from ..prediction import Space
from ..registry import register

Shape = Literal["linear", "cosine", "beta"]
Over = Literal["steps", "noise"]
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 2 * p,
    "cosine": lambda p: 1 - math.cos(math.pi * p),
    "beta": lambda p: 12 * p * (1 - p) ** 2,
}


class _Scaled(Policy):
    """Another policy, whose decisions are given other scales."""

    policy: Policy

    @property
    def some(self) -> tuple[float, ...]:
        """Factors of the scale that occur."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs_gamma", self.policy.needs_gamma)
        if self.policy.identities:
            raise ValueError(
                f"'{self.policy}' was fitted for one guidance scale: it cannot be changed over the "
                "run or from sample to sample"
            )

    @property
    def space(self) -> Space | None:
        """What the policy says."""
        return self.policy.space

    @property
    def needs_noise(self) -> bool:
        """What the policy says."""
        return self.policy.needs_noise

    def decisions(self, total: int) -> Sequence[Decision] | None:
        """What the policy may decide, with another scale."""
        inner, factor = self.policy.decisions(total), next((f for f in self.some if f != 1), 1.0)
        return None if inner is None else [_with(factor, d) for d in inner]


def _with(factor: float, decision: Decision) -> Decision:
    """A decision whose guidance is so many times as strong."""
    guides = "uncond" in decision.evaluate or decision.estimates
    return replace(decision, factor=factor * decision.factor) if guides else decision


class _ScaledState(PolicyState):
    """The state of the policy, and a factor for every step and sample."""

    def __init__(self, inner: PolicyState, factors: Callable[[Step], Sequence[float]]) -> None:
        self.inner, self.factors = inner, factors

    def decide(self, step: Step) -> Sequence[Decision]:
        pairs = zip(self.factors(step), self.inner.decide(step), strict=True)
        self.settled = self.inner.settled
        return [_with(factor, decision) for factor, decision in pairs]

    def keep_until(self, kind: Kind, step: int) -> int:
        return self.inner.keep_until(kind, step)

    def observe(self, step: Step, rows: Sequence[int], gamma: Tensor | None, kept: Kept) -> None:
        self.inner.observe(step, rows, gamma, kept)


@register
@dataclass(frozen=True)
class ScaleSchedule(_Scaled):
    """A guidance scale that changes over the run.

    Args:
        shape: "linear" and "cosine" rise from none, "beta" rises and falls again, with its highest
            point after a third of the run; or a factor of w - 1 for every network evaluation, taken
            as it is.
        over: What the run is measured in: "steps", or "noise", 1 - sigma / (alpha + sigma), where
            the mean over the run is not 1.
        policy: Which branches are evaluated meanwhile.

    Raises:
        ValueError: unknown names, factors that are not finite, factors over the noise, or the
            policy was fitted for one scale.
    """

    name: ClassVar[str] = "scale-schedule"

    shape: Shape | tuple[float, ...] = "linear"
    over: Over = "steps"
    policy: Policy = field(default_factory=Always)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.shape, str):
            object.__setattr__(self, "shape", tuple(float(f) for f in self.shape))
            if not self.shape or not all(map(math.isfinite, self.shape)):
                raise ValueError(f"ScaleSchedule: factors must be finite, got {self.shape}")
        elif self.shape not in SHAPES:
            raise ValueError(
                f"ScaleSchedule: shape is one of {', '.join(SHAPES)}, or a factor for every step; "
                f"got {self.shape!r}"
            )
        if self.over not in get_args(Over):
            raise ValueError(f"ScaleSchedule: over is 'steps' or 'noise', got {self.over!r}")
        if self.over == "noise" and not isinstance(self.shape, str):
            raise ValueError("ScaleSchedule: a factor for every step goes over the steps")

    @property
    def some(self) -> tuple[float, ...]:
        """See `_Scaled`."""
        return (0.5,) if isinstance(self.shape, str) else self.shape

    @property
    def needs_noise(self) -> bool:
        """Whether the run is measured in noise, or the policy reads noise levels."""
        return self.over == "noise" or self.policy.needs_noise

    def factors(self, total: int) -> tuple[float, ...]:
        """The factor of w - 1 at every one of `total` network evaluations.

        Raises:
            ValueError: there are other than `total` factors.
        """
        if not isinstance(self.shape, str):
            if len(self.shape) != total:
                raise ValueError(
                    f"{len(self.shape)} factors of the scale for a run of {total} network "
                    "evaluations: give one for each"
                )
            return self.shape
        values = [SHAPES[self.shape](i / max(total - 1, 1)) for i in range(total)]
        mean = sum(values) / total
        return tuple(value / mean for value in values) if mean > 0 else (1.0,) * total

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """The policy's state, with the scale of every step."""
        steps = self.factors(total) if self.over == "steps" else ()

        def factors(step: Step) -> Sequence[float]:
            if steps:
                return [steps[step.index]] * batch
            if step.level is None:
                raise ValueError(f"the noise level of step {step.index} is not known")
            ratio = step.level.ratio
            share = 1.0 if ratio == math.inf else ratio / (1 + ratio)
            return [SHAPES[str(self.shape)](1 - share)] * batch

        return _ScaledState(self.policy.start(batch, total, on_cpu), factors)


@register
@dataclass(frozen=True)
class SampleScales(_Scaled):
    """A guidance scale for every sample of the batch.

    Args:
        factors: What w - 1 is multiplied with, one for every sample of the batch.
        policy: Which branches are evaluated.

    ``pipe(..., guidance_scale=[3, 7.5])`` makes it: the pipeline is given the highest scale, and
    every sample its share.

    Raises:
        ValueError: a factor is negative or not finite, or the policy was fitted for one scale.
    """

    name: ClassVar[str] = "sample-scales"

    factors: tuple[float, ...] = ()
    policy: Policy = field(default_factory=Always)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "factors", tuple(float(f) for f in self.factors))
        if not all(0 <= factor < math.inf for factor in self.factors):
            raise ValueError(f"SampleScales: factors are finite and >= 0, got {self.factors}")

    @property
    def some(self) -> tuple[float, ...]:
        """See `_Scaled`."""
        return self.factors

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """The policy's state, with the scale of every sample."""
        if len(self.factors) != batch:
            raise ValueError(
                f"{len(self.factors)} guidance scales for {batch} samples: give one for each"
            )
        return _ScaledState(self.policy.start(batch, total, on_cpu), lambda step: self.factors)


for _shape in get_args(Shape):
    register(partial(ScaleSchedule, _shape), name=f"scale-{_shape}")
