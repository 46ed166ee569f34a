"""Whether a `Guider` guides every modular pipeline of diffusers that has a place for it.

With "cfg" as diffusers' own guider does, bit for bit; with APG as the paper's algorithm in float64
does within the stock pipeline; with Adaptive Guidance in as many passes as it promises.
"""

from typing import Any

import torch

from pilotage.guidance import APG, CFG, AdaptiveGuidance, Guidance
from pilotage.pipelines.guiders import Guider
from pilotage.pipelines.seam.support import guiders_of

from .workflows import MODULAR, SCALE, stock_guider
from ..pipelines.checks import PaperGuidance, equal, run


def use(pipe: Any, guider: Any) -> Any:
    """Makes `guider` the guider of `pipe`, and ones like it of what else it guides."""
    parts = {"guider": guider}
    for name in guiders_of(pipe)[1:]:
        own = isinstance(guider, Guider)
        parts[name] = guider.partner(SCALE) if own else stock_guider(pipe)
    pipe.update_components(**parts)
    return guider


def guided_latents(
    name: str, guidance: str | Guidance | None, pipe: Any = None, **extra: Any
) -> tuple[torch.Tensor, Any]:
    """What a pipeline returns with a guidance (None: diffusers' own guider), and its guider."""
    family = MODULAR[name]
    pipe = family.build() if pipe is None else pipe
    call = family.call(family.max_batch, True) | extra
    if guidance is None:
        guider = use(pipe, stock_guider(pipe))
    else:
        guider = use(pipe, Guider(guidance, SCALE).bind(pipe))  # the call has the scales
    return run(pipe, call)[0], guider


def modular_cfg_bit_equal(name: str) -> bool:
    """Whether "cfg" is diffusers' own guider, for one sample and several."""
    pipe = MODULAR[name].build()
    expected, _ = guided_latents(name, None, pipe)
    found, _ = guided_latents(name, "cfg", pipe)
    return equal(found, expected)


def modular_apg_error(name: str) -> float:
    """Relative difference from the stock pipeline led by the paper's algorithm in float64."""
    family = MODULAR[name]
    eta, r, beta = 0.2, 2.0, -0.6
    rule = APG(eta=eta, norm_threshold=r, momentum=beta, threshold_unit="l2")
    found, _ = guided_latents(name, rule)
    plain, _ = guided_latents(name, None)
    paper = PaperGuidance(family, lambda: family.call(family.max_batch, True), eta, r, beta).run()
    found, plain, expected = (v.double() for v in (found, plain, paper[0]))
    assert (plain - expected).norm() / expected.norm() > 1e-3, "APG must change something"
    return ((found - expected).norm() / expected.norm()).item()


class Pieces(Guider):
    """Counts the runs: some pipelines make a video piece by piece, or from coarse to fine."""

    runs = 0

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self.runs += step == 0


def modular_passes_ok(name: str) -> bool:
    """Whether the network is asked as often as Adaptive Guidance promises."""
    family = MODULAR[name]
    for threshold, guided_steps in ((-1.0, 1), (1.5, None)):
        pipe, calls = family.build(), []

        def count(module: Any, args: Any, kwargs: Any, calls: list = calls) -> None:
            calls += [1] * family.steps(kwargs)

        for denoiser in family.denoisers:
            getattr(pipe, denoiser).register_forward_pre_hook(count, with_kwargs=True)
        guider = use(pipe, Pieces(CFG() | AdaptiveGuidance(threshold), SCALE).bind(pipe))
        run(pipe, family.call(family.max_batch, True))
        steps = len(guider.guidance_trace.steps)
        if guider.passes != steps + (guided_steps or steps):
            return False
        if len(calls) != guider.runs * guider.passes:
            return False
    return True
