"""What guidance is made of: rules, policies, the two together, and the steps of a run.

A *rule* says how the predictions of the branches combine; a *policy* says which branches are
evaluated at a step. Both are frozen dataclasses of their settings and hold no state of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from .prediction import Factor, NoiseLevel, Space, accumulate, add_scaled, check_space, inverse

Kind = Literal["cond", "uncond", "guided"]
"""What can be kept of a step: the prediction of a branch, or the guided one."""


@dataclass(frozen=True)
class Step:
    """Where a run is, as far as rules and policies may know.

    Args:
        index: Network evaluation within the run, from 0.
        total: Number of network evaluations of the run.
        level: Noise level of the network's input, with what the network predicts; None where
            neither rule nor policy asked for it.
        next_level: Noise level that the solver goes to; None likewise.
        x_t: The network's input, with shape (B, \\*): for rules, as far as its channels are guided.
    """

    index: int
    total: int
    level: NoiseLevel | None = None
    next_level: NoiseLevel | None = None
    x_t: Tensor | None = None

    def known(self) -> tuple[NoiseLevel, Tensor]:
        """Noise level and network's input, for rules on denoised images.

        Raises:
            ValueError: they are not known.
        """
        if self.level is None or self.x_t is None:
            raise ValueError("denoised images need the noise level of the scheduler and x_t")
        return self.level, self.x_t

    def levels(self) -> tuple[NoiseLevel, NoiseLevel]:
        """Noise levels now and next, for rules with `Rule.needs_next_level`.

        Raises:
            ValueError: they are not known.
        """
        if self.level is None or self.next_level is None:
            raise ValueError(f"the noise levels of step {self.index} are not known")
        return self.level, self.next_level


class Predictions:
    """The predictions of a step's branches by name, in either space, converted at most once.

    Args:
        native: Name of a branch -> the network's output, with shape (B, \\*).
        step: Gives the noise level and x_t by which they are converted.
    """

    def __init__(self, native: Mapping[str, Tensor], step: Step) -> None:
        self.native, self.step = dict(native), step
        self._x0: dict[str, Tensor] = {}
        self._affine: tuple[Tensor, Factor] | None = None  # a_x * x_t and a_p

    def get(self, branch: str, space: Space) -> Tensor:
        """The prediction of one branch, with shape (B, \\*).

        Args:
            branch: "cond", "uncond", or the name of a further branch.
            space: "native" is the network's output in its own dtype; "x0" the denoised image, in
                float32 (float64 if the output is).

        Raises:
            ValueError: there is no such branch, or the noise level is not known.
        """
        if branch not in self.native:
            raise ValueError(f"no branch {branch!r}: this step has {', '.join(self.native)}")
        if space == "native":
            return self.native[branch]
        if branch not in self._x0:
            share, a_p = self._known()
            self._x0[branch] = add_scaled(share, accumulate(self.native[branch]), a_p)
        return self._x0[branch]

    def pair(self, space: Space) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional prediction; see `get`."""
        return self.get("cond", space), self.get("uncond", space)

    def to_native(self, prediction: Tensor, space: Space) -> Tensor:
        """A prediction made in `space` as a network's output, in the dtype of these.

        Where a denoised image says nothing of the output (sigma = 0), it is the conditional one.
        """
        cond = self.native["cond"]
        if space == "x0":
            moved = prediction - self.get("cond", "x0")
            prediction = add_scaled(accumulate(cond), moved, inverse(self._known()[1]))
        return prediction if prediction.dtype == cond.dtype else prediction.to(cond.dtype)

    def _known(self) -> tuple[Tensor, Factor]:
        """What x_t says of every denoised image, and the factor of the prediction in it."""
        if self._affine is None:
            level, x_t = self.step.known()
            a_x, a_p = level.coefficients()
            self._affine = a_x * accumulate(x_t), a_p
        return self._affine


