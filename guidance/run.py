"""The state of one run: made at its first step, dropped at its end."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .base import (
    COND,
    Decision,
    Guidance,
    Kept,
    Kind,
    PolicyState,
    Predictions,
    Step,
    Weights,
)
from .device import LaggedReads, row_index
from .ops import guide_step
from .prediction import NoiseLevel, Space, accumulate, norm, sum_of
from .trace import StepRecord, Trace

KINDS: dict[Kind, str] = {"cond": "conditional", "uncond": "unconditional", "guided": "guided"}


@dataclass(frozen=True)
class Plan:
    """What the decisions of a step come to: its samples, ascending.

    Args:
        decisions: One for every sample.
        rows: Whose both branches are evaluated.
        skipped: That evaluate nothing.
        estimated: Whose unconditional prediction is an estimate.
        guided: That are guided, by predictions or estimates.
        corrected: Whose guided prediction is corrected.
        scaled: Whether w is changed for one of them.
    """

    decisions: Sequence[Decision] = ()
    rows: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    estimated: list[int] = field(default_factory=list)
    guided: list[int] = field(default_factory=list)
    corrected: list[int] = field(default_factory=list)
    scaled: bool = False

    @classmethod
    def of(cls, decisions: Sequence[Decision], one_branch: bool = False) -> Plan:
        """The plan of some decisions; of one branch, nothing is guided."""
        listed = list(enumerate(decisions))
        both = [row for row, d in listed if "uncond" in d.evaluate and not one_branch]
        estimated = [row for row, d in listed if d.estimates and not one_branch]
        guided = sorted([*both, *estimated])
        return cls(
            list(decisions),
            both,
            [row for row, d in listed if d.skips],
            estimated,
            guided,
            [row for row, d in listed if d.corrects],
            any(decisions[row].scales for row in guided),
        )


NOTHING = Plan()


class NonFinitePredictionError(FloatingPointError):
    """The network returned NaN or infinity, or a rule made it."""


class Run:
    """Applies one `Guidance` along one trajectory of a batch.

    Args:
        guidance: Rule and policy.
        batch: Number of samples, B.
        total: Number of network evaluations planned.
        on_cpu: Whether the predictions live on the CPU (device values are then read at once).
        detailed: Record cosines and norms at every step.
        one_branch: The pipeline evaluates the conditional branch alone, guided by its own means or
            not at all: all that a policy can do is to skip steps, and rules work only if they are
            for one branch.

    Each step is `plan`, which says what to evaluate, then `combine`. Skipped samples take part in
    `combine` with what `reused` gives for them; where all are skipped, it alone ends the step.

    Attributes:
        branches: How many branches a step has.
        step: The step begun last.
    """

    def __init__(
        self,
        guidance: Guidance,
        batch: int,
        total: int,
        on_cpu: bool,
        detailed: bool = False,
        one_branch: bool = False,
    ) -> None:
        self.guidance, self.batch, self.total, self.detailed = guidance, batch, total, detailed
        guidance.check_decisions(guidance.policy.decisions(total) or ())
        self.policy_state = guidance.policy.start(batch, total, on_cpu)
        self.rule_state: Tensor | None = None
        self.kept: dict[tuple[Kind, int], Tensor] = {}
        self.kept_rows: dict[tuple[Kind, int], set[int]] = {}  # samples that it is really of
        self.finite = LaggedReads(0 if on_cpu else 1)
        self.trace = Trace(batch)
        self.step = Step(-1, total)
        self.every = list(range(batch))
        self.one_branch, self.branches = one_branch, 2
        self.now = self.last_plan = NOTHING
        state = type(self.policy_state)
        self.reuses = state.keep_until is not PolicyState.keep_until
        self.observes = state.observe is not PolicyState.observe

    @property
    def decisions(self) -> Sequence[Decision]:
        """What every sample does at the step planned last."""
        return self.now.decisions

    @property
    def rows(self) -> list[int]:
        """The samples whose both branches are to be evaluated at it."""
        return self.now.rows

    @property
    def skipped(self) -> list[int]:
        """The samples that evaluate nothing at it."""
        return self.now.skipped

    def plan(
        self,
        x_t: Tensor | None = None,
        level: NoiseLevel | None = None,
        next_level: NoiseLevel | None = None,
    ) -> list[int]:
        """Begin a step: the samples whose unconditional branch is to be evaluated.

        Args:
            x_t: The network's input, with shape (B, \\*); may be None if nobody reads it.
            level: Noise level of `x_t`; may be None if ``guidance.needs_level`` is False.
            next_level: Noise level that the solver goes to, for rules that need it.
        """
        self.begin(x_t, level, next_level)
        decisions, before = self.policy_state.decide(self.step), self.last_plan.decisions
        if self.one_branch:
            decisions = [d if d.skips or d.corrects else COND for d in decisions]
        if len(decisions) != len(before) or not all(map(operator.is_, decisions, before)):
            self.last_plan = self._checked(decisions)  # mostly it is what was decided last
        self.now = self.last_plan
        return self.now.rows

    def _checked(self, decisions: Sequence[Decision]) -> Plan:
        """The plan of decisions, if they are what they should be."""
        whole = len(decisions) == self.batch
        if not whole or not all(isinstance(d, Decision) for d in decisions):
            raise ValueError(
                f"'{self.guidance.policy}' has to decide for {self.batch} samples at step "
                f"{self.step.index}, got {decisions!r}"
            )
        self.guidance.check_decisions(decisions)
        plan = Plan.of(decisions, self.one_branch)
        if self.guidance.rule.one_branch and 0 < len(plan.skipped) < self.batch and self.one_branch:
            raise ValueError(
                f"'{self.guidance}' skips step {self.step.index} of some samples; where one branch "
                "is evaluated, a rule goes with policies that skip the steps of all"
            )
        return plan

    def begin(
        self,
        x_t: Tensor | None = None,
        level: NoiseLevel | None = None,
        next_level: NoiseLevel | None = None,
    ) -> None:
        """Begin a step without a plan: the pipeline does not guide it. Arguments as of `plan`."""
        index = self.step.index + 1
        if self.finite.queue:
            self._raise_if_not_finite(self.finite.due(index))
        self.step = Step(index, self.total, level, next_level, x_t)
        self.now = NOTHING

    def count(self, prediction: Tensor, branches: int) -> None:
        """Make a whole step, without a plan, that the pipeline makes on its own.

        Args:
            prediction: What the pipeline steps, with shape (B, \\*).
            branches: How many of every sample were evaluated.
        """
        self.begin()
        self.branches, rows = branches, self.every if branches > 1 else []
        self.trace.steps.append(StepRecord(self.step.index, None, rows, branches=branches))
        self._look(sum_of(prediction))

    @property
    def all_skipped(self) -> bool:
        """Whether the step last planned evaluates nothing at all."""
        return len(self.skipped) == self.batch

    def combine(
        self,
        pred_cond: Tensor,
        pred_uncond: Tensor | None,
        w: float | Tensor,
        x_t: Tensor,
        own: Tensor | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """End a step: the guided prediction.

        Args:
            pred_cond: Prediction of the conditional branch, with shape (B, \\*); of skipped
                samples, what `reused` gives.
            pred_uncond: Prediction of the unconditional branch of the samples in `rows`, with shape
                (len(rows), \\*); None if there are none.
            w: The guidance scale; 1 means no guidance. A number, a 0-d tensor, or a tensor that
                broadcasts.
            x_t: The network's input, with shape (B, \\*), as far as it is guided.
            own: What the pipeline itself made of its predictions, with shape (B, \\*), where
                samples that are not guided have what `pred_cond` has for them; None if it made
                nothing. It is the result wherever guidance is the pipeline's own.
            after: What the pipeline does to a guided prediction afterwards, if anything.

        Returns:
            The guided prediction, with shape (B, \\*) and the dtype of `pred_cond`.

        Raises:
            NonFinitePredictionError: the guided prediction is NaN or infinite, as it is if one of
                the predictions is (on other devices than the CPU one step later, or from `finish`).
        """
        now = self.step
        self.step = step = Step(now.index, now.total, now.level, now.next_level, x_t)
        plan, record = self.now, self._record()
        estimated, guided_rows = plan.estimated, plan.guided
        if self._keeps("cond"):
            self._keep("cond", pred_cond, x_t, set(self.every) - set(plan.skipped))
        if not guided_rows:
            self._end(pred_cond, x_t)
            self._forget()
            return pred_cond
        every = len(guided_rows) == self.batch
        index = None if every else row_index(guided_rows, pred_cond.device)
        cond = pred_cond if index is None else pred_cond[index]
        uncond = self._with_estimates(pred_uncond, estimated, guided_rows, pred_cond)
        if index is not None and isinstance(w, Tensor) and w.ndim and len(w) > 1:
            w = w[index]  # a scale for every sample
        if plan.scaled:
            w = 1 + self._factor(guided_rows, cond) * (w - 1)
        if index is not None:
            step = replace(step, x_t=x_t[index])
        predictions = Predictions({"cond": cond, "uncond": uncond}, step)
        keep_own = not plan.scaled and self.guidance.keeps_combination and not estimated
        keep_own = keep_own and own is not None
        result = guide_step(
            self.guidance.rule,
            predictions,
            step,
            w,
            self._state_of(index),
            gamma_space=self._gamma_space,
            want_prediction=not keep_own,
            want_update=self.detailed,
        )
        self._keep_state(result.state, index)
        record.gamma = result.gamma
        if result.update is not None:
            _measure(record, predictions, self.guidance.rule.space, result.update, w)
        if self._keeps("uncond"):
            if index is not None:
                uncond = pred_cond.index_copy(0, index, uncond)
            self._keep("uncond", uncond, x_t, set(guided_rows))
        guided = own if keep_own and own is not None else pred_cond
        if result.prediction is not None:
            guided = result.prediction
            if index is not None:
                guided = pred_cond.index_copy(0, index, guided)
            if after is not None:
                guided = after(guided)
        finite = result.finite if every and not plan.corrected else None
        guided = self._corrected(guided, x_t)
        self._end(guided, x_t, finite)
        if self.observes:
            self.policy_state.observe(self.step, guided_rows, record.gamma, self.kept)
        self._forget()
        return guided

    def reused(self, x_t: Tensor) -> Tensor:
        """Guided predictions of skipped samples; the end of the step if all are skipped.

        Args:
            x_t: What is or would be the network's input, with shape (B, \\*).

        Returns:
            Predictions with shape (B, \\*), of which only those of skipped samples mean anything.
        """
        guided = self._sum_for(self.skipped)
        if self.guidance.policy.space == "x0":
            guided = self._level().from_x0(guided, x_t)
        if self.all_skipped:
            self._record()
            self._end(guided, x_t)
            self._forget()
        return guided

    def unguided(self, prediction: Tensor, x_t: Tensor) -> Tensor:
        """End a step without guidance: whatever was planned, the unconditional branch never came.

        Args:
            prediction: Network output of the conditional branch, with shape (B, \\*); skipped
                steps later take it for the guided one.
            x_t: Network input, with shape (B, \\*).

        Returns:
            The prediction, in a run of one branch what a rule for one branch made of it.
        """
        self.now = replace(NOTHING, decisions=self.now.decisions, corrected=self.now.corrected)
        self._record()
        if self.one_branch and self.guidance.rule.one_branch:
            self.step = step = replace(self.step, x_t=x_t)
            same = Predictions({"cond": prediction, "uncond": prediction}, step)
            result = guide_step(self.guidance.rule, same, step, 1.0, self.rule_state)
            assert result.prediction is not None
            prediction, self.rule_state = result.prediction, result.state
        prediction = self._corrected(prediction, x_t)
        self._end(prediction, x_t)
        self._forget()
        return prediction

    def finish(self) -> None:
        """Raise what was still on its way from the device."""
        self._raise_if_not_finite(self.finite.rest())

    def _record(self) -> StepRecord:
        plan = self.now
        wants_noise = self.guidance.policy.needs_noise or self.detailed
        level = self.step.level if wants_noise else None
        noise = None if level is None else level.ratio
        record = StepRecord(
            self.step.index, noise, plan.rows, plan.skipped, plan.estimated, self.branches
        )
        self.trace.steps.append(record)
        return record

    def _with_estimates(
        self, evaluated: Tensor | None, estimated: list[int], guided: list[int], cond: Tensor
    ) -> Tensor:
        """Unconditional network outputs of the guided samples, with shape (len(guided), \\*)."""
        if not estimated:
            if evaluated is None:
                raise ValueError(f"step {self.step.index} wants the unconditional predictions")
            return evaluated
        estimate = self._sum_for(estimated)
        if self.guidance.policy.space == "x0" and self.step.x_t is not None:
            estimate = self._level().from_x0(estimate, self.step.x_t)
        estimate = estimate.to(cond.dtype)
        if evaluated is not None:
            estimate = estimate.index_copy(0, row_index(self.rows, cond.device), evaluated)
        every = len(guided) == self.batch
        return estimate if every else estimate[row_index(guided, cond.device)]

    def _corrected(self, guided: Tensor, x_t: Tensor) -> Tensor:
        """Guided predictions, with shape (B, \\*), those to be corrected replaced by their sums."""
        rows = self.now.corrected
        if not rows:
            return guided
        self._keep("guided", guided, x_t, set(self.every))
        sums = self._sum_for(rows)
        if self.guidance.policy.space == "x0":
            sums = self._level().from_x0(sums, x_t)
        sums = sums.to(guided.dtype)
        if len(rows) == self.batch:
            return sums
        index = row_index(rows, guided.device)
        return guided.index_copy(0, index, sums[index])

    def _sum_for(self, rows: Sequence[int]) -> Tensor:
        """Weighted sums of what was kept, with shape (B, \\*); those of `rows` mean something."""
        result: Tensor | None = None
        done: set[int] = set()
        for row in rows:
            reuse = self.decisions[row].reuse
            if row in done:
                continue
            same = [r for r in rows if self.decisions[r].reuse is reuse]
            done.update(same)
            weights = reuse(self.kept) if callable(reuse) else reuse
            if not isinstance(weights, Weights):
                raise TypeError(f"what a sample reuses is given as Weights, got {weights!r}")
            sum_ = weighted_sum(weights, self.kept, self.step.index)
            for kind, made, _ in weights.terms():
                if not self.kept_rows[kind, made].issuperset(same):
                    raise ValueError(
                        f"step {self.step.index} needs the {KINDS[kind]} prediction of step {made} "
                        "of a sample that did not evaluate it"
                    )
            if result is None:
                result = sum_
            else:
                index = row_index(same, sum_.device)
                result = result.index_copy(0, index, sum_[index])
        if result is None:
            raise ValueError("no sample reuses anything")
        return result

    def _factor(self, rows: Sequence[int], like: Tensor) -> float | Tensor:
        """What w - 1 is multiplied with."""
        factors = [self.decisions[row].factor for row in rows]
        first = factors[0]
        if all(factor is first for factor in factors) or not any(
            isinstance(factor, Tensor) or factor != first for factor in factors
        ):
            return first
        values = torch.stack([torch.as_tensor(f, dtype=torch.float32) for f in factors])
        return values.to(like.device).view(-1, *(1,) * (like.ndim - 1))

    @property
    def _gamma_space(self) -> Space | None:
        """Where the cosine of the two predictions is taken; None: nobody asks for it."""
        if self.guidance.policy.needs_gamma:
            return self.guidance.policy.space
        if not self.detailed:
            return None
        return "x0" if self.step.level is not None else "native"

    def _level(self) -> NoiseLevel:
        if self.step.level is None:
            raise ValueError("denoised images need the noise level of the scheduler")
        return self.step.level

    def _keeps(self, kind: Kind) -> bool:
        if not self.reuses:
            return False
        last = self.policy_state.keep_until(kind, self.step.index)
        return last >= self.step.index + (kind != "cond")

    def _keep(self, kind: Kind, prediction: Tensor, x_t: Tensor, rows: set[int]) -> None:
        """Keep a prediction, with shape (B, \\*), in the policy's space.

        Args:
            kind: What it is.
            prediction: Network output.
            x_t: Network input.
            rows: The samples whose it is; those of others stand in its place only.
        """
        if self.guidance.policy.space == "x0":
            kept = self._level().to_x0(prediction, x_t)
        else:
            kept = prediction.clone()  # the pipeline may go on using the tensor itself
        self.kept[kind, self.step.index] = kept
        self.kept_rows[kind, self.step.index] = rows

    def _forget(self) -> None:
        """Drop what no later step reuses."""
        index = self.step.index
        for kind, made in list(self.kept) if self.kept else ():
            if self.policy_state.keep_until(kind, made) <= index:
                del self.kept[kind, made], self.kept_rows[kind, made]

    def _state_of(self, index: Tensor | None) -> Tensor | None:
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

    def _end(self, guided: Tensor, x_t: Tensor, finite: Tensor | None = None) -> None:
        """Keep a step's guided prediction, with shape (B, \\*), and see that it is finite."""
        self._look(sum_of(guided) if finite is None else finite)
        if self._keeps("guided"):
            self._keep("guided", guided, x_t, set(self.every))

    def _look(self, finite: Tensor) -> None:
        """See that a step is finite, by a 0-d tensor that is if it is: at once, or later."""
        index = self.step.index
        if not self.finite.lag:
            self._raise_if_not_finite([(index, finite.item())])
            return
        self.finite.push(index, index, finite)
        self._raise_if_not_finite(self.finite.due(index + 1))

    def _raise_if_not_finite(self, values: Iterable[tuple[int, float | bool]]) -> None:
        for step, value in values:
            if not (value if isinstance(value, bool) else math.isfinite(value)):
                raise NonFinitePredictionError(
                    f"a prediction is not finite (NaN or infinity) at step {step} of {self.total}, "
                    "counted from 0: the network's (in fp16, try bfloat16 or float32), or what "
                    f"'{self.guidance}' made of it"
                )


