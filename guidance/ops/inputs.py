"""What a guidance step is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..prediction import Space
from .formulas import Settings
from .solver import SolverStep


class GuideStep(NamedTuple):
    """The result of `guide_step`; what was not asked for is None.

    Args:
        prediction: The guided prediction, with shape (B, \\*) and the network's dtype.
        state: The rule's new state: APG's momentum buffer with shape (B, \\*) in float32 (None
            without momentum), CFG-Zero*'s steps done with shape (B, 1).
        gamma: Cosine of the two predictions, with shape (B,), as the following ones in float32.
        cond_norm: L2 norm of the conditional prediction in the rule's space.
        update_norm: L2 norm of guided minus conditional prediction in the rule's space. It follows
            from inner products: of an update that the rule removes, rounding may leave 5e-4.
        parallel_share: Share, from 0 to 1, of the squared update m that lies along the conditional
            prediction, before the rule treats it: :math:`\\cos^2(m, D_c)`.
        finite: 1 where both predictions are finite, else 0.
        denoised: D of the guided prediction, with shape (B, \\*), in float32.
        x_next: The sample after the solver step, with shape (B, \\*) and the dtype of `x_t`.
        next_input: The next network input, `copies` times, with shape (copies * B, \\*) and the
            network's dtype.
    """

    prediction: Tensor | None = None
    state: Tensor | None = None
    gamma: Tensor | None = None
    cond_norm: Tensor | None = None
    update_norm: Tensor | None = None
    parallel_share: Tensor | None = None
    finite: Tensor | None = None
    denoised: Tensor | None = None
    x_next: Tensor | None = None
    next_input: Tensor | None = None


@dataclass(slots=True)  # not frozen: that costs more than the checks
class Request:
    """The checked arguments of `guide_step`; see there and `formulas`."""

    kind: str
    settings: Settings
    guidance_scale: float | Tensor
    in_x0: bool
    pred_cond: Tensor
    pred_uncond: Tensor
    x_t: Tensor | None = None
    a_x: float | Tensor = 0.0
    a_p: float | Tensor = 1.0
    state: Tensor | None = None
    gamma_space: Space | None = None
    want_prediction: bool = True
    want_norms: bool = False
    want_finite: bool = False
    want_denoised: bool = False
    solver: SolverStep | None = None
    previous: Tensor | None = None
    copies: int = 0

    def __post_init__(self) -> None:
        cond = self.pred_cond
        if cond.ndim < 2:
            raise ValueError(f"guide_step: predictions have shape (B, *), got {tuple(cond.shape)}")
        shape = cond.shape
        for name in ("pred_uncond", "x_t", "previous", "state"):
            tensor = getattr(self, name)
            if tensor is None or tensor.shape == shape:
                continue
            if name != "state" or self.momentum != 0:
                raise ValueError(
                    f"guide_step: {name} has shape {tuple(tensor.shape)}, pred_cond {tuple(shape)}"
                )
        steps = (len(cond), 1)
        if self.kind == "cfg-zero*" and self.state is not None and self.state.shape != steps:
            raise ValueError(
                f"guide_step: steps done have shape {tuple(self.state.shape)}, expected {steps}"
            )
        if self.gamma_space not in (None, "x0", "native"):
            raise ValueError(
                f"guide_step: gamma_space is 'x0' or 'native', got {self.gamma_space!r}"
            )
        if self.copies not in (0, 1, 2):
            raise ValueError(f"guide_step: copies is 0, 1 or 2, got {self.copies}")
        if self.x_t is None and self.reads_x:
            raise ValueError("guide_step: denoised images and solver steps need x_t, got None")
        if self.solver is None and (self.want_denoised or self.copies):
            raise ValueError("guide_step: denoised and next_input need a solver step, got None")
        if self.solver is not None and self.solver.has_previous and self.previous is None:
            raise ValueError("the solver step uses the denoised image of the step before, got None")

    @property
    def momentum(self) -> float:
        """beta of APG, 0 for other rules."""
        return self.settings[2] if self.kind == "apg" else 0.0

    @property
    def reads_x(self) -> bool:
        """Whether the result depends on x_t."""
        return self.in_x0 or self.gamma_space == "x0" or self.solver is not None

    @property
    def writes(self) -> bool:
        """Whether the guided prediction is computed, be it for the solver only."""
        return self.want_prediction or self.solver is not None

    @property
    def measures(self) -> bool:
        """Whether a scalar is asked for."""
        return self.gamma_space is not None or self.want_norms or self.want_finite

    @property
    def needs_sums(self) -> bool:
        """Whether the predictions have to be read once before anything can be written."""
        plain = self.kind == "cfg" or (self.kind == "cfg-zero*" and not self.settings[1])
        neutral = self.kind == "apg" and self.settings[:2] == (1.0, 0.0)
        return self.measures or not (plain or neutral)

    def inverse(self) -> float | Tensor:
        """1 / a_p; 0 for a_p = 0, where a denoised image says nothing of a prediction."""
        if isinstance(self.a_p, Tensor):
            return torch.where(self.a_p == 0, 0, 1 / self.a_p)
        return 1 / self.a_p if self.a_p != 0 else 0.0
