"""The threshold of Adaptive Guidance for a wanted cost or a wanted quality.

From one run of plain guidance a prompt, in which the cosine of the two predictions is recorded in
every space, the cost of any threshold is known exactly: up to its stop a guided sample *is* that
run. Each space then proves itself in a few runs of Adaptive Guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...guidance import AdaptiveGuidance, Guidance, Space, cosine, save_guidance
from ...guidance.fitting.record import Record
from ...guidance.policies.adaptive import Then
from ...pipelines.seam.noise_levels import knows_levels
from .trials import Trials

ROUNDS = 7  # of bisection, towards a quality
SLACK = 1e-6  # a threshold lies so far below the cosine that is to reach it

Curve = list[tuple[float, float]]


class Proof(NamedTuple):
    """A threshold, with the mean network evaluations and the mean quality that it gives."""

    threshold: float
    nfe: float
    quality: float


@dataclass(frozen=True)
class Calibration:
    """A calibrated threshold, and what it was found to do.

    Args:
        guidance: Rule and policy, ready for ``pipe(..., guidance=...)``.
        space: Where the cosine is taken.
        best: Its threshold, and what it does.
        proofs: The best threshold of every space; a wanted quality may be out of reach in one.
    """

    guidance: Guidance
    space: Space
    best: Proof
    proofs: dict[Space, Proof]

    def save(self, path: Path | str) -> None:
        """Write the settings as JSON (see `save_guidance`).

        In the folder ``guidance`` of a saved pipeline the file's stem is a name for ``guidance=``.
        """
        measured = {"nfe": self.best.nfe, "quality": self.best.quality, "spaces": self.proofs}
        save_guidance(path, self.guidance, measured)


def calibrate(
    trials: Trials,
    *,
    target_nfe: float | None = None,
    target_ssim: float | None = None,
    then: Then = "cond",
) -> Calibration:
    """Find the threshold, and the space it is taken in, for Adaptive Guidance.

    Args:
        trials: Runs of a few typical prompts.
        target_nfe: Wanted mean network evaluations a picture; the space with the higher quality
            there is chosen.
        target_ssim: Wanted mean quality (SSIM unless `quality` says otherwise) against plain
            guidance; the space that reaches it with fewer evaluations is chosen.
        then: See `AdaptiveGuidance`.

    Raises:
        ValueError: not exactly one target, or one that no threshold reaches.
    """
    check_targets(target_nfe, target_ssim)
    trials.check_guided()
    lag = 0 if trials.pipe.device.type == "cpu" else 1
    proofs: dict[Space, Proof] = {}

    def composed(threshold: float, space: Space) -> Guidance:
        return trials.plain | AdaptiveGuidance(threshold, space, then=then)

    def prove(threshold: float, space: Space) -> Proof:
        quality, nfe = trials.judge(composed(threshold, space))
        bar.update()
        return Proof(threshold, nfe, quality)

    with trials.bar("calibrating", "run") as bar:
        gammas = agreement(trials)
        bar.update()
        costs = {space: cost_curve(gamma, lag, then) for space, gamma in gammas.items()}
        if target_nfe is not None:
            _check_reachable(target_nfe, costs)
        for space, curve in costs.items():
            if target_ssim is not None:
                proofs[space] = _cheapest(curve, target_ssim, partial(prove, space=space))
            elif target_nfe is not None:
                proofs[space] = prove(_nearest(curve, target_nfe), space)
    if target_ssim is not None:
        space = _cheapest_space(proofs, target_ssim)
    else:
        space = max(proofs, key=lambda s: proofs[s].quality)
    best = proofs[space]
    return Calibration(composed(best.threshold, space), space, best, proofs)


def check_targets(nfe: float | None, ssim: float | None) -> None:
    """Refuse anything but one target.

    Raises:
        ValueError: none, both, or a quality that is not between 0 and 1.
    """
    if (nfe is None) == (ssim is None):
        raise ValueError(
            "calibrate needs a target, one of them: target_nfe= or target_ssim= (--nfe or --ssim)"
        )
    if ssim is not None and not 0 < ssim < 1:
        raise ValueError(f"the wanted SSIM must be between 0 and 1, got {ssim}")


def agreement(trials: Trials) -> dict[Space, Tensor]:
    """Cosine of the two predictions under plain guidance, by space.

    Returns:
        "x0" where the scheduler's noise levels are known, and "native" -> (T, N), float64 on the
        CPU.
    """
    known = knows_levels(trials.pipe.scheduler)
    found: dict[Space, list[Tensor]] = {"x0": [], "native": []} if known else {"native": []}

    def measure(cond: Tensor, uncond: Tensor) -> None:
        pairs = zip(cond, uncond, strict=True)
        found["native"].append(torch.stack([cosine(c, u) for c, u in pairs]).double().cpu())

    for call in trials.calls():
        guidance = trials.plain | Record(measure)
        trials.pipe(guidance=guidance, detailed_trace=known, output_type="latent", **call)
        if known:
            steps = trials.pipe.guidance_trace.steps
            found["x0"].append(torch.stack([step.gamma for step in steps]).double().cpu())
    return {space: torch.cat(parts, 1) for space, parts in found.items()}


def cost_curve(gamma: Tensor, lag: int = 0, then: Then = "cond") -> Curve:
    """(threshold, mean network evaluations) for every threshold that makes a difference, ascending.

    A cosine comes out differently in the last digits when other samples share the batch: thresholds
    lie `SLACK` below the cosines that reach them, or half way to the next lower one.

    Args:
        gamma: Cosine at every step of every sample, with shape (T, N).
        lag: Steps after its measurement at which a stop takes effect.
        then: See `AdaptiveGuidance`.
    """
    steps = len(gamma)
    # A sample stops where its running maximum reaches the threshold.
    highest = gamma.cummax(0).values
    curve, lower = [], float("-inf")
    for value in sorted(set(highest.flatten().tolist())):
        guided = ((highest < value).sum(0) + 1 + lag).clamp(max=steps)
        rest = steps - guided if then == "cond" else (steps - guided) // 2 * 2
        threshold = value - min(SLACK, (value - lower) / 2)
        curve.append((threshold, (2 * guided + rest).double().mean().item()))
        lower = value
    return curve


def _nearest(curve: Curve, nfe: float) -> float:
    """The threshold whose cost is nearest to the wanted one."""
    return min(curve, key=lambda point: abs(point[1] - nfe))[0]


def _check_reachable(target: float, costs: dict[Space, Curve]) -> None:
    low = min(curve[0][1] for curve in costs.values())
    high = max(curve[-1][1] for curve in costs.values())
    if not low - 0.5 <= target <= high + 0.5:
        raise ValueError(
            f"no threshold costs {target:g} evaluations a picture: from {low:.1f} to {high:.1f} is "
            "possible"
        )


def _cheapest_space(proofs: dict[Space, Proof], target: float) -> Space:
    """The space that reaches a quality with the fewest evaluations."""
    reaching = [space for space in proofs if proofs[space].quality >= target]
    if not reaching:
        best = max(proofs.values(), key=lambda proof: proof.quality)
        raise ValueError(
            f"no threshold reaches a quality of {target:g}: the highest gives {best.quality:.4f} "
            f"at {best.nfe:.1f} evaluations"
        )
    return min(reaching, key=lambda space: proofs[space].nfe)


def _cheapest(curve: Curve, target: float, prove: Callable[[float], Proof]) -> Proof:
    """The lowest threshold whose quality reaches the target, by bisection over the curve.

    Where none reaches it, the highest.
    """
    low, high = -1, len(curve) - 1
    best = prove(curve[high][0])
    for _ in range(ROUNDS):
        if high - low <= 1 or best.quality < target:
            break
        middle = (low + high) // 2
        tried = prove(curve[middle][0])
        if tried.quality >= target:
            high, best = middle, tried
        else:
            low = middle
    return best
