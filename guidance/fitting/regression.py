r"""Least squares for LinearAG from inner products alone.

The predictions of one trajectory are 2T vectors :math:`z = (c_0 \dots c_{T-1}, u_0 \dots u_{T-1})`.
Whatever the number of trajectories, all that a regression of one on others needs is their Gram
matrix :math:`G_{ij} = \sum \langle z_i, z_j \rangle`.

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..policies.fill import Coefficients

Target = Literal["uncond", "difference"]


@dataclass
class Gram:
    """Inner products of the predictions of many trajectories.

    Args:
        products: G, with shape (2T, 2T), float64 on the CPU: conditional predictions first, then
            unconditional ones.
        trajectories: Number of trajectories.
    """

    products: Tensor
    trajectories: int = 0

    @classmethod
    def empty(cls, steps: int) -> Gram:
        """No trajectory yet, of `steps` network evaluations."""
        return cls(torch.zeros(2 * steps, 2 * steps).double())

    @classmethod
    def of(cls, cond: Tensor, uncond: Tensor) -> Gram:
        """Inner products of trajectories given whole.

        Args:
            cond: Conditional predictions, with shape (T, B, \\*).
            uncond: Unconditional predictions, with shape (T, B, \\*).

        Raises:
            ValueError: a prediction is NaN or infinite.
        """
        stacked = torch.cat([cond, uncond]).flatten(1).double()
        products = (stacked @ stacked.T).cpu()
        if not products.isfinite().all():
            raise ValueError("trajectories hold NaN or infinite predictions: nothing was added")
        return cls(products, cond.shape[1])

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.products + other.products, self.trajectories + other.trajectories)

    @property
    def steps(self) -> int:
        """T, the number of network evaluations of a trajectory."""
        return len(self.products) // 2


def fit_coefficients(
    gram: Gram,
    *,
    target: Target = "uncond",
    ridge: float = 1e-6,
    identity: Mapping[str, Any] | None = None,
) -> Coefficients:
    """Ridge regression of every unconditional prediction on what precedes it.

    Args:
        gram: Inner products of the trajectories.
        target: "uncond" regresses u_t, "difference" c_t - u_t. Without ridge both are the same
            estimate; ridge shrinks the one towards 0, the other towards no guidance.
        ridge: Added to the diagonal, relative to the mean square of the regressors. Neighbouring
            steps are nearly collinear; without it coefficients of both signs grow large.
        identity: What was fitted on, kept with the coefficients.

    Raises:
        ValueError: no trajectories, an unknown target, or a negative ridge.
    """
    if target not in get_args(Target):
        raise ValueError(f"target is 'uncond' or 'difference', got {target!r}")
    if not ridge >= 0:
        raise ValueError(f"ridge must be >= 0, got {ridge}")
    if gram.trajectories == 0:
        raise ValueError("no trajectories to fit coefficients on")
    steps, conds, unconds = gram.steps, [], []
    for step in range(steps):
        known = [*range(step + 1), *range(steps, steps + step)]
        right = gram.products[known, steps + step]
        if target == "difference":
            right = gram.products[known, step] - right
        beta = _solved(gram.products[known][:, known], right, ridge)
        if target == "difference":
            beta = -beta
            beta[step] += 1
        conds.append(tuple(beta[: step + 1].tolist()))
        unconds.append(tuple(beta[step + 1 :].tolist()))
    return Coefficients(tuple(conds), tuple(unconds), identity=identity)


def ridge_regression(known: Tensor, aim: Tensor, ridge: float) -> Tensor:
    """Coefficients of the regressors that come closest to an aim.

    Args:
        known: Regressors, with shape (K, n).
        aim: What is regressed, with shape (n,).
        ridge: Added to the diagonal, relative to the mean square of the regressors.

    Returns:
        Coefficients, with shape (K,), float64 on the CPU.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    known, aim = known.double(), aim.double()
    normal, right = (known @ known.T).cpu(), (known @ aim).cpu()
    if not (normal.isfinite().all() and right.isfinite().all()):
        raise ValueError("trajectories hold NaN or infinite predictions: nothing was fitted")
    return _solved(normal, right, ridge)


def _solved(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solution of normal equations of K unknowns, each with the ridge."""
    diagonal = normal.diagonal()
    penalty = (ridge * diagonal.mean()).expand_as(diagonal).diag()
    return torch.linalg.lstsq(normal + penalty, right, driver="gelsd").solution


def r_squared(gram: Gram, coefficients: Coefficients, of: Target = "uncond") -> Tensor:
    """Share of a prediction's square that the estimate explains, shape (T,), float64.

    The estimates are made of evaluated predictions, not of earlier estimates.

    Args:
        gram: Inner products of the trajectories to judge by.
        coefficients: Their estimates.
        of: "uncond": 1 - |u - û|² / |u|²; "difference": 1 - |u - û|² / |c - u|², which tells more,
            since u is close to c.
    """
    steps, shares = gram.steps, []
    for step in range(steps):
        aim = torch.zeros(2 * steps).double()
        aim[steps + step] = 1
        error = aim.clone()
        error[: step + 1] -= torch.tensor(coefficients.cond[step], dtype=torch.float64)
        error[steps : steps + step] -= torch.tensor(coefficients.uncond[step], dtype=torch.float64)
        if of == "difference":
            aim[step] = -1
        squared, whole = (v @ gram.products @ v for v in (error, aim))
        shares.append(1 - squared.clamp(min=0) / whole if whole > 0 else torch.ones(()).double())
    return torch.stack(shares)
