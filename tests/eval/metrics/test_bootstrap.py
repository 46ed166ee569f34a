"""Resamples of groups; their intervals are tested with the comparison (`test_paired`)."""

import torch

from pilotage.eval.metrics.bootstrap import Resamples


def test_to_first_order_a_mean_is_itself():
    """Means of groups of one size are linear: what the jackknife says is what resamples do."""
    values = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = Resamples.of([g for g in range(5) for _ in range(3)], 50)
    left_out = torch.stack([values[torch.arange(5) != g].mean() for g in range(5)])
    found = drawn.linear(values.mean().item(), left_out)
    expected = torch.stack([(times[:, None] * values).sum() / 15 for times in drawn.times])
    torch.testing.assert_close(found, expected)
