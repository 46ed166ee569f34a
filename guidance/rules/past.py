"""What rules with a memory share: the state of a sample's first step, and how noisy a step is."""

from __future__ import annotations

from torch import Tensor

from ..prediction import Factor, NoiseLevel, per_sample


def past(state: Tensor | None, first: Tensor) -> Tensor:
    """What a rule keeps of earlier steps, and `first` for samples that have none yet.

    Args:
        state: As `Rule.combine` is given it: None at the first step, all 0 for samples that are
            guided later than their batch mates; with shape (B, \\*).
        first: What stands for a past at a sample's first step, with shape (B, \\*).
    """
    if state is None:
        return first
    begun = per_sample(state.flatten(1).any(1), first)
    return state.where(begun, first)


def noise_share(level: NoiseLevel) -> Factor:
    """sigma / (alpha + sigma), from 0 (the picture) to 1 (noise); sigma itself for flow models."""
    return level.sigma / (level.alpha + level.sigma)
