"""The Triton kernel against the dense float64 oracle; interpreted where there is no CUDA."""

import pytest
import torch

from pilotage.guidance.analytic import decode, fused

from ...oracles.analytic import coordinatewise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(fused.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("share", "sigma"),
    [(0.1, 0.3), (0.9, 1.0), (0.9, 30.0), (0.5, 0.05), (0.5, 0.01), (0.9, 0.002)],
)
def test_kernel_equals_the_oracle_at_any_noise_level(share, sigma, monkeypatch):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (70, 3, 5, 5), generator=g, dtype=torch.uint8)
    x = decode(images, torch.float64)
    clean = x[:2].float() if sigma >= 0.3 else torch.rand(2, 3, 5, 5, generator=g) * 2 - 1
    y = clean + sigma * torch.randn(2, 3, 5, 5, generator=g)
    mask = torch.rand(75, 75, generator=g) < share
    # A place that is never written must show.
    monkeypatch.setattr(torch, "empty_like", lambda t, **_: torch.full_like(t, torch.nan))
    found = fused.masked_posterior(y.to(DEVICE), sigma, images.to(DEVICE), mask.to(DEVICE)).cpu()
    monkeypatch.undo()
    exact, _, _ = coordinatewise(y, x, sigma, mask)
    squares = (y.double().flatten(1)[:, None] - x.flatten(1)) ** 2 / (2 * sigma**2)
    least = torch.einsum("bij,mj->bmi", squares, mask.double()).amin(-1).max()
    # Squares to 22 binary digits; the nearest candidates decide.
    allowed = min(1e-5 + 2.0**-21 * float(least), 1e-2)
    assert (found - exact).abs().max() <= allowed
