"""What a guidance rule is: how the conditional and unconditional predictions combine."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .prediction import Space

if TYPE_CHECKING:
    from .composition import Guidance
    from .policy import Policy


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
        from .composition import Guidance

        return Guidance(self, policy)
