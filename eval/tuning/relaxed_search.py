r"""Differentiable policy search, as in the Adaptive Guidance paper.

At every step a softmax over logits mixes the options {conditional alone, guidance at the scales
s_1 ... s_k}. A mixture of guided predictions is a guided prediction at the mixed scale,

.. math:: \sum_k p_{t,k} \left( c + (s_k - 1)(c - u) \right)
    = c + \Big( \sum_k p_{t,k} s_k - 1 \Big) (c - u), \qquad s_0 = 1

so the relaxed run is ordinary guidance at a learned scale for every step. Minimised is the distance
of the final latents to those of plain guidance, relative to their square, plus a penalty on the
expected number of unconditional evaluations :math:`\sum_t (1 - p_{t,0})`. The logits then rank the
steps, and the schedules that keep the first k of them are tried for real.

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...guidance import Decision, Policy, PolicyState, Schedule
from ...guidance.base import SameForAll
from ...guidance.policies.schedule import Choice
from .store import Search, TrialLog, check_floor
from .trials import Trials

SHARES = (0.5, 1.0, 1.5)  # s_1 ... s_k over w
PENALTY = 0.02  # weight of the expected share of unconditional evaluations
LEARNING_RATE = 0.15  # of Adam, on logits


@dataclass(frozen=True)
class ScaledSteps(Policy):
    """Both branches at every step, each at a scale of its own, through which gradients flow.

    Args:
        factors: What w - 1 is multiplied with at every step, with shape (T,).
    """

    name: ClassVar[str] = "scaled-steps"

    factors: Tensor = field(repr=False)

    def decisions(self, total: int) -> Sequence[Decision]:
        """Both branches, at the step's own scale."""
        return [Decision(factor=factor) for factor in self.factors]

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """A state that looks the factors up."""
        decisions = self.decisions(total)
        return SameForAll(batch, lambda step: decisions[step.index])


def relaxed_search(trials: Trials, *, quality_floor: float = 0.9, iterations: int = 40) -> Search:
    """Learn which steps need guidance, and how strongly, by gradient descent through the sampler.

    Needs memory for a whole run's activations (the network's gradient checkpointing is switched on
    meanwhile) and a scheduler whose steps are differentiable.

    Args:
        trials: Runs of a few typical prompts. Every iteration takes one batch of them in turn.
        quality_floor: Mean quality against plain guidance to be kept.
        iterations: Gradient steps.

    Raises:
        ValueError: a setting is out of its range, or no schedule reaches the floor.
    """
    check_floor(quality_floor)
    if iterations < 1:
        raise ValueError(f"relaxed_search needs iterations >= 1, got {iterations}")
    pipe, w = trials.pipe, trials.guidance_scale
    if w <= 2:
        raise ValueError(f"relaxed_search tries w / 2: it needs a guidance scale > 2, got {w}")
    total = trials.evaluations()
    scales = torch.tensor([1.0, *(share * w for share in SHARES)], device=pipe.device)
    logits = torch.zeros(total, len(scales), device=pipe.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    calls = len(trials.calls())
    targets = [_latents(trials, i, None) for i in range(calls)]
    with trials.bar("relaxing", "iteration", iterations) as bar:
        for iteration in range(iterations):
            i = iteration % calls
            with _differentiable(pipe):
                p = logits.softmax(1)
                latents = _latents(trials, i, ScaledSteps((p @ scales - 1) / (w - 1)))
                distance = (latents - targets[i]).square().mean() / targets[i].square().mean()
                loss = distance + PENALTY * (1 - p[:, 0]).mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            bar.set_postfix(distance=f"{distance.item():.4f}")
            bar.update()
    with trials.bar("trying", "schedule") as bar:
        log = TrialLog(trials, bar)
        every: list[Choice] = ["both"] * total
        log(Schedule(tuple(every)))
        for schedule in schedules(logits.detach().softmax(1).cpu(), scales.cpu(), w):
            log(schedule)
    return log.conclude(quality_floor)


def schedules(p: Tensor, scales: Tensor, w: float) -> list[Schedule]:
    """Schedules that guide 1, 2, ... T steps, those first whose conditional option is least likely.

    Each guided step takes the mean of its scales, given that it is guided.

    Args:
        p: Probabilities of the options at every step, with shape (T, 1 + k); the first is the
            conditional prediction alone.
        scales: Their scales, with shape (1 + k,); the first is 1.
        w: The scale that a factor of 1 stands for.
    """
    guided = p[:, 1:] / p[:, 1:].sum(1, keepdim=True)
    factors = ((guided @ scales[1:] - 1) / (w - 1)).tolist()
    order = p[:, 0].argsort().tolist()
    found = []
    for count in range(1, len(order) + 1):
        chosen = set(order[:count])
        choices: list[Choice] = ["both" if i in chosen else "cond" for i in range(len(order))]
        found.append(Schedule(tuple(choices), tuple(round(f, 4) for f in factors)))
    return found


def _latents(trials: Trials, batch: int, policy: Policy | None) -> Tensor:
    """Final latents of one batch; under a policy, a differentiable function of its scales."""
    call = trials.calls()[batch] | {"output_type": "latent"}
    if policy is None:
        return trials.pipe(guidance=trials.plain, **call).images.float()
    # The stock call without its torch.no_grad.
    stock_call = type(trials.pipe).stock_class.__call__.__wrapped__
    output = trials.pipe.call_guided(stock_call, guidance=trials.plain | policy, **call)
    return output.images.float()


@contextlib.contextmanager
def _differentiable(pipe: Any) -> Iterator[None]:
    """Gradients on, but not for weights; activations of the denoiser are recomputed."""
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    wanted = [p for network in networks for p in network.parameters() if p.requires_grad]
    denoisers: list[Any] = [
        n for n in networks if getattr(n, "_supports_gradient_checkpointing", False)
    ]
    switched = [n for n in denoisers if not n.is_gradient_checkpointing]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for network in switched:
            network.enable_gradient_checkpointing()
        with torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for network in switched:
            network.disable_gradient_checkpointing()
