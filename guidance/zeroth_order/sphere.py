"""The sphere constraint: a token keeps the norm of the word it began as, only its direction learns.

Embeddings of a vocabulary have similar norms; a token that grows beyond them drowns the other words
of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sphere:
    """A product of spheres, one for each segment of a vector.

    Args:
        segments: Lengths of the segments (one per learned vector and text encoder).
        radii: Their norms, with shape (len(segments),).
    """

    segments: tuple[int, ...]
    radii: Tensor

    @classmethod
    def through(cls, point: Tensor, segments: tuple[int, ...]) -> Sphere:
        """The spheres on which `point`, with shape (sum(segments),), lies.

        Raises:
            ValueError: a segment of the point is zero, or the lengths do not add up.
        """
        if sum(segments) != point.numel():
            raise ValueError(f"segments {segments} do not add up to {point.numel()} elements")
        radii = _norms(point[None], segments)[0]
        if not (radii > 0).all():
            raise ValueError("a zero vector lies on no sphere: begin from another word")
        return cls(tuple(segments), radii)

    def project(self, points: Tensor) -> Tensor:
        """The nearest points on the spheres, with the shape (K, d) of `points`."""
        scale = self.radii.to(points) / _norms(points, self.segments)
        parts = points.split(self.segments, dim=1)
        return torch.cat([part * scale[:, i, None] for i, part in enumerate(parts)], dim=1)


def _norms(points: Tensor, segments: tuple[int, ...]) -> Tensor:
    norms = [part.norm(dim=1) for part in points.split(segments, dim=1)]
    return torch.cat([norm[:, None] for norm in norms], dim=1)