def weighted_sum(weights: Weights, kept: Kept, step: int) -> Tensor:
    """A sum of kept predictions, with shape (B, \\*), in float32 (float64 if they are).

    Args:
        weights: Of the sum.
        kept: What the run keeps.
        step: The step that it is for, named in errors.

    Raises:
        ValueError: a prediction that it needs was never made, or all weights are 0.
    """
    total: Tensor | None = None
    for kind, made, weight in weights.terms():
        if (kind, made) not in kept:
            raise ValueError(
                f"step {step} needs the {KINDS[kind]} prediction of step {made}, which was not "
                "kept: the pipeline did not guide, or the policy's keep_until did not ask for it"
            )
        term = kept[kind, made]
        total = accumulate(term) * weight if total is None else total.add_(term, alpha=weight)
    if total is None:
        raise ValueError(f"step {step} reuses nothing: all weights are 0")
    return total


def _measure(
    record: StepRecord, predictions: Predictions, space: Space, update: Tensor, w: float | Tensor
) -> None:
    """Norms of a step in the rule's space, each with shape (B,)."""
    cond, uncond = predictions.pair(space)
    difference = accumulate(cond) - accumulate(uncond)
    record.cond_norm, record.update_norm = norm(cond), norm(update)
    product = record.cond_norm * norm(difference)
    cosine = (difference * accumulate(cond)).flatten(1).sum(1) / product.where(product > 0, 1)
    record.parallel_share = cosine.square().clamp(max=1)
    plain = norm((w - 1) * difference)
    record.scale_factor = record.update_norm / plain.where(plain > 0, 1)
