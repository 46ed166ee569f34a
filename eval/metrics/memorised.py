"""The nearest training picture of every generated one: were pictures learned by heart?

The distance of two pictures is that of their features. A small one alone proves nothing: simple
pictures are near each other. So the same is measured of held-out real pictures, which nobody can
have learned, and a generated picture is called *close* if it is closer to a training picture than
19 in 20 held-out ones are. About 1 in 20 will be by chance; far more were copied, or are simpler
than real ones. Look at the pairs listed.

Cost: the distances of all pairs, float32 in blocks; the nearest is that of float64 (see `blocks`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import nearest, prepared

CLOSE = 0.05  # share of the held-out pictures that are as close


class Nearest(NamedTuple):
    """Of every picture its nearest training picture.

    Args:
        distances: With shape (N,), float64.
        positions: Row of the training picture, with shape (N,).
    """

    distances: Tensor
    positions: Tensor


def nearest_training(train: Tensor, pictures: Tensor) -> Nearest:
    """The nearest training picture of every picture; of equal ones the first.

    Args:
        train: Features of the training pictures, with shape (M, D).
        pictures: Features, with shape (N, D).

    Raises:
        ValueError: no pictures, NaN, or different dimensions.
    """
    known, other = prepared(train, pictures)
    distances, positions = nearest(other, known, 1)
    return Nearest(distances[:, 0].cpu(), positions[:, 0].cpu())


def share_close(distances: Tensor, held_out: Tensor) -> float:
    """Share of pictures closer to their nearest training picture than 19 in 20 held-out ones.

    Args:
        distances: Of generated pictures, with shape (N,).
        held_out: The same of held-out real ones, with shape (K,).
    """
    return float((distances < torch.quantile(held_out, CLOSE)).double().mean())
