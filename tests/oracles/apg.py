"""Algorithms transcribed from the papers, in float64 and one sample at a time."""

import numpy as np


class PaperMomentum:
    """The running average of Algorithm 1 (APG)."""

    def __init__(self, beta):
        self.beta, self.average = beta, 0.0

    def update(self, value):
        self.average = value + self.beta * self.average


def paper_apg(d_cond, d_uncond, w, buffer, eta, r):
    """Algorithm 1 of arXiv 2410.02416 for one sample, as arrays of any shape in float64."""
    diff = d_cond - d_uncond
    buffer.update(diff)
    diff = buffer.average
    if r > 0:
        diff_norm = np.sqrt((diff**2).sum())
        diff = diff * min(1.0, r / diff_norm)
    direction = d_cond / np.sqrt((d_cond**2).sum())
    parallel = (diff * direction).sum() * direction
    orthogonal = diff - parallel
    return d_cond + (w - 1) * (orthogonal + eta * parallel)
