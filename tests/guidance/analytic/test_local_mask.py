"""Which coordinates the local denoiser compares, where their variances differ.

Elsewhere in the tests the largest entry of |R| is that of the diagonal, 1, whatever the threshold
is multiplied with or divided by.
"""

import pytest
import torch

from pilotage.guidance.analytic import LocalDenoiser

from ...oracles import analytic as oracles

# Coordinates 0 and 1 go together, but 1 varies more; 2 and 3 hardly do.
DEVIATIONS = torch.tensor([1.0, 2.0, 1.0, 1.0]).double()
CORRELATION = torch.eye(4).double()
CORRELATION[0, 1] = CORRELATION[1, 0] = 0.99
CORRELATION[2, 3] = CORRELATION[3, 2] = 0.3
SIGMA = 3.0


def images(count=40):
    """Images (count, 1, 2, 2) of exactly this covariance."""
    draw = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, covariance = oracles.covariance(draw)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (draw - mean).T, upper=False
    )
    factor = torch.linalg.cholesky(CORRELATION * DEVIATIONS * DEVIATIONS[:, None])
    return (factor @ white).T.reshape(-1, 1, 2, 2)


@pytest.mark.parametrize(("tau", "pairs"), [(0.1, [(0, 1), (2, 3)]), (0.2, [(0, 1)])])
def test_the_threshold_is_a_share_of_the_largest_entry(tau, pairs):
    """tau max |R|, and not tau / max |R| or tau alone.

    What is compared is so both ways: dividing the columns of the matrix would give the same.
    """
    x = images()
    w = oracles.wiener_matrix(x, SIGMA)
    assert 1.5 < (w / w.diagonal()[:, None]).abs().max() < 2.5, "not on the diagonal"
    mask = torch.eye(4).double()
    for i, j in pairs:
        mask[i, j] = mask[j, i] = 1
    y = x[:5] + SIGMA * images(45)[40:]
    expected, _, _ = oracles.coordinatewise(y, x, SIGMA, mask)
    found = LocalDenoiser(x, tau=tau, value_range=None)(y, SIGMA)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
