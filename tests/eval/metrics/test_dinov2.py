"""Position embeddings of DINOv2, stretched as Meta does."""

import numpy as np
import pytest
import torch

from pilotage.eval.metrics.dinov2 import _stretched


def cubic(values, position):
    """Cubic convolution (Keys 1981, a = -0.75) of values at 0, 1, ..., the ends going on."""
    a, first = -0.75, int(np.floor(position))
    total = 0.0
    for i in range(first - 1, first + 3):
        d = abs(position - i)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        total += values[min(max(i, 0), len(values) - 1)] * (near if d <= 1 else far)
    return total


@pytest.mark.parametrize(("own", "side"), [(7, 4), (4, 6)])
def test_positions_are_metas(own, side):
    """Patch i looks at (i + 1/2) * own / (side + 0.1) - 1/2; the class token stays as it is."""
    ramp = np.random.default_rng(0).standard_normal(own)
    grid = torch.tensor(ramp, dtype=torch.float32).expand(own, own)  # the same in every row
    embeddings = torch.cat([torch.tensor([5.0]), grid.flatten()]).view(1, -1, 1)
    found = _stretched(embeddings, side)
    assert found.shape == (1, 1 + side * side, 1) and found[0, 0, 0] == 5
    expected = [cubic(ramp, (i + 0.5) * own / (side + 0.1) - 0.5) for i in range(side)]
    rows = found[0, 1:, 0].view(side, side)
    for row in rows.tolist():
        assert row == pytest.approx(expected, abs=1e-5)
