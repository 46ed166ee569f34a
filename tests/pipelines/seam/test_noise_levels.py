"""Noise levels against every scheduler's own arithmetic, along its whole loop."""

from dataclasses import replace

import diffusers
import pytest
import torch
from packaging.version import Version

from pilotage.pipelines import (
    FusedEulerScheduler,
    FusedFlowMatchEulerScheduler,
    UnknownSchedulerError,
    noise_level,
)
from pilotage.pipelines.seam.noise_levels import (
    KNOWN,
    REFUSED,
    check_first_order,
    check_scheduler,
    prediction_type_of,
    scheduler_name,
)

from ...families import FAMILIES
from ...oracles.x0 import own_x0
from ..checks import apg_error

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
KARRAS = {"use_karras_sigmas": True}
NO_CLIP = {"clip_sample": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
KINDS = ("epsilon", "v_prediction", "sample")
EDM = ("CosineDPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
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
    for kind in ("epsilon", "v_prediction"):
        yield "DPMSolverSDEScheduler", SD | {"prediction_type": kind}
        yield "DPMSolverSDEScheduler", SD | KARRAS | {"prediction_type": kind}
        for name in EDM:
            yield name, {"prediction_type": kind}
            yield name, {"prediction_type": kind, "sigma_data": 0.7, "sigma_max": 20.0}
    for kind in ("epsilon", "sample"):
        yield "UnCLIPScheduler", NO_CLIP | {"prediction_type": kind}
    yield "IPNDMScheduler", {}
    yield "IPNDMScheduler", {"trained_betas": [0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0]}
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        yield name, FLOW
    yield "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}
    yield "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}
    yield "FlowMatchHeunDiscreteScheduler", {}
    yield "FlowMatchLCMScheduler", {"shift": 3.0}
    yield "LTXEulerAncestralRFScheduler", {}
    yield "MiniMaxH3Scheduler", {}
    for kind in ("unipc", "euler"):
        yield "HeliosScheduler", {"scheduler_type": kind, "stages": 1, "shift": 3.0}
    yield "HeliosScheduler", {"stages": 3}
    yield "HeliosDMDScheduler", {"stages": 3}


def identify(case):
    name, settings = case
    return name + "".join(f"-{v}" for k, v in settings.items() if k not in SD and v is not False)


def scheduler_agrees(name, settings):
    """Whether noise levels give the scheduler's own denoised image at every call of its loop."""
    generator = torch.Generator().manual_seed(0)
    scheduler = getattr(diffusers, name)(**settings)
    # The stages of Helios are runs of their own.
    scheduler.set_timesteps(6, **({"stage_index": 1} if settings.get("stages", 1) > 1 else {}))
    draw = torch.randn(2, 4, *(1,) * name.startswith("Helios"), 4, 4, generator=generator)
    x = draw * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for index, t in enumerate(scheduler.timesteps):
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        x_in, pred = scale(x, t), torch.randn(x.shape, generator=generator)
        ours = noise_level(scheduler, t).to_x0(pred.double(), x_in.double())
        own = own_x0(scheduler, index, pred, x_in).double()
        if not torch.allclose(ours, own, rtol=1e-4, atol=1e-4 * float(own.abs().max())):
            return False
        x = own_step(scheduler, pred, t, x, index)
    return True


def own_step(scheduler, pred, t, x, index):
    if type(scheduler).__name__ == "HeliosDMDScheduler":
        tables = {"dmd_sigmas": scheduler.sigmas, "dmd_timesteps": scheduler.timesteps}
        tables |= {"all_timesteps": scheduler.timesteps, "dmd_noisy_tensor": torch.ones_like(x)}
        return scheduler.step(pred, t, x, cur_sampling_step=index, return_dict=False, **tables)[0]
    return scheduler.step(pred, t, x, return_dict=False)[0]


# diffusers 0.38, the lowest that pyproject.toml allows, has not yet all of them.
CASES = [case for case in cases() if hasattr(diffusers, case[0])]


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_x0_is_the_schedulers_own(case):
    assert scheduler_agrees(*case)


PIPELINES = [
    ("CosineDPMSolverMultistepScheduler", {"sigma_max": 40.0, "prediction_type": "epsilon"}),
    ("DPMSolverSDEScheduler", SD | {"noise_sampler_seed": 0}),
    ("EDMDPMSolverMultistepScheduler", {"sigma_max": 20.0, "prediction_type": "v_prediction"}),
    ("EDMEulerScheduler", {"sigma_max": 20.0}),
    ("IPNDMScheduler", {}),
]


@pytest.mark.parametrize(("name", "settings"), PIPELINES)
def test_apg_in_a_pipeline_is_the_papers(name, settings, monkeypatch):
    """Denoised images and what becomes of them, by the scheduler's own code in float64."""
    family = FAMILIES["sd"]

    def build():
        pipe = family.build()
        pipe.scheduler = getattr(diffusers, name)(**settings)
        return pipe

    monkeypatch.setitem(FAMILIES, "sd", replace(family, build=build))
    assert apg_error("sd") < 1e-4


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
    if Version(diffusers.__version__) >= Version("0.42"):
        assert all(hasattr(diffusers, name) for name in KNOWN | set(REFUSED))
    assert tested <= KNOWN and not KNOWN & set(REFUSED)
    # In their pipelines only, or with code and tables of one that is tested.
    elsewhere = {"CogVideoXDPMScheduler", "DDPMWuerstchenScheduler"}
    assert KNOWN - tested == elsewhere | {"DDIMParallelScheduler", "DDPMParallelScheduler"}


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
    with pytest.raises(UnknownSchedulerError, match="of KarrasVeScheduler are not known") as found:
        check_scheduler(diffusers.KarrasVeScheduler())
    assert len(str(found.value).splitlines()) == 2
    with pytest.raises(UnknownSchedulerError, match="prediction_type"):
        prediction_type_of(diffusers.KarrasVeScheduler())
    with pytest.raises(UnknownSchedulerError, match="rotate the prediction.*\n.*DDIMScheduler"):
        check_scheduler(diffusers.SCMScheduler())
    for name, kind in (("DDIMScheduler", "score"), ("EDMEulerScheduler", "sample")):
        scheduler = getattr(diffusers, name)()
        scheduler.register_to_config(prediction_type=kind)
        with pytest.raises(UnknownSchedulerError, match=f"'{kind}'.*epsilon"):
            check_scheduler(scheduler)


BASES = [
    (diffusers.EulerDiscreteScheduler, SD),
    (diffusers.DDIMScheduler, SD | NO_CLIP),
    (diffusers.FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}),
    (diffusers.KDPM2AncestralDiscreteScheduler, SD),
    (diffusers.EDMEulerScheduler, {"prediction_type": "v_prediction"}),
    (FusedEulerScheduler, SD),
    (FusedFlowMatchEulerScheduler, {"shift": 3.0}),
]


@pytest.mark.parametrize(("base", "settings"), BASES)
def test_a_subclass_has_the_levels_of_its_base(base, settings):
    derived = type("Mine", (type("Middle", (base,), {}),), {})
    found = []
    for cls in (base, derived):
        scheduler = cls(**settings)
        scheduler.set_timesteps(4)
        x, levels = torch.ones(1, 4, 4, 4), []
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, t) if "shift" not in scheduler.config else x
            level = noise_level(scheduler, t)
            levels.append((float(level.alpha), float(level.sigma), level.prediction, level.sign))
            x = scheduler.step(0 * x_in, t, x, return_dict=False)[0]
        found.append(levels)
    assert found[0] == found[1]
    check_scheduler(scheduler)
    assert type(scheduler).__name__ == "Mine"


def test_a_subclass_with_a_step_of_its_own_is_not_of_first_order():
    plain = type("Renamed", (diffusers.EulerDiscreteScheduler,), {})()
    assert scheduler_name(plain) == "EulerDiscreteScheduler"
    check_first_order(plain, eta=0.0)

    class Churning(diffusers.EulerDiscreteScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, s_churn=1.0, **kwargs)

    with pytest.raises(UnknownSchedulerError, match="got Churning"):
        check_first_order(Churning(), eta=0.0)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"],
)
def test_a_timestep_may_be_given_for_every_sample(name):
    """As pipelines hand it to their network: a number, a tensor of one, one for each row."""
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(6)
    t = scheduler.timesteps[2]
    expected = noise_level(scheduler, t)
    for given in (t.item(), t[None], t.expand(3), t.expand(2, 1)):
        found = noise_level(scheduler, given)
        assert float(found.alpha) == float(expected.alpha)
        assert float(found.sigma) == float(expected.sigma)
    assert float(expected.sigma) > 0.2
