r"""Online softmax: weighted means over a stream of candidates, in one pass and bounded memory.

For logits :math:`l_i` the running maximum m, sum :math:`s = \sum_i e^{l_i - m}` and weighted sum
:math:`v = \sum_i e^{l_i - m} x_i` are rescaled whenever m rises; the mean is v / s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Info:
    """What a posterior rests on, per coordinate of the images, shapes (B, C, H, W).

    Args:
        n_eff: Effective number of candidates, 1 / (sum of squared weights).
        top: Index of the training image with the largest weight, int64.
    """

    n_eff: Tensor
    top: Tensor


class Softmax:
    """Running state for groups of logits, each with its own weighted mean.

    Args:
        values: Zeros with the shape of the result, (groups, responses).
        minibatch: Normalize within each block of candidates and average over blocks, instead of
            over all candidates.
        info: Keep what `Info` needs.
    """

    def __init__(self, values: Tensor, *, minibatch: bool = False, info: bool = False) -> None:
        groups = len(values)
        self.values, self.minibatch = values, minibatch
        self.peak = values.new_full((groups,), -torch.inf)
        self.mass = values.new_zeros(groups)
        self.square = values.new_zeros(groups) if info else None
        self.best = values.new_full((groups,), -torch.inf) if info else None
        self.top = torch.zeros(groups, dtype=torch.int64, device=values.device) if info else None

    def update(self, rows: slice, logits: Tensor, values: Tensor, index: Tensor) -> None:
        """Take in a block of candidates.

        Args:
            rows: The g groups concerned.
            logits: Shape (g, c), overwritten.
            values: Shape (c, responses) if the groups share the candidates' values, else
                (responses, g, c).
            index: Number of the image that each candidate comes from, shape (c,).
        """
        high = logits.amax(1)
        if self.best is not None and not self.minibatch:
            self._keep_top(rows, high, logits, index)
        if self.minibatch:
            weights = logits.sub_(high[:, None]).exp_()
            weights /= weights.sum(1, keepdim=True)
            if self.best is not None:
                self._keep_top(rows, weights.amax(1), weights, index)
            scale = 1.0
        else:
            peak = torch.maximum(self.peak[rows], high)
            # All candidates so far at -inf: nothing to rescale, and -inf - (-inf) is not a number.
            peak = peak.where(peak > -torch.inf, 0)
            weights = logits.sub_(peak[:, None]).exp_()
            scale = (self.peak[rows] - peak).exp()
            self.peak[rows] = peak
        self.mass[rows] = self.mass[rows] * scale + weights.sum(1)
        if self.square is not None:
            self.square[rows] = self.square[rows] * scale**2 + torch.linalg.vecdot(weights, weights)
        if values.ndim == 2:
            found = weights @ values
        else:
            found = torch.linalg.vecdot(weights[None], values).T
        column = scale if isinstance(scale, float) else scale[:, None]
        self.values[rows] = self.values[rows] * column + found

    def mean(self) -> Tensor:
        """Weighted means, shape (groups, responses)."""
        return self.values / self.mass[:, None]

    def log_mass(self) -> Tensor:
        """Logarithm of the sum of exponentials, shape (groups,)."""
        return self.peak + self.mass.log()

    def n_eff(self) -> Tensor:
        """Effective numbers of candidates, shape (groups,)."""
        return self.mass**2 / self.square

    def _keep_top(self, rows: slice, high: Tensor, block: Tensor, index: Tensor) -> None:
        better = high > self.best[rows]
        self.best[rows] = torch.where(better, high, self.best[rows])
        self.top[rows] = torch.where(better, index[block.argmax(1)], self.top[rows])
