"""Rules that act on a solver's steps, as their papers have them: float64, one sample at a time."""

import numpy as np
from scipy.fft import dctn, idctn


class PaperMomentum:
    """Equations 12 and 13 of arXiv 2602.20360 on Euler steps: Z + dt (v + alpha (v - m))."""

    def __init__(self, alpha, beta):
        self.alpha, self.beta, self.m = alpha, beta, None

    def step(self, z, v, dt, acts=True):
        m = v if self.m is None else self.m
        self.m = (1 - self.beta) * v + self.beta * m
        return z + dt * (v + self.alpha * (v - m) * acts)


class PaperHiGS:
    """Algorithms 2 and 3 of arXiv 2509.22300; an array of shape (C, H, W)."""

    def __init__(self, w, t_min, t_max, eta, alpha, threshold=0.05, sharpness=50):
        self.w, self.t_min, self.t_max, self.eta, self.alpha = w, t_min, t_max, eta, alpha
        self.threshold, self.sharpness, self.ema = threshold, sharpness, None

    def step(self, pred, t):
        if self.ema is None:
            self.ema = self.alpha * pred
            return np.zeros_like(pred)
        diff = pred - self.ema
        unit = pred / np.sqrt((pred**2).sum())
        parallel = (diff * unit).sum() * unit
        diff = diff - parallel + self.eta * parallel
        inside = self.t_min < t <= self.t_max
        gamma = ((t - self.t_min) / (self.t_max - self.t_min)) ** 0.5 if inside else 0.0
        self.ema = self.alpha * pred + (1 - self.alpha) * self.ema
        rows, columns = diff.shape[-2:]
        u, v = np.arange(rows)[:, None] / rows, np.arange(columns)[None] / columns
        mask = 1 / (1 + np.exp(-(np.sqrt(u**2 + v**2) - self.threshold) * self.sharpness))
        axes = (-2, -1)
        filtered = idctn(dctn(diff, axes=axes, norm="ortho") * mask, axes=axes, norm="ortho")
        return self.w * gamma * filtered


def paper_tag(before, after, eta):
    """Algorithm 2 of arXiv 2510.04533: a solver's step from `before` to `after`, amplified."""
    unit = before / np.sqrt((before**2).sum())
    delta = after - before
    normal = (delta * unit).sum() * unit
    return before + eta * (delta - normal) + normal


class PaperSMC:
    """Algorithm of arXiv 2603.03281 as its authors' code has it."""

    def __init__(self, decay, gain):
        self.decay, self.gain, self.previous = decay, gain, None

    def step(self, cond, uncond, w):
        eps = cond - uncond
        if self.previous is None:
            self.previous = eps
        s = (eps - self.previous) + self.decay * self.previous
        eps = eps - self.gain * np.sign(s)
        self.previous = eps
        return uncond + w * eps
