"""One step of a rule, on tensors alone."""

import torch

from pilotage.guidance import NoiseLevel, Predictions, Step

SAME = NoiseLevel(0.0, 1.0, "sample")  # a network whose output is the denoised image


def combine(rule, cond, uncond, w, state=None, index=0):
    """`Rule.combine` on predictions that are the same in either space."""
    step = Step(index, 20, SAME, SAME, torch.zeros_like(cond))
    return rule.combine(Predictions({"cond": cond, "uncond": uncond}, step), step, w, state)
