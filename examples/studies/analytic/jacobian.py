"""Reading a network: its Jacobian beside the Wiener filter of the data.

Row m of the Jacobian of the denoised image is what pixel m depends on (its sensitivity field); for
the Wiener filter it is row m of W (Lukoianov et al., https://arxiv.org/abs/2509.09672). The
eigenvalues of the Jacobian are shrinkage factors, its trace the effective dimension (Kadkhodaie et
al., https://arxiv.org/abs/2310.02557).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pilotage.guidance.analytic import DatasetStatistics

MASS = 0.9


def jacobian(denoise: Callable[[Tensor], Tensor], y: Tensor, batch_size: int = 112) -> Tensor:
    """Jacobian (n, n) of ``denoise`` at one noisy image (1, C, H, W), row by row."""
    n = y.numel()
    rows = []
    for start in range(0, n, batch_size):
        count = min(batch_size, n - start)
        inputs = y.detach().repeat(count, 1, 1, 1).requires_grad_(True)
        outputs = denoise(inputs).flatten(1)
        picked = outputs[torch.arange(count), torch.arange(start, start + count)].sum()
        rows.append(torch.autograd.grad(picked, inputs)[0].flatten(1))
    return torch.cat(rows)


def wiener_matrix(statistics: DatasetStatistics, sigma: float) -> Tensor:
    """W (n, n), float64."""
    n = statistics.dimension
    unit = torch.eye(n, dtype=torch.float64).view(n, *statistics.shape)
    return statistics.apply(unit, lambda v: v / (v + sigma**2)).flatten(1)


def mass_radius(rows: Tensor, shape: tuple[int, int, int], mass: float = MASS) -> Tensor:
    """Radius in pixels around m that holds `mass` of the sum of squares of row m, shape (n,)."""
    c, h, w = shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack([y, x], -1).view(-1, 2).double().repeat(c, 1)
    distance = torch.cdist(places, places)
    order = distance.argsort(1)
    share = rows.double().square().gather(1, order).cumsum(1)
    reached = (share < mass * share[:, -1:]).sum(1, keepdim=True).clamp(max=len(places) - 1)
    return distance.gather(1, order).gather(1, reached)[:, 0]


def reading(
    denoise: Callable[[Tensor], Tensor],
    statistics: DatasetStatistics,
    y: Tensor,
    sigma: float,
    vectors: int = 8,
) -> dict[str, Any]:
    """Sensitivity fields, their radii and the spectrum of a network at one noisy image.

    Returns:
        Figures, and under ``pictures`` the fields of the middle pixel (network, Wiener) and the
        leading eigenvectors of the symmetric part of the Jacobian, as images (k, C, H, W).
    """
    found, expected = jacobian(denoise, y).double(), wiener_matrix(statistics, sigma)
    c, h, w = statistics.shape
    middle = (h // 2) * w + w // 2
    values, basis = torch.linalg.eigh((found + found.T) / 2)
    wiener_values = torch.linalg.eigvalsh(expected)
    radii = {
        name: mass_radius(m, statistics.shape)
        for name, m in (("network", found), ("wiener", expected))
    }
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=1)
    leading = basis[:, -vectors:].T.flip(0)
    return {
        "sigma": sigma,
        "radius_90": {name: float(value.median()) for name, value in radii.items()},
        "row_cosine_median": float(cosine.median()),
        "asymmetry": float((found - found.T).norm() / (found + found.T).norm()),
        "effective_dimension": {
            "network": float(found.trace()),
            "wiener": float(expected.trace()),
        },
        "eigenvalues": {
            "network": values.flip(0)[:32].tolist(),
            "wiener": wiener_values.flip(0)[:32].tolist(),
        },
        "pictures": {
            "fields": torch.stack([found[middle], expected[middle]]).view(2, c, h, w),
            "eigenvectors": leading.reshape(-1, c, h, w),
        },
    }
