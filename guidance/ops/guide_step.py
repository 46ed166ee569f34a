"""The guidance step: the rule, and what is measured on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import Space, accumulate, cosine
from .solver import Impl, fused_by_default


class GuideStep(NamedTuple):
    """The result of `guide_step`; what was not asked for is None, but for the state.

    Args:
        prediction: The guided prediction, with shape (B, \\*) and the network's dtype.
        state: The rule's new state; without a prediction, the one given.
        gamma: Cosine of the two predictions, with shape (B,), at least float32.
        update: Guided minus conditional prediction in the rule's space, with shape (B, \\*).
        finite: Whether all predictions are finite, a 0-d tensor, where the kernel tells.
    """

    prediction: Tensor | None = None
    state: Tensor | None = None
    gamma: Tensor | None = None
    update: Tensor | None = None
    finite: Tensor | None = None


def guide_step(
    rule: Rule,
    predictions: Predictions,
    step: Step,
    w: float | Tensor,
    state: Tensor | None = None,
    *,
    gamma_space: Space | None = None,
    want_prediction: bool = True,
    want_update: bool = False,
    impl: Impl | None = None,
) -> GuideStep:
    """Guide a step's predictions, and measure what policies and traces ask for.

    `Rule.combine` defines the result. A Triton kernel computes the same in float32, in one launch
    for up to 65536 elements a sample and two above, for the rules in `guide_launch.KERNELS`; where
    there are several samples, one more joins their flags to `finite`.

    Args:
        rule: The rule.
        predictions: Of the conditional and the unconditional branch. They may be views, such as
            the two halves of one batched output, in any order of dimensions.
        step: Where the run is.
        w: Guidance scale; see `Rule.combine`.
        state: The `state` of the last guided step of these samples; None at the first.
        gamma_space: Where the cosine of the two predictions is taken; None: not at all.
        want_prediction: Whether to return the guided prediction and the new state.
        want_update: Whether to return the update (eager only).
        impl: "reference" (eager PyTorch), "fused" (Triton) or None: fused for CUDA tensors where
            Triton is installed, the rule has a kernel and no gradient is needed.

    Raises:
        ValueError: `impl` is unknown, or "fused" and there is no kernel for this.
    """
    if impl not in (None, "reference", "fused"):
        raise ValueError(f"guide_step: impl is 'reference' or 'fused', got {impl!r}")
    cond, uncond = predictions.native["cond"], predictions.native["uncond"]
    if impl != "reference" and (impl == "fused" or _prefers_kernel(cond, uncond, w, want_update)):
        from .guide_launch import has_kernel, launch

        if has_kernel(rule, step) and not want_update:
            with torch.cuda.device_of(cond):  # Triton launches on the current device
                done = launch(rule, predictions, step, w, state, gamma_space, want_prediction)
            return GuideStep(*done[1:], finite=done[0])
        if impl == "fused":
            raise ValueError(f"there is no fused kernel for {rule} at this step")
    gamma = None if gamma_space is None else cosine(*predictions.pair(gamma_space))
    prediction = update = None
    if want_prediction or want_update:
        guided, state = _checked(rule, rule.combine(predictions, step, w, state), cond)
        if want_prediction:
            prediction = predictions.to_native(guided, rule.space)
        if want_update:
            update = accumulate(guided) - accumulate(predictions.get("cond", rule.space))
    return GuideStep(prediction, state, gamma, update)


def _checked(rule: Rule, made: Any, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a rule's `combine` returned, if it is what it should be."""
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Tensor)):
        name = _name(rule)
        raise TypeError(f"{name} returns the guided prediction and a state, got {type(made)}")
    guided, state = made
    if guided.shape != like.shape:
        shapes = tuple(guided.shape), tuple(like.shape)
        raise ValueError(
            f"{_name(rule)} returned a prediction of shape {shapes[0]}, expected {shapes[1]}"
        )
    if state is not None and not (
        isinstance(state, Tensor) and state.ndim > 0 and state.shape[0] == like.shape[0]
    ):
        raise ValueError(
            f"{_name(rule)} returned a state that is no tensor of shape ({len(like)}, *)"
        )
    return guided, state


def _name(rule: Rule) -> str:
    return f"{type(rule).__name__}.combine"


def _prefers_kernel(cond: Tensor, uncond: Tensor, w: float | Tensor, want_update: bool) -> bool:
    """Under torch.compile the eager form is inlined, so that Inductor fuses it with the rest."""
    scalar = not isinstance(w, Tensor) or (w.ndim == 0 and not w.requires_grad)
    return (
        cond.is_cuda
        and scalar
        and not want_update
        and not torch.compiler.is_compiling()
        and fused_by_default(cond, uncond)
    )
