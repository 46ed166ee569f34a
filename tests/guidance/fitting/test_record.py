"""Recording the predictions of a run."""

import pytest
import torch

from pilotage.guidance import CFG, Guidance, Run
from pilotage.guidance.fitting.record import Record


def test_all_predictions_are_handed_over_once_at_the_end():
    cond, uncond, x_t = torch.randn(3, 4, 2, 9, generator=torch.Generator().manual_seed(0))
    got = []
    run = Run(Guidance(CFG(), Record(lambda c, u: got.append((c, u)))), 2, 4, on_cpu=True)
    for t in range(4):
        assert run.plan(x_t[t]) == [0, 1] and not got
        run.combine(cond[t], uncond[t], 5.0, x_t[t])
    (found,) = got
    for mine, theirs in zip(found, (cond, uncond), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_step_without_guidance():
    x = torch.ones(2, 9)
    run = Run(Guidance(CFG(), Record(print)), 2, 2, on_cpu=True)
    run.plan(x)
    run.unguided(x, x)
    run.plan(x)
    with pytest.raises(ValueError, match="left some steps without guidance"):
        run.combine(x, 2 * x, 5.0, x)
