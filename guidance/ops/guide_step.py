"""The guidance step: one read for every scalar, one more read and one write for the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base import Rule
from ..prediction import NoiseLevel, Space
from . import reference
from .formulas import settings_of
from .inputs import GuideStep, Request
from .solver import Impl, SolverStep, fused_by_default


def guide_step(
    pred_cond: Tensor,
    pred_uncond: Tensor,
    guidance_scale: float,
    rule: Rule,
    *,
    x_t: Tensor | None = None,
    level: NoiseLevel | None = None,
    state: Tensor | None = None,
    gamma_space: Space | None = None,
    want_prediction: bool = True,
    want_norms: bool = False,
    want_finite: bool = False,
    solver: SolverStep | None = None,
    previous: Tensor | None = None,
    want_denoised: bool = False,
    copies: int = 0,
    impl: Impl | None = None,
) -> GuideStep:
    """Guide a prediction, measure it, and optionally take the solver step.

    Tensors are read where they lie: the predictions may be the two halves of one batched output
    (``uncond, cond = preds.chunk(2)``) or a slice of its channels, in any order of dimensions.

    Args:
        pred_cond: Network output of the conditional branch, with shape (B, \\*), floating.
        pred_uncond: Network output of the unconditional branch, likewise.
        guidance_scale: w; 1 means no guidance.
        rule: One of `formulas.RULES`; it acts in its own space.
        x_t: What `level` belongs to: the network's input; with a solver step, the sample. Not
            needed in the native space.
        level: Noise level of `x_t`; its alpha and sigma may be 0-d tensors on the device. None:
            D is computed with the solver step's d_x and d_p.
        state: The `state` of the previous guided step of these samples; None at the first.
        gamma_space: Where the cosine of the two predictions is taken; None: not at all.
        want_prediction: Whether to return the guided prediction.
        want_norms: Whether to return `cond_norm`, `update_norm` and `parallel_share`.
        want_finite: Whether to return `finite`.
        solver: The step to take from `x_t`, in float32 from the unrounded guided prediction.
        previous: D of the step before, with shape (B, \\*), for the steps that use it.
        want_denoised: Whether to return D of this step (with a solver step).
        copies: How often to write the next network input (with a solver step): 0, 1, or 2 for
            networks that evaluate both branches in one batch.
        impl: "reference" (eager PyTorch), "fused" (Triton: one launch for up to 65536 elements per
            sample, two above) or None: fused for CUDA tensors where Triton is installed and no
            gradient is needed. The fused step computes in float32.

    Raises:
        ValueError: the rule has no formula here, shapes disagree, or an argument is missing.
    """
    if impl not in (None, "reference", "fused"):
        raise ValueError(f"guide_step: impl is 'reference' or 'fused', got {impl!r}")
    a_x, a_p = 0.0, 1.0
    images = rule.space == "x0" or gamma_space == "x0"
    if images:
        if level is not None:
            a_x, a_p = level.coefficients()
        elif solver is not None:
            a_x, a_p = solver.d_x, solver.d_p
        else:
            raise ValueError("guide_step: denoised images need the noise level, got None")
    request = Request(
        rule.name,
        settings_of(rule, math.prod(pred_cond.shape[1:])),
        guidance_scale,
        rule.space == "x0",
        pred_cond,
        pred_uncond,
        x_t if images or solver is not None else None,
        a_x,
        a_p,
        state if rule.name in ("apg", "cfg-zero*") else None,
        gamma_space,
        want_prediction,
        want_norms,
        want_finite,
        want_denoised,
        solver,
        previous if solver is not None and solver.has_previous else None,
        copies,
    )
    if torch.compiler.is_compiling():
        from .registration import guide_step_op

        return guide_step_op(request, impl)
    return run(request, impl)


def run(request: Request, impl: Impl | None) -> GuideStep:
    """Take the step directly, without PyTorch's dispatcher."""
    # Not on the CPU where alpha and sigma may be learned.
    if request.pred_cond.is_cuda or not torch.is_grad_enabled():
        request.a_x, request.a_p = _number(request.a_x), _number(request.a_p)
    if impl is None:
        given = (request.pred_cond, request.pred_uncond, request.x_t, request.previous)
        tensors = [tensor for tensor in given if tensor is not None]
        impl = "fused" if fused_by_default(*tensors) else "reference"
    if impl == "reference":
        return reference.guide_step(request)
    from .guide_launch import launch

    with torch.cuda.device_of(request.pred_cond):  # Triton launches on the current device
        return launch(request)


def _number(coefficient: float | Tensor) -> float | Tensor:
    """What the host knows is passed as a number."""
    known = isinstance(coefficient, Tensor) and coefficient.device.type == "cpu"
    return coefficient.item() if known else coefficient
