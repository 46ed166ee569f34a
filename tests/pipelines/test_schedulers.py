"""Noise levels against every scheduler's own arithmetic, along its whole loop."""

import diffusers
import pytest
import torch

from pilotage.pipelines import UnknownSchedulerError, noise_level
from pilotage.pipelines.noise_levels import BY_FLOW_SIGMA, BY_SIGMA, BY_TIMESTEP, check_scheduler

from .x0_oracle import own_x0

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


@pytest.mark.parametrize("case", list(cases()), ids=identify)
def test_x0_is_the_schedulers_own(case):
    name, settings = case
    torch.manual_seed(0)
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(6)
    x = torch.randn(2, 4, 4, 4) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    calls = len(scheduler.timesteps)
    second_order = {
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    }
    assert calls == (11 if name in second_order else 7 if name == "PNDMScheduler" else 6)
    seen = []
    for index, t in enumerate(scheduler.timesteps):
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        x_in, pred = scale(x, t), torch.randn_like(x)
        level = noise_level(scheduler, t)
        ours = level.to_x0(pred.double(), x_in.double())
        own = own_x0(scheduler, index, pred, x_in)
        torch.testing.assert_close(
            ours, own.double(), rtol=1e-4, atol=1e-4 * float(own.abs().max())
        )
        seen.append(float(level.sigma))
        x = scheduler.step(pred, t, x, return_dict=False)[0]
    assert seen[0] == max(seen) and len(set(seen)) > 1


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