class Rule:
    """Base of all rules. Subclasses are frozen dataclasses of their settings.

    A rule is pure: it reads the predictions, the step, the scale and its own state, and returns
    the guided prediction and the new state. It knows neither the policy nor a pipeline.

    Attributes:
        name: The name by which ``pipe(..., guidance=name)`` finds the rule; see `register`.
        space: Where the rule acts, and what `combine` returns: denoised images ("x0") or raw
            network outputs ("native").
        needs_next_level: Whether the rule reads `Step.levels`. It is then refused on solvers other
            than Euler and DDIM without added noise, whose steps lead from one level to the next.
        is_pipelines_own: Whether `combine` is what every pipeline does itself: `CFG` alone.
        one_branch: Whether the rule changes the guided prediction, whatever made it, and so works
            where a pipeline evaluates one branch, too: `combine` is then given that prediction as
            both, at w = 1.
    """

    name: ClassVar[str]
    space: Space = "native"
    needs_next_level: ClassVar[bool] = False
    is_pipelines_own: ClassVar[bool] = False
    one_branch: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = next((base for base in cls.__mro__ if vars(base).get("is_pipelines_own")), None)
        if (
            own is not None and cls.combine is not vars(own)["combine"]
        ):  # a rule derived from CFG combines in its own way
            cls.is_pipelines_own = False

    @property
    def needs_flow(self) -> bool:
        """Whether the rule makes sense for networks that predict a flow velocity only."""
        return False

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction and the new state.

        Args:
            predictions: Of every branch, each with shape (B, \\*):
                ``cond, uncond = predictions.pair(self.space)``.
            step: Where the run is.
            w: Guidance scale for this step; 1 means no guidance. A number, a 0-d tensor if
                gradients are to flow through it, or a tensor of shape (B, 1, ...) where samples
                have different ones.
            state: What the last guided step returned for these samples, with shape (B, \\*); None
                at the first one, 0 for a sample that is guided later than its batch mates.

        Returns:
            The guided prediction, with shape (B, \\*), in the rule's space, float32 or the
            predictions' dtype; and what the next step is to be given, with shape (B, \\*), or None.
        """
        raise NotImplementedError

    def __or__(self, policy: Policy) -> Guidance:
        return Guidance(self, policy)


@dataclass(frozen=True)
class Weights:
    """A weighted sum of past predictions.

    Args:
        cond: Step -> weight of the conditional prediction of that step.
        uncond: Step -> weight of the unconditional prediction of that step, or of its estimate.
        guided: Step -> weight of the guided prediction of that step.
    """

    cond: Mapping[int, float] = field(default_factory=dict)
    uncond: Mapping[int, float] = field(default_factory=dict)
    guided: Mapping[int, float] = field(default_factory=dict)

    def terms(self) -> list[tuple[Kind, int, float]]:
        """(kind, step, weight) of everything whose weight is not 0."""
        kinds: tuple[tuple[Kind, Mapping[int, float]], ...] = (
            ("cond", self.cond),
            ("uncond", self.uncond),
            ("guided", self.guided),
        )
        return [(kind, i, w) for kind, of in kinds for i, w in of.items() if w != 0]


Kept = Mapping[tuple[Kind, int], Tensor]
"""(kind, step) -> what a run keeps of it, with shape (B, \\*), in the policy's space."""


@dataclass(frozen=True)
class Decision:
    """What one sample does at one step.

    Args:
        evaluate: The branches that are evaluated: ("cond", "uncond"), ("cond",), or () for a
            skipped step.
        factor: What w - 1 is multiplied with; a 0-d tensor if gradients are to flow through it.
        reuse: Weights of past predictions. Beside ("cond",) the sum is the *estimate* of the
            unconditional prediction; None: the conditional one stands alone. At a skipped step the
            sum is the guided prediction. Beside both branches it is a *correction*: the sum,
            which has the guided prediction of this step among its terms, takes the place of that
            prediction. A function is given what the run keeps when the sum is needed, the
            predictions of this step that it is made of included.
    """

    evaluate: tuple[str, ...] = ("cond", "uncond")
    factor: float | Tensor = 1.0
    reuse: Weights | Callable[[Kept], Weights] | None = None

    def __post_init__(self) -> None:
        if self.evaluate not in (("cond", "uncond"), ("cond",), ()):
            raise ValueError(
                f"a sample evaluates ('cond', 'uncond'), ('cond',) or (), got {self.evaluate!r}"
            )
        if not (self.reuse is None or isinstance(self.reuse, Weights) or callable(self.reuse)):
            raise TypeError(f"reuse is Weights, a function or None, got {self.reuse!r}")
        if self.reuse is None and self.skips:
            raise ValueError("a skipped step reuses past predictions: give it weights")
        summed = self.reuse.terms() if self.corrects and isinstance(self.reuse, Weights) else ()
        if any(kind != "guided" for kind, _, _ in summed):
            raise ValueError("a correction is a sum of guided predictions")

    @property
    def skips(self) -> bool:
        """Whether nothing is evaluated."""
        return not self.evaluate

    @property
    def estimates(self) -> bool:
        """Whether the unconditional prediction is estimated."""
        return self.evaluate == ("cond",) and self.reuse is not None

    @property
    def corrects(self) -> bool:
        """Whether the guided prediction is corrected."""
        return "uncond" in self.evaluate and self.reuse is not None

    @property
    def scales(self) -> bool:
        """Whether the guidance scale is changed."""
        return isinstance(self.factor, Tensor) or self.factor != 1


