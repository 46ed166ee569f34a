"""Noise levels against every scheduler's own arithmetic, along its whole loop."""

import diffusers
import pytest
import torch

from pilotage.pipelines import UnknownSchedulerError, noise_level
from pilotage.pipelines.seam.noise_levels import (
    BY_FLOW_SIGMA,
    BY_SIGMA,
    BY_TIMESTEP,
    check_scheduler,
)

from ...oracles.x0 import own_x0

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
KARRAS = {"use_karras_sigmas": True}
NO_CLIP = {"clip_sample": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
KINDS = ("epsilon", "v_prediction", "sample")
NO_SAMPLE = {  # do not take networks that predict the sample
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
}


def cases():
    """(name, settings) of every scheduler under test."""
    by_kind = [
        ("DDIMScheduler", NO_CLIP),
        ("DDPMScheduler", NO_CLIP),
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", KARRAS),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", KARRAS),
        ("KDPM2DiscreteScheduler", {}),
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("LMSDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", KARRAS),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"} | KARRAS),
        ("DPMSolverSinglestepScheduler", {}),
        ("DEISMultistepScheduler", {}),
        ("SASolverScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", KARRAS),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
    ]
    for name, settings in by_kind:
        for kind in KINDS[:2] if name in NO_SAMPLE else KINDS:
            yield name, SD | settings | {"prediction_type": kind}
    for kind in ("epsilon", "v_prediction"):
        yield "PNDMScheduler", SD | {"prediction_type": kind, "skip_prk_steps": True}
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        extra = NO_CLIP if name == "DDIMScheduler" else {}
        yield name, SD | ZERO_SNR | extra | {"prediction_type": "v_prediction"}
    yield "CogVideoXDDIMScheduler", ZERO_SNR | NO_CLIP | {"prediction_type": "v_prediction"}
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        yield name, FLOW
    yield "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}
    yield "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}
    yield "FlowMatchHeunDiscreteScheduler", {}


def identify(case):
    name, settings = case
    return name + "".join(f"-{v}" for k, v in settings.items() if k not in SD and v is not False)


def scheduler_agrees(name, settings):
    """Whether noise levels give the scheduler's own denoised image at every call of its loop."""
    generator = torch.Generator().manual_seed(0)
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(6)
    draw = torch.randn(2, 4, 4, 4, generator=generator)
    x = draw * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for index, t in enumerate(scheduler.timesteps):
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        x_in, pred = scale(x, t), torch.randn(x.shape, generator=generator)
        ours = noise_level(scheduler, t).to_x0(pred.double(), x_in.double())
        own = own_x0(scheduler, index, pred, x_in).double()
        if not torch.allclose(ours, own, rtol=1e-4, atol=1e-4 * float(own.abs().max())):
            return False
        x = scheduler.step(pred, t, x, return_dict=False)[0]
    return True


@pytest.mark.parametrize("case", list(cases()), ids=identify)
def test_x0_is_the_schedulers_own(case):
    assert scheduler_agrees(*case)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("HeunDiscreteScheduler", 11),
        ("KDPM2DiscreteScheduler", 11),
        ("KDPM2AncestralDiscreteScheduler", 11),
        ("FlowMatchHeunDiscreteScheduler", 11),
        ("PNDMScheduler", 7),
        ("DPMSolverMultistepScheduler", 6),
    ],
)
def test_levels_fall_along_the_whole_loop(name, calls):
    """Second-order schedulers evaluate 2N - 1 times; each evaluation has a level of its own."""
    extra = {} if name.startswith("FlowMatch") else SD
    extra = extra | ({"skip_prk_steps": True} if name == "PNDMScheduler" else {})
    scheduler = getattr(diffusers, name)(**extra)
    scheduler.set_timesteps(6)
    x, sigmas = torch.randn(1, 1, 4, 4), []
    for t in scheduler.timesteps:
        sigmas.append(float(noise_level(scheduler, t).sigma))
        x = scheduler.step(torch.randn_like(x), t, x, return_dict=False)[0]
    assert len(sigmas) == calls
    assert sigmas[0] > sigmas[-1]
    assert all(a >= b - 1e-6 for a, b in zip(sigmas, sigmas[1:], strict=False))


def test_every_listed_scheduler_exists_and_is_known():
    tested = {name for name, _ in cases()}
    for name in BY_TIMESTEP | BY_SIGMA | BY_FLOW_SIGMA:
        assert hasattr(diffusers, name)
    assert tested <= BY_TIMESTEP | BY_SIGMA | BY_FLOW_SIGMA


def test_image_to_image_starts_within_the_table():
    """After set_begin_index the level is that of the first timestep used, not of the table's."""
    for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        scheduler = getattr(diffusers, name)(**SD)
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(4)
        level = noise_level(scheduler, scheduler.timesteps[4])
        ratio = float(level.sigma) / float(level.alpha)
        assert ratio == pytest.approx(float(scheduler.sigmas[4]), rel=1e-5)


def test_unknown_schedulers_and_predictions_are_refused():
    with pytest.raises(UnknownSchedulerError, match="EDMEulerScheduler.*DDIMScheduler"):
        check_scheduler(diffusers.EDMEulerScheduler())
    scheduler = diffusers.DDIMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(UnknownSchedulerError, match="'score'.*epsilon"):
        check_scheduler(scheduler)
