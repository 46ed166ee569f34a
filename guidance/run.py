"""The state of one run: made at its first step, dropped at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Guidance, Step
from .device import LaggedReads, row_index
from .ops import guide_step, has_formula
from .policies.adaptive import cosine
from .prediction import NoiseLevel, Space, accumulate, norm
from .rules.cfg import CFG
from .trace import StepRecord, Trace


class NonFinitePredictionError(FloatingPointError):
    """The network returned NaN or infinity."""


class Run:
    """Applies one `Guidance` along one trajectory of a batch.

    Args:
        guidance: Rule and policy.
        batch: Number of samples, B.
        total: Number of network evaluations planned.
        on_cpu: Whether the predictions live on the CPU (device values are then read at once).
        detailed: Record cosines and norms at every step.

    Each step is `plan`, which says what to evaluate, then `combine`. Samples that evaluate nothing
    (`resting`) take part in `combine` with their `forecast`; where all rest, it alone ends a step.

    Attributes:
        resting: The samples that evaluate nothing at the step last planned.
    """

    def __init__(
        self, guidance: Guidance, batch: int, total: int, on_cpu: bool, detailed: bool = False
    ) -> None:
        self.guidance, self.batch, self.total, self.detailed = guidance, batch, total, detailed
        self.policy_state = guidance.policy.start(batch, on_cpu)
        self.rule_state: Tensor | None = None
        self.finite = LaggedReads(0 if on_cpu else 1)
        self.trace = Trace(batch)
        self.step = Step(-1, total, None)
        self.resting: list[int] = []

    def plan(self, noise: float | None = None) -> list[int]:
        """Begin a step: the samples whose unconditional branch is to be evaluated.

        Args:
            noise: sigma / alpha of the network's input; None where unknown.
        """
        self.begin_step(noise)
        wanted = self.policy_state.wanted(self.step)
        self.resting = self.policy_state.resting(self.step)
        return [row for row in range(self.batch) if wanted[row]]

    def begin_step(self, noise: float | None = None) -> None:
        """Begin a step without a plan: the pipeline does not guide it."""
        self._raise_if_not_finite(self.finite.due(self.step.index + 1))
        self.step, self.resting = Step(self.step.index + 1, self.total, noise), []

    @property
    def all_rest(self) -> bool:
        """Whether the step last planned evaluates nothing at all."""
        return len(self.resting) == self.batch

    def combine(
        self,
        rows: list[int],
        pred_cond: Tensor,
        pred_uncond: Tensor | None,
        x_t: Tensor,
        guidance_scale: float,
        level: NoiseLevel | None,
    ) -> tuple[Tensor, Tensor]:
        """End a step: predictions for which classifier-free guidance yields the guided one.

        Args:
            rows: What `plan` returned.
            pred_cond: Network output of the conditional branch, with shape (B, \\*); of samples
                that rest, their forecasts.
            pred_uncond: Network output of the unconditional branch, with shape (len(rows), \\*);
                None if `rows` is empty: then the policy may give an estimate of it.
            x_t: Network input, with shape (B, \\*).
            guidance_scale: w; 1 means no guidance.
            level: Noise level of `x_t`; may be None if ``guidance.needs_x0`` is False.

        Returns:
            (cond, uncond), both with shape (B, \\*) and the dtype of `pred_cond`, such that
            ``uncond + w * (cond - uncond)`` is the guided prediction. For `CFG` at the scale given
            these are the predictions themselves, untouched; otherwise both are the guided
            prediction.

        Raises:
            NonFinitePredictionError: a prediction is NaN or infinite (on other devices than the
                CPU one step later, or from `finish`).
        """
        record = StepRecord(self.step.index, self.step.noise, rows, self.resting)
        self.trace.steps.append(record)
        policy, rule, state = self.guidance.policy, self.guidance.rule, self.policy_state
        if not rows:
            self._check_finite(pred_cond)
            pred_uncond = self._estimate(pred_cond, x_t, level)
            if pred_uncond is None:
                self._keep_guided(pred_cond, x_t, level)
                return pred_cond, pred_cond
            rows, record.estimated = list(range(self.batch)), True
        every = len(rows) == self.batch
        if not every:
            self._check_finite(pred_cond)
        index = None if every else row_index(rows, pred_cond.device)
        cond = pred_cond if every else pred_cond[index]
        views = _Views(cond, pred_uncond, x_t if every else x_t[index], level)
        scale = state.scale(self.step, guidance_scale)
        # A scale that is a tensor may carry a gradient, which the pipeline's own line would lose.
        own_scale = not isinstance(scale, Tensor) and scale == guidance_scale
        untouched = isinstance(rule, CFG) and own_scale
        combine = self._combine_at_once if has_formula(rule) else self._combine_by_rule
        wanted = not untouched or self._keeps_guided
        guided = combine(record, views, scale, index, wanted)
        state.observe(self.step, rows, record.gamma)
        if policy.needs_history:
            state.keep(self.step, *views.pair(policy.space))
        if wanted:
            guided = _fill(pred_cond, guided, index)
            self._keep_guided(guided, x_t, level)
        if untouched:
            return pred_cond, _fill(pred_cond, pred_uncond, index)
        return guided, guided

    def forecast(self, x_t: Tensor, level: NoiseLevel | None) -> Tensor:
        """Guided predictions of the samples that rest; the end of the step if all do.

        Args:
            x_t: What is or would be the network's input, with shape (B, \\*).
            level: As of `combine`.

        Returns:
            Predictions with shape (B, \\*), of which only those of samples that rest mean anything.
        """
        if self.all_rest:
            record = StepRecord(self.step.index, self.step.noise, [], self.resting)
            self.trace.steps.append(record)
        guided = self.policy_state.forecast(self.step)
        if self.guidance.policy.space == "x0":
            guided = level.from_x0(guided, x_t)
        return guided

    def _combine_at_once(
        self,
        record: StepRecord,
        views: _Views,
        scale: float | Tensor,
        index: Tensor | None,
        wanted: bool,
    ) -> Tensor | None:
        """The guided network output if `wanted`, and every scalar of the step from one read."""
        rule = self.guidance.rule
        step = guide_step(
            *views.native,
            scale,
            rule,
            x_t=views.x_t,
            level=views.level,
            state=self._state_of(index, views.native[0]),
            gamma_space=self._gamma_space(views.level),
            want_prediction=wanted,
            want_norms=self.detailed,
            want_finite=True,
        )
        self._push_finite(step.finite.amin() > 0)
        self._keep_state(step.state, index)
        record.gamma = step.gamma
        if self.detailed:
            record.cond_norm, record.update_norm = step.cond_norm, step.update_norm
            record.parallel_share = step.parallel_share
            record.scale_factor = _relative(step.update_norm, *views.pair(rule.space), scale)
        return step.prediction

    def _combine_by_rule(
        self,
        record: StepRecord,
        views: _Views,
        scale: float | Tensor,
        index: Tensor | None,
        wanted: bool,
    ) -> Tensor:
        """The same for rules that are no linear combination of the predictions."""
        self._check_finite(*views.native)
        space = self._gamma_space(views.level)
        if space is not None:
            record.gamma = cosine(*views.pair(space))
        rule = self.guidance.rule
        cond, uncond = views.pair(rule.space)
        guided, state = rule.combine(cond, uncond, scale, self._state_of(index, cond))
        self._keep_state(state, index)
        if self.detailed:
            difference, update = accumulate(cond) - accumulate(uncond), guided - cond
            record.cond_norm, record.update_norm = norm(cond), norm(update)
            record.parallel_share = cosine(difference, cond).square()
            record.scale_factor = _relative(record.update_norm, cond, uncond, scale)
        return views.back(guided, rule.space).to(views.native[0].dtype)

    def _gamma_space(self, level: NoiseLevel | None) -> Space | None:
        """Where the cosine of the two predictions is taken; None: nobody asks for it."""
        policy = self.guidance.policy
        if policy.needs_gamma:
            return policy.space
        if not self.detailed:
            return None
        return "x0" if level is not None else "native"

    def leave(self, prediction: Tensor, x_t: Tensor, level: NoiseLevel | None) -> None:
        """End a step without guidance: whatever was planned, the unconditional branch never came.

        Args:
            prediction: Network output of the conditional branch, with shape (B, \\*); later
                forecasts take it for the guided one.
            x_t: Network input, with shape (B, \\*).
            level: As of `combine`.
        """
        self.trace.steps.append(StepRecord(self.step.index, self.step.noise, []))
        self._check_finite(prediction)
        self._keep_guided(prediction, x_t, level)

    def finish(self) -> None:
        """Raise what was still on its way from the device."""
        self._raise_if_not_finite(self.finite.rest())

    def _estimate(self, pred_cond: Tensor, x_t: Tensor, level: NoiseLevel | None) -> Tensor | None:
        """What stands in for the unconditional network output; None: nothing does."""
        policy = self.guidance.policy
        if not policy.needs_history:
            return None
        if policy.space == "native":
            return self.policy_state.estimate(self.step, pred_cond)
        estimate = self.policy_state.estimate(self.step, level.to_x0(pred_cond, x_t))
        return None if estimate is None else level.from_x0(estimate, x_t).to(pred_cond.dtype)

    @property
    def _keeps_guided(self) -> bool:
        return self.policy_state.wants_guided(self.step)

    def _keep_guided(self, guided: Tensor, x_t: Tensor, level: NoiseLevel | None) -> None:
        if self._keeps_guided:
            native = self.guidance.policy.space == "native"
            kept = guided if native else level.to_x0(guided, x_t)
            self.policy_state.keep_guided(self.step, kept)

    def _state_of(self, index: Tensor | None, pred_cond: Tensor) -> Tensor | None:
        if self.guidance.rule.counts_steps:
            shape, device = (len(pred_cond), 1), pred_cond.device
            return torch.full(shape, self.step.index, dtype=torch.int32, device=device)
        if index is None or self.rule_state is None:
            return self.rule_state
        return self.rule_state[index]

    def _keep_state(self, state: Tensor | None, index: Tensor | None) -> None:
        if state is None or index is None:
            self.rule_state = state
            return
        if self.rule_state is None:
            self.rule_state = state.new_zeros(self.batch, *state.shape[1:])
        self.rule_state = self.rule_state.index_copy(0, index, state)

    def _check_finite(self, *predictions: Tensor) -> None:
        flags = [torch.isfinite(prediction).all() for prediction in predictions]
        self._push_finite(torch.stack(flags).all())

    def _push_finite(self, finite: Tensor) -> None:
        self.finite.push(self.step.index, self.step.index, finite)
        self._raise_if_not_finite(self.finite.due(self.step.index + 1))

    def _raise_if_not_finite(self, values) -> None:
        for step, finite in values:
            if not finite:
                raise NonFinitePredictionError(
                    f"the network's prediction is not finite (NaN or infinity) at step {step} of "
                    f"{self.total}, counted from 0; in fp16, try bfloat16 or float32"
                )


class _Views:
    """The two predictions in either space, converted at most once."""

    def __init__(self, cond: Tensor, uncond: Tensor, x_t: Tensor, level: NoiseLevel | None) -> None:
        self.native, self.x_t, self.level = (cond, uncond), x_t, level
        self.x0: tuple[Tensor, Tensor] | None = None

    def pair(self, space: Space) -> tuple[Tensor, Tensor]:
        if space == "native":
            return self.native
        if self.x0 is None:
            if self.level is None:
                raise ValueError("denoised images need the noise level of the scheduler")
            self.x0 = tuple(self.level.to_x0(pred, self.x_t) for pred in self.native)
        return self.x0

    def back(self, guided: Tensor, space: Space) -> Tensor:
        return guided if space == "native" else self.level.from_x0(guided, self.x_t)


def _relative(update_norm: Tensor, cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """An update in units of plain guidance's, shape (B,)."""
    plain = (scale - 1) * norm(accumulate(cond) - accumulate(uncond))
    return update_norm / plain.where(plain > 0, 1)


def _fill(base: Tensor, values: Tensor, index: Tensor | None) -> Tensor:
    """`base` with `values` at `index` (everywhere if None)."""
    return values if index is None else base.index_copy(0, index, values)
