"""The operations as PyTorch custom ops, for code that is compiled.

Eager code never comes here: it launches directly, which costs less than PyTorch's dispatcher.
"""

import torch
from torch import Tensor

from .guide_step import run as run_step
from .inputs import GuideStep, Request
from .linear_history import run as run_history
from .solver import SolverStep

TENSORS = ("pred_cond", "pred_uncond", "x_t", "state", "previous")
FLAGS = ("in_x0", "want_prediction", "want_norms", "want_finite", "want_denoised")


def guide_step_op(request: Request, impl: str | None) -> GuideStep:
    """A guidance step through ``torch.ops.pilotage.guide_step``."""
    r = request
    results = iter(
        _guide_step(
            *(getattr(r, name) for name in TENSORS),
            r.solver.row if r.solver is not None else None,
            *(_tensor(number) for number in (r.guidance_scale, r.a_x, r.a_p)),
            r.kind,
            list(r.settings),
            r.gamma_space or "",
            *(getattr(r, name) for name in FLAGS),
            r.solver is not None and r.solver.has_previous,
            r.copies,
            impl or "",
        )
    )
    return GuideStep(*(next(results) if given else None for given in _returned(r)))


@torch.library.custom_op("pilotage::guide_step", mutates_args=())
def _guide_step(
    pred_cond: Tensor,
    pred_uncond: Tensor,
    x_t: Tensor | None,
    state: Tensor | None,
    previous: Tensor | None,
    solver: Tensor | None,
    guidance_scale: Tensor,
    a_x: Tensor,
    a_p: Tensor,
    kind: str,
    settings: list[float],
    gamma_space: str,
    in_x0: bool,
    want_prediction: bool,
    want_norms: bool,
    want_finite: bool,
    want_denoised: bool,
    has_previous: bool,
    copies: int,
    impl: str,
) -> list[Tensor]:
    request = Request(
        kind,
        tuple(settings),
        _number(guidance_scale),
        in_x0,
        pred_cond,
        pred_uncond,
        x_t,
        _number(a_x),
        _number(a_p),
        state,
        gamma_space or None,
        want_prediction,
        want_norms,
        want_finite,
        want_denoised,
        None if solver is None else SolverStep(solver, has_previous),
        previous,
        copies,
    )
    result = run_step(request, impl or None)
    # Ops return tensors of their own (the scalars are rows of one) in a known order of dimensions.
    return [t.clone() if t._base is not None else t.contiguous() for t in result if t is not None]


@_guide_step.register_fake
def _(pred_cond, pred_uncond, x_t, state, previous, solver, *settings) -> list[Tensor]:
    kind, numbers, gamma_space, _, prediction, norms, finite, denoised, _, copies, _ = settings[3:]
    shape, batch = pred_cond.shape, pred_cond.shape[0]
    results = [pred_cond.new_empty(shape)] if prediction else []
    if kind == "apg" and numbers[2] != 0:
        results.append(pred_cond.new_empty(shape, dtype=working(pred_cond)))
    if kind == "cfg-zero*":
        results.append(pred_cond.new_empty(batch, 1, dtype=torch.int32))
    scalars = (gamma_space != "") + 3 * norms
    results += [pred_cond.new_empty(batch, dtype=working(pred_cond)) for _ in range(scalars)]
    if finite:
        results.append(pred_cond.new_empty(batch, dtype=torch.float32))
    if denoised:
        results.append(pred_cond.new_empty(shape, dtype=working(x_t)))
    if solver is not None:
        results.append(x_t.new_empty(shape))
    if copies:
        results.append(pred_cond.new_empty(copies * batch, *shape[1:]))
    return results


def working(tensor: Tensor) -> torch.dtype:
    """The precision in which a tensor is worked on."""
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.library.custom_op("pilotage::linear_history", mutates_args=())
def _linear_history(
    history: Tensor, weights: Tensor, dtype: torch.dtype | None, impl: str
) -> Tensor:
    return run_history(history, weights, dtype or history.dtype, impl or None).contiguous()


@_linear_history.register_fake
def _(history: Tensor, weights: Tensor, dtype: torch.dtype | None, impl: str) -> Tensor:
    return history.new_empty(history.shape[1:], dtype=dtype)


def linear_history_op(
    history: Tensor, weights: Tensor, dtype: torch.dtype | None, impl: str | None
) -> Tensor:
    """A weighted sum through ``torch.ops.pilotage.linear_history``."""
    return _linear_history(history, weights, dtype, impl or "")


def _tensor(number: float | Tensor) -> Tensor:
    """Numbers pass as 0-d tensors on the CPU: as floats they would be constants of the graph."""
    if isinstance(number, Tensor):
        return number
    return torch.scalar_tensor(number, dtype=torch.float64)


def _number(tensor: Tensor) -> float | Tensor:
    return tensor.item() if tensor.device.type == "cpu" else tensor


def _returned(r: Request) -> list[bool]:
    """Which fields of the result are there."""
    stepped = r.solver is not None
    has_state = r.momentum != 0 or r.kind == "cfg-zero*"
    norms = [r.want_norms] * 3
    scalars = [r.gamma_space is not None, *norms, r.want_finite]
    return [r.want_prediction, has_state, *scalars, r.want_denoised, stepped, r.copies > 0]