BOTH = Decision()
COND = Decision(("cond",))


class PolicyState:
    """What a policy remembers during one run.

    Attributes:
        settled: Whether all is decided: from the step decided last on, every sample evaluates its
            conditional branch alone, and nothing is kept or observed any more.
    """

    settled: bool = False

    def decide(self, step: Step) -> Sequence[Decision]:
        """What every sample does at this step, B decisions."""
        raise NotImplementedError

    def keep_until(self, kind: Kind, step: int) -> int:
        """The last step that reuses the prediction `kind` of `step`; -1: none does."""
        return -1

    def observe(self, step: Step, rows: Sequence[int], gamma: Tensor | None, kept: Kept) -> None:
        """Look at a step at its end; called after every step with a guided sample.

        Args:
            step: The step just evaluated.
            rows: The samples that were guided, by predictions or estimates.
            gamma: Cosine of conditional and unconditional prediction in the policy's space, with
                shape (len(rows),), on the network's device; None unless `Policy.needs_gamma`.
            kept: The predictions that `keep_until` has asked for so far.
        """


class Policy:
    """Base of all policies. Subclasses are frozen dataclasses of their settings.

    Attributes:
        name: The name by which ``pipe(..., guidance=name)`` finds the policy; see `register`.
        needs_gamma: Whether `PolicyState.observe` wants the cosine of the two predictions.
        identity: What the policy's settings were fitted on; None: they hold anywhere.
    """

    name: ClassVar[str]
    needs_gamma: ClassVar[bool] = False
    identity: Mapping[str, Any] | None = None

    @property
    def space(self) -> Space | None:
        """The space in which predictions are compared or kept; None: the policy reads none."""
        return None

    @property
    def needs_noise(self) -> bool:
        """Whether the policy reads `Step.level`."""
        return False

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """A fresh state for a run of `batch` samples and `total` steps.

        Args:
            batch: Number of samples, B.
            total: Number of network evaluations.
            on_cpu: Whether predictions lie on the CPU, where values are read at once.

        Raises:
            ValueError: the settings do not fit a run of that length.
        """
        raise NotImplementedError

    def decisions(self, total: int) -> Sequence[Decision] | None:
        """Every decision that a run of `total` steps may take; None: not known beforehand.

        What cannot be combined with a pipeline's options is refused before the first step by this;
        what is not known beforehand, at the step where it happens.
        """
        return None

    @property
    def identities(self) -> tuple[Mapping[str, Any], ...]:
        """What the policy and what it is made of were fitted on."""
        return () if self.identity is None else (self.identity,)

    def __ror__(self, rule: Rule) -> Guidance:
        return Guidance(rule, self)


class Fill:
    """Base of what fills in for predictions that are not evaluated. Frozen dataclasses, too.

    The estimate of an unconditional prediction, the guided prediction of a skipped step, and what
    corrects that of an evaluated one are each one weighted sum; a fill names the weights.

    Attributes:
        name: The name in saved settings.
        space: The space of the predictions that are summed.
        identity: What the weights were fitted on; None: they hold anywhere.
    """

    name: ClassVar[str]
    space: Space = "native"
    identity: Mapping[str, Any] | None = None

    def estimate(self, step: int, evaluated: Sequence[int]) -> Weights:
        """The sum that estimates the unconditional prediction of `step`.

        Args:
            step: Network evaluation within the run, from 0.
            evaluated: The earlier steps at which both branches were evaluated, ascending.

        Raises:
            ValueError: this step cannot be estimated.
        """
        raise NotImplementedError

    def reused(self, step: int, evaluated: Sequence[int]) -> Weights:
        """The sum of guided predictions that `step`, which is skipped, takes for its own.

        Args:
            step: Step within the run, from 0.
            evaluated: The earlier steps that were not skipped themselves, ascending.

        Raises:
            ValueError: this step cannot be skipped.
        """
        raise NotImplementedError

    def corrected(self, step: int) -> Weights | None:
        """The sum of guided predictions that takes the place of that of `step`, which is evaluated.

        Args:
            step: Step within the run, from 0; its own prediction is among the terms.

        Returns:
            None: the step keeps its prediction as it is.
        """
        return None

    def check_total(self, total: int) -> None:
        """Refuse runs of a length that the weights do not fit.

        Raises:
            ValueError: `total` network evaluations are not what they were made for.
        """


