r"""One step of a sampler as a linear combination, its coefficients on the device.

Euler, DDIM, DPM-Solver++ 2M and flow-matching Euler all have the form

.. math:: x_{next} = c_x \, x_t + c_p \, \mathrm{pred} + k_d \, D + k_p \, D_{prev}, \qquad
    D = d_s \, (d_x x_t + d_p \, \mathrm{pred} + d_q \, \mathrm{pred})

with the denoised image D of this step and of the step before. Of an epsilon prediction at high
noise, D is a small difference times a large factor: so :math:`d_s = 1 / \alpha` stays outside, and
:math:`d_q` is what :math:`d_p` loses as a float32. A scheduler computes the weights once per run,
in float64, into one table with a row per step; nothing is read back from it.

References:
    Karras et al., https://arxiv.org/abs/2206.00364 (Euler); Song et al.,
    https://arxiv.org/abs/2010.02502 (DDIM); Lu et al., https://arxiv.org/abs/2211.01095 (2M).
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..prediction import accumulate
from .columns import COLUMNS, INDEX

Impl = Literal["reference", "fused"]


@dataclass(frozen=True)
class SolverStep:
    """The coefficients of one step.

    Args:
        row: The step's row of the table, with shape (len(COLUMNS),), float32, on the device of the
            samples. Each coefficient is a 0-d view of it, under its name in `COLUMNS`.
        has_previous: Whether the step uses the previous denoised image.
    """

    row: Tensor
    has_previous: bool = False

    def __getattr__(self, name: str) -> Tensor:
        if name not in INDEX:
            raise AttributeError(f"SolverStep has no {name!r}: expected one of {COLUMNS}")
        return self.row[INDEX[name]]


def network_step(
    x_t: Tensor,
    prediction: Tensor,
    previous: Tensor | None,
    step: SolverStep,
    *,
    want_denoised: bool = True,
    dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x_next and D from the network's output.

    Args:
        x_t: The sample, with shape (B, \\*), any floating dtype.
        prediction: The network's output, with shape (B, \\*).
        previous: D of the step before; not read if the step does not use it.
        step: Coefficients.
        want_denoised: Whether to compute D, too.
        dtype: Of x_next; None: float32 (float64 if x_t is).
        impl: "reference" (eager), "fused" (one Triton launch) or None: fused on CUDA where Triton
            is installed.

    Returns:
        x_next, and D in float32 (float64 if x_t is) or None.

    Raises:
        ValueError: `impl` is unknown, or the step needs a previous denoised image and got none.
    """
    if impl not in (None, "reference", "fused"):
        raise ValueError(f"network_step: impl is 'reference' or 'fused', got {impl!r}")
    if not step.has_previous:
        previous = None
    elif previous is None:
        raise ValueError("the solver step uses the denoised image of the step before, got None")
    if impl == "fused" or (impl is None and fused_by_default(x_t, prediction)):
        from .solver_kernel import launch

        return launch(x_t, prediction, previous, step.row, want_denoised, dtype or torch.float32)
    denoised = denoise(x_t, prediction, step)
    x_next = advance(x_t, prediction, denoised, previous, step)
    return x_next if dtype is None else x_next.to(dtype), denoised if want_denoised else None


def denoise(x_t: Tensor, prediction: Tensor, step: SolverStep) -> Tensor:
    """D alone, eager, in float32 (float64 if x_t is); see `network_step`."""
    terms = (prediction, step.d_p), (prediction, step.d_q)
    return _combined((x_t, step.d_x), *terms).mul_(step.d_s)


def advance(
    x_t: Tensor, prediction: Tensor, denoised: Tensor, previous: Tensor | None, step: SolverStep
) -> Tensor:
    """x_next from a given D (a clipped one, say), eager; see `network_step`."""
    terms = [(prediction, step.c_p), (denoised, step.k_d)]
    if previous is not None:
        terms.append((previous, step.k_p))
    return _combined((x_t, step.c_x), *terms)


def fused_by_default(*tensors: Tensor) -> bool:
    """Whether tensors are on CUDA, of 32 bits at most and without a gradient, and Triton is there.

    The fused kernel computes in float32 and has no backward.
    """
    plain = all(
        t.is_cuda and t.dtype.itemsize <= 4 and not (t.requires_grad and torch.is_grad_enabled())
        for t in tensors
    )
    return plain and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _combined(first: tuple[Tensor, Tensor], *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of tensors times 0-d coefficients, at least in float32."""
    tensor, weight = first
    total = accumulate(tensor) * weight
    for tensor, weight in terms:
        total.addcmul_(accumulate(tensor).to(total.dtype), weight.to(total.dtype))
    return total
