"""A rule and a policy together: what ``pipe(..., guidance=...)`` accepts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .cfg import CFG
from .policy import Always, Policy
from .rule import Rule


@dataclass(frozen=True)
class Guidance:
    """How predictions combine, and which of them are evaluated.

    Written ``APG(...) | AdaptiveGuidance(...)``, or as a name such as "apg+ag".

    Args:
        rule: Combines the conditional and the unconditional prediction.
        policy: Says which samples' unconditional branch is evaluated at a step.
    """

    rule: Rule = field(default_factory=CFG)
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
        return isinstance(self.rule, CFG) and isinstance(self.policy, Always)

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
