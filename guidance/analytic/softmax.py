r"""Online softmax: weighted means over a stream of candidates, in one pass and bounded memory.

For logits :math:`l_i` the running maximum m, sum :math:`s = \sum_i e^{l_i - m}` and weighted sum
:math:`v = \sum_i e^{l_i - m} x_i` are rescaled whenever m rises; the mean is v / s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Logits below it count as it: weights of 1e-35 change nothing, but exponentials that underflow are
# computed one by one, several times as slowly.
LEAST = -80.0


@dataclass(frozen=True)
class Info:
    """What a posterior rests on, per coordinate of the images, shapes (B, C, H, W).

    Args:
        n_eff: Effective number of candidates, 1 / (sum of squared weights).
        top: Index of the training image with the largest weight, int64.
        used: Number of images that were compared, int64: all of the pool, or those that a bound
            left. None where a denoiser's own part always compares all.
    """

    n_eff: Tensor
    top: Tensor
    used: Tensor | None = None


class Softmax:
    """Running state for groups of logits, each with its own weighted mean.

    Args:
        values: Zeros with the shape of the result, (groups, responses).
        minibatch: Normalize within each block of candidates and average over blocks, instead of
            over all candidates.
        info: Keep what `info` needs.
    """

    def __init__(self, values: Tensor, *, minibatch: bool = False, info: bool = False) -> None:
        self.values, self.minibatch, self.keeps_info = values, minibatch, info
        self.peak = values.new_full((len(values),), -torch.inf)
        self.mass = torch.zeros_like(self.peak)
        self.square = torch.zeros_like(self.peak)  # sum of squared weights
        self.best, self.top = self.peak.clone(), torch.zeros_like(self.peak, dtype=torch.int64)

    def update(self, rows: slice, distances: Tensor, values: Tensor, index: Tensor) -> None:
        """Take in a block of candidates.

        Args:
            rows: The g groups concerned.
            distances: Minus the logits, with shape (g, c); overwritten.
            values: Shape (c, responses) if the groups share the candidates' values, else
                (responses, g, c).
            index: Number of the image that each candidate comes from, shape (c,).
        """
        high = -distances.amin(1)
        peak = high if self.minibatch else torch.maximum(self.peak[rows], high)
        # All candidates so far at -inf: nothing to rescale, and -inf - (-inf) is not a number.
        peak = peak.where(peak > -torch.inf, 0)
        weights = torch.sub(-peak[:, None], distances, out=distances).clamp_(min=LEAST).exp_()
        mass = weights.sum(1)
        if self.minibatch:
            weights /= mass[:, None]
            mass, scale = mass.new_ones(()), mass.new_ones(())
        else:
            scale = (self.peak[rows] - peak).exp()
        if self.keeps_info:
            self.square[rows] = self.square[rows] * scale**2 + torch.linalg.vecdot(weights, weights)
            # Weights of whole blocks compare as they are; others only by their logits.
            rank = weights.amax(1) if self.minibatch else high
            better = rank > self.best[rows]
            self.best[rows] = torch.where(better, rank, self.best[rows])
            self.top[rows] = torch.where(better, index[weights.argmax(1)], self.top[rows])
        self.peak[rows] = peak
        self.mass[rows] = self.mass[rows] * scale + mass
        if values.ndim == 2:
            found = weights @ values
        else:
            found = torch.stack([torch.linalg.vecdot(weights, part) for part in values], 1)
        self.values[rows] = self.values[rows] * scale[..., None] + found

    def mean(self) -> Tensor:
        """Weighted means, shape (groups, responses)."""
        return self.values / self.mass[:, None]

    def info(self) -> tuple[Tensor, Tensor]:
        """Effective number of candidates and number of the top image, each with shape (groups,)."""
        return self.mass**2 / self.square, self.top
