"""What guidance is made of: rules, policies, the two together, and the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from .prediction import Space


def _cfg():
    from .rules.cfg import CFG

    return CFG()


@dataclass(frozen=True)
class Step:
    """Where a run is.

    Args:
        index: Network evaluation within the run, from 0.
        total: Number of network evaluations of the run.
        noise: sigma / alpha of the network's input (the variance-exploding noise level); None
            where the scheduler's noise level is unknown.
    """

    index: int
    total: int
    noise: float | None


class PolicyState:
    """What a policy remembers during one run; the base remembers nothing."""

    def wanted(self, step: Step) -> list[bool]:
        """For every sample, whether its unconditional branch is to be evaluated at this step."""
        raise NotImplementedError

    def observe(self, step: Step, rows: list[int], gamma: Tensor | None) -> None:
        """See the predictions of a step; called after every step with a guided sample.

        Args:
            step: The step just evaluated.
            rows: The samples whose both branches were evaluated.
            gamma: Cosine of conditional and unconditional prediction in the policy's space, with
                shape (len(rows),), on the network's device; None if `needs_gamma` is False.
        """

    def scale(self, step: Step, guidance_scale: float) -> float | Tensor:
        """w at this step (0-d if to be differentiated by); `guidance_scale` was asked for."""
        return guidance_scale

    def estimate(self, step: Step, pred_cond: Tensor) -> Tensor | None:
        """What stands in for the unconditional predictions at a step that evaluates none.

        Asked only of policies with `needs_history`.

        Args:
            step: The step just evaluated.
            pred_cond: Conditional prediction in the policy's space, with shape (B, \\*).

        Returns:
            The estimate in the same space and shape; None: the conditional prediction stands alone.
        """
        return None

    def keep(self, step: Step, pred_cond: Tensor, pred_uncond: Tensor) -> None:
        """Remember the predictions of a guided step, whether evaluated or estimated.

        Asked only of policies with `needs_history`; both have the shape (B, \\*), in its space.
        """

    def resting(self, step: Step) -> list[int]:
        """The samples that evaluate nothing at this step, none of them wanted.

        Asked after `wanted`.
        """
        return []

    def forecast(self, step: Step) -> Tensor:
        """Guided predictions in the policy's space, with shape (B, \\*).

        Only those of the samples that rest are read.
        """
        raise NotImplementedError

    def wants_guided(self, step: Step) -> bool:
        """Whether `keep_guided` is to be told what the rule made of this step."""
        return False

    def keep_guided(self, step: Step, guided: Tensor) -> None:
        """Remember the guided predictions of a step, in the policy's space.

        Those of samples that rest, in a batch of which others do not, are their forecasts.

        Args:
            step: The step just evaluated.
            guided: With shape (B, \\*).
        """


class Policy:
    """Base of all policies. Subclasses are frozen dataclasses of their settings.

    Attributes:
        name: The name by which `pipe(..., guidance=name)` finds the policy.
        needs_gamma: Whether `PolicyState.observe` wants the cosine of the two predictions.
        needs_history: Whether the policy keeps predictions, to estimate unconditional ones.
        space: The space in which the cosine is taken and predictions are kept.
        needs_noise: Whether the policy reads `Step.noise`.
        identity: What the policy's settings were fitted on; None: they hold anywhere.
    """

    name: ClassVar[str]
    needs_gamma: ClassVar[bool] = False
    needs_history: bool = False
    needs_noise: bool = False
    space: Space = "native"
    identity: Mapping[str, Any] | None = None

    def start(self, batch: int, on_cpu: bool) -> PolicyState:
        """A fresh state for a run of `batch` samples."""
        raise NotImplementedError

    def may_forecast(self, total: int) -> bool:
        """Whether in a run of `total` steps any sample may evaluate nothing at a step."""
        return False

    def replaces_combination(self, total: int) -> bool:
        """Whether a run of `total` steps gets predictions from it that are not to be combined.

        Even with `CFG`, whose combination is otherwise the pipeline's own.
        """
        return self.may_forecast(total)

    @property
    def identities(self) -> tuple[Mapping[str, Any], ...]:
        """What the policy and what it is made of were fitted on."""
        return () if self.identity is None else (self.identity,)

    def __ror__(self, rule) -> Guidance:
        return Guidance(rule, self)


@dataclass(frozen=True)
class Always(Policy):
    """Both branches at every step: ordinary guidance."""

    name: ClassVar[str] = "always"

    def start(self, batch: int, on_cpu: bool) -> PolicyState:
        """A state that wants every sample at every step."""
        return _Window(batch, lambda step: True)


@dataclass(frozen=True)
class Interval(Policy):
    """Guidance within a window only; outside it the conditional prediction stands alone.

    Args:
        start_step, stop_step: Guided while ``start_step <= index < stop_step``; network
            evaluations counted from 0, so a second-order scheduler has about twice its steps.
        noise_low, noise_high: Guided while ``noise_low < sigma/alpha <= noise_high``, in units of
            the data (Kynkäänniemi et al., https://arxiv.org/abs/2404.07724; SDXL: 0.28 and 5.42).

    Raises:
        ValueError: a window is empty.
    """

    name: ClassVar[str] = "interval"

    start_step: int = 0
    stop_step: int | None = None
    noise_low: float = 0.0
    noise_high: float = math.inf

    def __post_init__(self) -> None:
        if self.stop_step is not None and self.stop_step <= self.start_step:
            raise ValueError(f"Interval: empty steps [{self.start_step}, {self.stop_step})")
        if not self.noise_low < self.noise_high:
            raise ValueError(f"Interval: empty noise window ({self.noise_low}, {self.noise_high}]")

    @property
    def needs_noise(self) -> bool:
        """Whether a noise window is set."""
        return self.noise_low > 0 or self.noise_high < math.inf

    def start(self, batch: int, on_cpu: bool) -> PolicyState:
        """A state that wants every sample within the window."""
        return _Window(batch, self._inside)

    def _inside(self, step: Step) -> bool:
        stop = step.total if self.stop_step is None else self.stop_step
        if not self.start_step <= step.index < stop:
            return False
        return not self.needs_noise or self.noise_low < step.noise <= self.noise_high


class _Window(PolicyState):
    """The same answer for every sample."""

    def __init__(self, batch: int, inside) -> None:
        self.batch, self.inside = batch, inside

    def wanted(self, step: Step) -> list[bool]:
        return [self.inside(step)] * self.batch


class Rule:
    """Base of all rules. Subclasses are frozen dataclasses of their settings.

    A rule is pure: it reads two predictions, the scale and its own state, and returns the guided
    prediction and the new state. It knows neither the policy nor a pipeline.

    Attributes:
        name: The name by which `pipe(..., guidance=name)` finds the rule.
        space: Where the rule acts: on denoised images ("x0") or on raw network outputs ("native").
        needs_flow: Whether the rule makes sense for networks that predict a flow velocity only.
        counts_steps: Whether the state is the number of the run's steps before this one, guided or
            not, with shape (B, 1), int32, rather than what the rule returned last.
    """

    name: ClassVar[str]
    space: Space = "native"
    needs_flow: bool = False
    counts_steps: ClassVar[bool] = False

    def combine(
        self, pred_cond: Tensor, pred_uncond: Tensor, guidance_scale: float, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction and the new state.

        Args:
            pred_cond: Conditional prediction in the rule's space, with shape (B, \\*).
            pred_uncond: Unconditional prediction, with shape (B, \\*).
            guidance_scale: w; 1 means no guidance.
            state: What the previous guided step returned for these samples, with shape (B, \\*);
                None at the first.
        """
        raise NotImplementedError

    def __or__(self, policy: Policy) -> Guidance:
        return Guidance(self, policy)


@dataclass(frozen=True)
class Guidance:
    """How predictions combine, and which of them are evaluated.

    Written ``APG(...) | AdaptiveGuidance(...)``, or as a name such as "apg+ag".

    Args:
        rule: Combines the conditional and the unconditional prediction.
        policy: Says which samples' unconditional branch is evaluated at a step.
    """

    rule: Rule = field(default_factory=_cfg)
    policy: Policy = field(default_factory=Always)

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"not a guidance rule: {self.rule!r}")
        if not isinstance(self.policy, Policy):
            raise TypeError(f"not an evaluation policy: {self.policy!r}")

    def __or__(self, policy: Policy) -> Guidance:
        if not isinstance(self.policy, Always):
            raise TypeError(f"{self} already has the policy {self.policy}")
        return replace(self, policy=policy)

    @property
    def is_plain(self) -> bool:
        """Whether this is classifier-free guidance at every step, the pipelines' own."""
        return self.rule == _cfg() and isinstance(self.policy, Always)

    @property
    def needs_x0(self) -> bool:
        """Whether denoised images, hence the scheduler's noise levels, are needed."""
        policy = self.policy
        reads = policy.needs_gamma or policy.needs_history
        return self.rule.space == "x0" or (reads and policy.space == "x0")

    @property
    def needs_noise_level(self) -> bool:
        """Whether the scheduler's noise levels are needed at all."""
        return self.needs_x0 or self.policy.needs_noise

    def __str__(self) -> str:
        if isinstance(self.policy, Always):
            return str(self.rule)
        return f"{self.rule} | {self.policy}"