class SameForAll(PolicyState):
    """The same decision for every sample.

    Args:
        batch: Number of samples.
        of: Step -> its decision.
    """

    def __init__(self, batch: int, of: Callable[[Step], Decision]) -> None:
        self.batch, self.of = batch, of

    def decide(self, step: Step) -> Sequence[Decision]:
        """See `PolicyState`."""
        return [self.of(step)] * self.batch


@dataclass(frozen=True)
class Always(Policy):
    """Both branches at every step: ordinary guidance."""

    name: ClassVar[str] = "always"

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """A state that evaluates both branches of every sample."""
        return SameForAll(batch, lambda step: BOTH)

    def decisions(self, total: int) -> Sequence[Decision]:
        """Both branches."""
        return (BOTH,)


@dataclass(frozen=True)
class Guidance:
    """How predictions combine, and which of them are evaluated.

    Written ``APG(...) | AdaptiveGuidance(...)``, or as a name such as "apg+ag".

    Args:
        rule: Combines the predictions.
        policy: Says which branches are evaluated at a step; both at every step by default.

    Raises:
        TypeError: a part is not what it should be.
        ValueError: a space is unknown, or the policy wants cosines and has no space for them.
    """

    rule: Rule
    policy: Policy = field(default_factory=Always)

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"not a guidance rule: {self.rule!r}")
        if not isinstance(self.policy, Policy):
            raise TypeError(f"not an evaluation policy: {self.policy!r}")
        check_space(type(self.rule).__name__, self.rule.space)
        if self.policy.space is not None or self.policy.needs_gamma:
            check_space(type(self.policy).__name__, str(self.policy.space))

    def __or__(self, policy: Policy) -> Guidance:
        if not isinstance(self.policy, Always):
            raise TypeError(f"{self} already has the policy {self.policy}")
        return replace(self, policy=policy)

    @property
    def is_plain(self) -> bool:
        """Whether this is classifier-free guidance at every step, the pipelines' own."""
        return self.keeps_combination and isinstance(self.policy, Always)

    @property
    def keeps_combination(self) -> bool:
        """Whether predictions are combined as the pipeline does it."""
        return self.rule.is_pipelines_own

    @property
    def policy_alone(self) -> bool:
        """Whether there is something to do where a pipeline evaluates one branch.

        Skipping steps, and what rules for one branch do; plain guidance included, which does
        nothing.
        """
        own = self.keeps_combination or self.rule.one_branch
        return own and not self.policy.needs_gamma

    @property
    def needs_level(self) -> bool:
        """Whether the scheduler's noise levels are needed."""
        return (
            "x0" in (self.rule.space, self.policy.space)
            or self.policy.needs_noise
            or self.rule.needs_next_level
        )

    def combines(self, decisions: Iterable[Decision]) -> bool:
        """Whether it combines predictions otherwise than the pipeline does, at one of `decisions`.

        A skipped step combines nothing: it reuses what the pipeline made.
        """
        return not self.keeps_combination or any(
            d.estimates or d.corrects or d.scales for d in decisions
        )

    def check_decisions(self, decisions: Sequence[Decision]) -> None:
        """Refuse decisions that the rule has no meaning for.

        Raises:
            ValueError: the rule sets the scale of a step by its noise levels, and the policy
                changes that scale or reuses what belongs to another step's.
        """
        if self.rule.needs_next_level and any(d.skips or d.corrects or d.scales for d in decisions):
            raise ValueError(
                f"'{self.rule}' sets its own scale at every step: it goes with policies that leave "
                "branches out, not with scaled, corrected or skipped steps"
            )

    def __str__(self) -> str:
        return str(self.rule) if isinstance(self.policy, Always) else f"{self.rule} | {self.policy}"
