"""What a setting costs, in network evaluations, and how far it moves the predictions."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...guidance import Guidance, Trace
from ...pipelines.seam.noise_levels import prediction_type_of


def update_norms(trace: Trace, guidance: Guidance, scheduler: Any) -> list[float] | None:
    """Norm of (guided - conditional) as denoised images, mean over all steps, of each sample.

    Steps without guidance count as 0; steps that a sample skipped do not count. None
    where a noise level is not known, or is infinite and the network predicts noise: its denoised
    image does not exist there.

    Args:
        trace: A detailed trace.
        guidance: What made it.
        scheduler: The scheduler it was made with.
    """
    totals = torch.zeros(trace.batch, dtype=torch.float64)
    counts = torch.full((trace.batch,), len(trace.steps))
    for step in trace.steps:
        counts[step.skipped] -= 1
        if step.update_norm is None:
            continue
        factor = 1.0
        if guidance.rule.space != "x0":
            if step.noise is None:
                return None
            factor = _x0_factor(step.noise, scheduler)
        totals[step.guided] += factor * step.update_norm.double().cpu()
    means = totals / counts
    return [round(value, 6) for value in means.tolist()] if means.isfinite().all() else None


def _x0_factor(noise: float, scheduler: Any) -> float:
    """|a_p| of `NoiseLevel.coefficients` from sigma / alpha: what differences are multiplied by."""
    match prediction_type_of(scheduler):
        case "epsilon":
            return noise
        case "v_prediction":
            spread = scheduler.config.get("sigma_data", 1.0)
            return spread * math.sin(math.atan(noise / spread))  # sigma * sigma_data
        case "flow":
            return 1 - 1 / (1 + noise)  # sigma, where alpha + sigma = 1
    return 1.0


def evaluations(scheduler: Any, steps: int) -> int:
    """Network evaluations of one branch in a run of `steps` steps (Heun's makes two a step)."""
    copy = type(scheduler).from_config(scheduler.config)
    dynamic = scheduler.config.get("use_dynamic_shifting", False)
    copy.set_timesteps(steps, **({"mu": 1.0} if dynamic else {}))
    return len(copy.timesteps)


def steps_for_nfe(scheduler: Any, nfe: float, at_most: int) -> int:
    """Steps of classifier-free guidance whose network evaluations come closest to `nfe`.

    A step costs two or more, so that the best possible match may be one evaluation off.

    Args:
        scheduler: The pipeline's.
        nfe: Mean network evaluations a sample.
        at_most: Largest number of steps to consider.
    """
    candidates = range(1, at_most + 1)
    return min(candidates, key=lambda n: (abs(2 * evaluations(scheduler, n) - nfe), n))
