"""The fused schedulers against the stock ones they replace."""

import copy
import json
import pickle

import diffusers
import pytest
import torch

from examples.studies.schedulers import InDouble, compare, draw
from pilotage.eval.embedded import load_embedded
from pilotage.guidance import APG, AdaptiveGuidance, prediction
from pilotage.pipelines import (
    FusedDDIMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerScheduler,
    FusedFlowMatchEulerScheduler,
    guided,
    noise_level,
)
from pilotage.pipelines.schedulers import FusedScheduler
from pilotage.pipelines.seam import driver, patterns

from ...families import FAMILIES
from ...syncs import HostReads

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
SAMPLE = {"prediction_type": "sample"}
TRAILING = {"timestep_spacing": "trailing"}
ZERO_SNR = {"rescale_betas_zero_snr": True} | TRAILING | V
KARRAS = {"use_karras_sigmas": True}
MU = {"mu": 1.3}
AG = AdaptiveGuidance(0.99)
DDIM, EULER = FusedDDIMScheduler, FusedEulerScheduler
DPM, FLOW = FusedDPMSolverMultistepScheduler, FusedFlowMatchEulerScheduler

CASES = [  # scheduler, settings, options of set_timesteps, options of step
    (EULER, {}, {}, {}),
    (EULER, V, {}, {}),
    (EULER, SAMPLE, {}, {}),
    (EULER, KARRAS, {}, {}),
    (EULER, {"use_exponential_sigmas": True, "steps_offset": 1}, {}, {}),
    (EULER, {"use_beta_sigmas": True, "timestep_spacing": "leading"}, {}, {}),
    (EULER, {"final_sigmas_type": "sigma_min"}, {}, {}),
    (EULER, {"timestep_type": "continuous", **V, **KARRAS}, {}, {}),
    (EULER, {}, {"num_inference_steps": None, "sigmas": [12.0, 4.0, 1.0, 0.2, 0.0]}, {}),
    (EULER, {}, {}, {"s_churn": 2.0, "s_noise": 1.01}),
    (DDIM, {}, {}, {}),
    (DDIM, {"clip_sample": False}, {}, {}),
    (DDIM, {"clip_sample": False} | V, {}, {}),
    (DDIM, {"clip_sample": False} | SAMPLE, {}, {}),
    (DDIM, {"clip_sample": False, "rescale_betas_zero_snr": True} | V | TRAILING, {}, {}),
    (DDIM, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {}, {}),
    (DDIM, {"timestep_spacing": "linspace"}, {}, {"eta": 0.7}),
    (DDIM, {"clip_sample_range": 0.5}, {}, {"use_clipped_model_output": True, "eta": 1.0}),
    (DDIM, {"thresholding": True, "sample_max_value": 1.5}, {}, {}),
    (DPM, {}, {}, {}),
    (DPM, V, {}, {}),
    (DPM, SAMPLE, {}, {}),
    (DPM, ZERO_SNR, {}, {}),
    (DPM, KARRAS, {}, {}),
    (DPM, {"solver_order": 1}, {}, {}),
    (DPM, {"solver_type": "heun", "lower_order_final": False}, {}, {}),
    (DPM, {"final_sigmas_type": "sigma_min", "lower_order_final": False}, {}, {}),
    (DPM, {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {}, {}),
    (DPM, {"use_lu_lambdas": True}, {}, {}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, {}, {}),
    (DPM, {"thresholding": True}, {}, {}),
    (DPM, {"algorithm_type": "sde-dpmsolver++"} | KARRAS, {}, {}),
    (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}, {}),
    (
        DPM,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        {},
        {},
    ),
    (FLOW, {}, {}, {}),
    (FLOW, {"shift": 3.0}, {}, {}),
    (FLOW, {"shift_terminal": 0.1, **KARRAS}, {}, {}),
    (FLOW, {"invert_sigmas": True}, {}, {}),
    (FLOW, {"stochastic_sampling": True}, {}, {}),
    (FLOW, {"use_dynamic_shifting": True}, MU, {}),
    (FLOW, {"use_dynamic_shifting": True, "time_shift_type": "linear"}, MU, {}),
    (FLOW, {}, {"sigmas": [1.0, 0.7, 0.3, 0.0], "num_inference_steps": 4}, {}),
]


def identify(case):
    cls, *options = case
    words = [f"{k}={v}" for option in options for k, v in option.items()]
    return "-".join([cls.__qualname__, *words])


def build(cls, settings):
    """The stock scheduler and ours from its configuration."""
    stock = cls.stock_class(**(settings if cls is FLOW else SD | settings))
    return stock, cls.from_config(stock.config)


def network(x, t, kind):
    """A smooth function in place of a network, with outputs of the size of real ones."""
    wave = torch.sin(3 * x.flip(-1) + float(t) / 300) * torch.cos(x.roll(1, 2))
    guess = 0.6 * torch.tanh(x) + 0.3 * wave
    return x - guess if kind == "flow" else {"epsilon": 0.9 * x - 0.4 * wave}.get(kind, guess)


def trajectory(scheduler, given, taken, steps=7, begin=0, dtype=torch.float32):
    """Every sample along a run, and the denoised images where the scheduler reports them."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} | given))
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    kind = "flow" if hasattr(scheduler, "shift") else scheduler.config.prediction_type
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (noise * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
    generator = torch.Generator().manual_seed(1)
    extra = {"generator": generator} if "eta" in taken or "s_churn" in taken else {}
    if scheduler.config.get("stochastic_sampling") or "sde" in str(scheduler.config):
        extra = {"generator": generator}
    samples, denoised = [], []
    for t in scheduler.timesteps[begin:]:
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        pred = network(scale(x, t).float(), t, kind).to(dtype)
        x, *rest = scheduler.step(pred, t, x, return_dict=False, **taken, **extra)
        samples.append(x)
        denoised += rest
    return samples, denoised


def relative(ours, stock):
    ours, stock = ours.double(), stock.double()
    return float((ours - stock).norm() / stock.norm())


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_trajectory_is_the_stock_schedulers(case):
    cls, settings, given, taken = case
    stock, ours = build(cls, settings)
    assert isinstance(ours, cls)
    counts = (given["num_inference_steps"],) if "num_inference_steps" in given else (7, 20)
    for steps in counts:
        extra = {"steps": steps}
        expected, expected_x0 = trajectory(stock, given, taken, **extra)
        found, found_x0 = trajectory(ours, given, taken, **extra)
        assert torch.equal(ours.timesteps, stock.timesteps)
        for a, b in zip(found + found_x0, expected + expected_x0, strict=True):
            assert relative(a, b) <= 1e-5


def test_any_options_as_exact_as_stock():
    """Options drawn at random, against stock's own code in float64: see the study."""
    found = compare(600)
    assert not found["faults"]
    assert found["above_slack"] == found["non_finite"] == 0
    assert len(found["by_scheduler"]) == 4 and min(found["by_scheduler"].values()) > 60


def test_draws_reach_the_options():
    """Every value of what a scheduler does in a step, among the draws of the test above."""
    cases = [draw(number) for number in range(600)]
    for cls, name, values in [
        (DDIM, "clip_sample", {True, False}),
        (DDIM, "thresholding", {True, False}),
        (DDIM, "rescale_betas_zero_snr", {True, False}),
        (DDIM, "prediction_type", {"epsilon", "v_prediction", "sample"}),
        (EULER, "use_karras_sigmas", {True, None}),
        (EULER, "final_sigmas_type", {"zero", "sigma_min"}),
        (DPM, "algorithm_type", {"dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"}),
        (DPM, "solver_order", {1, 2, 3}),
        (DPM, "solver_type", {"midpoint", "heun"}),
        (DPM, "use_flow_sigmas", {True, None}),
        (FLOW, "invert_sigmas", {True, False}),
        (FLOW, "stochastic_sampling", {True, False}),
    ]:
        assert {c.settings.get(name) for c in cases if c.scheduler is cls} == values
    assert {c.taken["eta"] for c in cases if c.scheduler is DDIM} == {0.0, 0.3, 1.0}


def test_the_reference_computes_in_double_with_the_same_noise():
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain = torch.randn(3, generator=generators[0], dtype=torch.float16)
    with InDouble(torch.float16):
        assert torch.ones(2, dtype=torch.float64).to(torch.float32).dtype is torch.float64
        noise = torch.randn(3, generator=generators[1], dtype=torch.float64)
    assert torch.equal(noise, plain.double())


def test_almost_nothing_of_a_picture_is_kept():
    """Of cosine betas alpha ends at 5e-5, and sigma differs from 1 by less than float32 tells."""
    settings = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False} | TRAILING
    ours = build(DDIM, settings)[1]
    ours.set_timesteps(5)
    t, x = ours.timesteps[0], torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    a, before = ours.alphas_cumprod.double()[[int(t), int(t) - 200]]
    x0 = (x.double() - (1 - a).sqrt() * x.double()) / a.sqrt()
    expected = before.sqrt() * x0 + (1 - before).sqrt() * x.double()
    found = ours.step(x, t, x)
    assert relative(found.pred_original_sample, x0) < 1e-6
    assert relative(found.prev_sample, expected) < 1e-6


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_ddpm_from_zero_snr_is_finite(kind):
    """At some numbers of steps stock takes the root of a number below zero there.

    DDIM at eta = 1 is DDPM's posterior: Ho et al., equation 7, of a step from `a` to `before`.
    """
    settings = ZERO_SNR | {"prediction_type": kind, "clip_sample": False}
    source = torch.Generator().manual_seed(0)
    x, pred, noise = (torch.randn(1, 3, 8, 8, generator=source) for _ in range(3))
    for steps in range(2, 31):
        ours = build(DDIM, settings)[1]
        ours.set_timesteps(steps)
        t = ours.timesteps[0]
        table = ours.alphas_cumprod.double()
        a, before = table[t], table[t - 1000 // steps]
        x0 = pred.double() if kind == "sample" else a.sqrt() * x - (1 - a).sqrt() * pred.double()
        ratio = a / before
        mean = (
            before.sqrt() * (1 - ratio) / (1 - a) * x0 + ratio.sqrt() * (1 - before) / (1 - a) * x
        )
        expected = mean + ((1 - before) / (1 - a) * (1 - ratio)).sqrt() * noise
        found = ours.step(pred, t, x, eta=1.0, variance_noise=noise).prev_sample
        assert relative(found, expected) < 1e-6


def test_a_last_step_that_goes_nowhere():
    """Its noise levels are equal but for rounding: no root of what is below zero."""
    settings = {
        "algorithm_type": "sde-dpmsolver++",
        "beta_schedule": "squaredcos_cap_v2",
        "use_lu_lambdas": True,
        "final_sigmas_type": "sigma_min",
    }
    for scheduler in build(DPM, settings):
        assert all(x.isfinite().all() for x in trajectory(scheduler, {}, {})[0])


def test_zero_snr_euler_is_nearer_to_the_exact_result_than_stock():
    """At sigma = 4096 the stock step cancels in float32, which costs it about 1e-5 by itself."""
    stock, ours = build(EULER, ZERO_SNR)
    expected, found = (trajectory(s, {}, {})[0][-1] for s in (stock, ours))
    sigmas = stock.sigmas.double()
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (noise * float(stock.init_noise_sigma)).double()
    for t, sigma, sigma_next in zip(stock.timesteps, sigmas, sigmas[1:], strict=False):
        root = (sigma**2 + 1).sqrt()
        pred = network((x / root).float(), t, "v_prediction").double()
        x0 = x / root**2 - pred * sigma / root
        x = x + (sigma_next - sigma) * (x - x0) / sigma
    assert relative(found, x) <= 1e-5
    assert relative(found, x) < relative(expected, x)


@pytest.mark.parametrize("cls", [EULER, DDIM, DPM, FLOW])
def test_begin_within_the_table(cls):
    """With a begin index, and without one by the first timestep, as image-to-image does."""
    for begin, sets_index in ((3, True), (3, False)):
        stock, ours = build(cls, {})
        if not sets_index:
            stock.__dict__["set_begin_index"] = ours.__dict__["set_begin_index"] = lambda _: None
        expected, found = (trajectory(s, {}, {}, begin=begin)[0] for s in (stock, ours))
        assert len(found) == 4
        assert max(map(relative, found, expected)) <= 1e-5


@pytest.mark.parametrize("cls", [EULER, DDIM, DPM, FLOW])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_dtype_and_is_no_worse_than_stock(cls, dtype):
    settings = {"clip_sample": False} if cls is DDIM else {}
    exact = trajectory(build(cls, settings)[0], {}, {})[0][-1]
    stock, ours = (trajectory(s, {}, {}, dtype=dtype)[0][-1] for s in build(cls, settings))
    assert ours.dtype == stock.dtype == dtype
    assert relative(ours, exact) <= 2 * relative(stock, exact)


@pytest.mark.parametrize("cls", [EULER, DDIM, DPM, FLOW])
def test_noise_levels_are_those_of_the_stock_scheduler(cls):
    settings = {"clip_sample": False} | V if cls is DDIM else {}
    stock, ours = build(cls, settings)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    x = torch.ones(1, 3, 4, 4)
    for t_stock, t in zip(stock.timesteps, ours.timesteps, strict=True):
        expected, level = noise_level(stock, t_stock), noise_level(ours, t)
        assert level.prediction == expected.prediction and level.sign == expected.sign
        assert level.alpha == pytest.approx(float(expected.alpha), rel=1e-6)
        assert level.sigma == pytest.approx(float(expected.sigma), rel=1e-6)
        stock.step(x, t_stock, x)
        ours.step(x, t, x)


def is_fused(case):
    """Whether a step is ours; of the others the stock scheduler reads what it likes."""
    cls, settings, _, taken = case
    return cls is DDIM or (not taken and "thresholding" not in settings)


@pytest.mark.parametrize("case", [case for case in CASES if is_fused(case)], ids=identify)
def test_nothing_is_read_back(case):
    """Neither on the CPU, nor with everything on a device that has no values at all."""
    cls, settings, given, taken = case
    _, ours = build(cls, settings)
    given = {"num_inference_steps": 4} | given
    for device in ("cpu", "meta"):
        if device == "meta" and cls is FLOW and settings.get("stochastic_sampling"):
            continue  # its noise is the stock scheduler's own business
        ours.set_timesteps(**given, device=device)
        x = torch.ones(1, 3, 8, 8, device=device, dtype=torch.float16)
        with HostReads():
            for t in ours.timesteps:
                scale = getattr(ours, "scale_model_input", lambda x, t: x)
                pred = scale(x, t) * 0.5
                noise_level(ours, t)
                x = ours.step(pred, t, x, return_dict=False, **taken)[0]
        assert x.device.type == device


PIPELINES = [
    ("sdxl", EULER, {}),
    ("sd", DPM, KARRAS),
    ("sd_img2img", DDIM, {}),
    ("sd_img2img", DPM, {}),
    ("sdxl_img2img", EULER, {}),
    ("sd3", FLOW, {}),
    ("flux", FLOW, {}),
    ("mochi", FLOW, {}),
]


@pytest.mark.parametrize(("name", "cls", "extra"), PIPELINES)
def test_in_a_pipeline(name, cls, extra):
    family = FAMILIES[name]
    negative = family.scale_name == "true_cfg_scale"
    found = {}
    for swap in (cls.stock_class, cls):
        pipe = guided(family.build())
        pipe.scheduler = swap.from_config(pipe.scheduler.config, **extra)
        for guidance in (None, APG(norm_threshold=0.5)):
            latents = pipe(**family.call(2, negative), guidance=guidance)[0]
            found[swap, guidance] = torch.as_tensor(latents)
    for guidance in {guidance for _, guidance in found}:
        assert relative(found[cls, guidance], found[cls.stock_class, guidance]) <= 1e-5


def test_a_saved_pipeline_names_and_loads_the_stock_class(tmp_path):
    pipe = FAMILIES["sd"].build()
    pipe.scheduler = EULER.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.EulerDiscreteScheduler
    assert loaded.scheduler.config.use_karras_sigmas
    ours = EULER.from_pretrained(tmp_path / "scheduler")
    assert isinstance(ours, EULER) and ours.config.use_karras_sigmas
    assert "FusedEulerScheduler" in repr(type(ours))
    assert set(loaded.scheduler.compatibles) == set(ours.compatibles)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_where_the_original_is(duplicate):
    _, ours = build(DPM, {})
    ours.set_timesteps(6)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in ours.timesteps[:3]:
        x = ours.step(0.5 * x, t, x).prev_sample
    twin = duplicate(ours)
    assert type(twin) is DPM
    steps = [s.step(0.5 * x, s.timesteps[3], x).prev_sample for s in (ours, twin)]
    assert torch.equal(*steps)


class Mine(EULER):
    pass


class Mixin:
    pass


class Later(FusedScheduler):
    """A base of fused schedulers to come, which has no stock scheduler yet."""


class Heir(Mixin, Mine):
    def step(self, *args, **options):
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(*args, **options)


@pytest.mark.parametrize("cls", [Mine, Heir])
def test_descendants_step_as_their_base(cls):
    stock, ours = build(cls, KARRAS)
    assert type(ours) is cls and ours.stock_class is EULER.stock_class
    for taken in ({}, {"s_churn": 2.0}):  # ours, and the stock scheduler's own step
        expected, found = (trajectory(s, {}, taken)[0] for s in (stock, ours))
        assert max(map(relative, found, expected)) <= 1e-5
    if cls is Heir:
        assert ours.steps == 14
        assert type(pickle.loads(pickle.dumps(ours))) is Heir


def test_a_subclass_keeps_its_name_and_can_be_copied():
    ours = Mine(**SD)
    ours.set_timesteps(4)
    assert type(ours).__name__ == "Mine" and type(pickle.loads(pickle.dumps(ours))) is Mine
    assert noise_level(copy.deepcopy(ours), ours.timesteps[2]).ratio > 0


def test_exchanged_timesteps_are_noticed():
    """Some pipelines shorten `scheduler.timesteps` by hand."""
    stock, ours = build(DDIM, {})
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    steps = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8)
        scheduler.timesteps = scheduler.timesteps[2:].clone()
        steps.append(scheduler.step(x, scheduler.timesteps[1], x).prev_sample)
    assert relative(steps[1], steps[0]) <= 1e-5


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (DPM, {"solver_order": 3}, r"solver_order 1 and 2 \(got 3"),
        (
            DPM,
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            r"'dpmsolver\+\+'.*got 'dpmsolver'",
        ),
        (DDIM, {"rescale_betas_zero_snr": True}, "'epsilon', expected 'v_prediction'"),
        (EULER, {"prediction_type": "score"}, "'score'"),
        (DPM, {"prediction_type": "flow_prediction"}, "use_flow_sigmas=True, got False"),
    ],
)
def test_settings_that_are_not_there_are_refused(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(EULER, {}), (EULER, KARRAS), (EULER, {"timestep_type": "continuous", **V}), (FLOW, {})],
)
def test_before_set_timesteps_there_is_the_training_table(cls, settings):
    stock, ours = build(cls, settings)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for scheduler in (stock, ours):
        t, taken = scheduler.timesteps[600], []
        level = noise_level(scheduler, t)
        taken += [torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)]
        if hasattr(scheduler, "scale_model_input"):
            taken.append(scheduler.scale_model_input(x, t))
        taken += [scheduler.step(0.5 * x, t, x, return_dict=False)[0] for _ in range(2)]
        found.append(taken)
    assert all(relative(one, other) < 1e-5 for one, other in zip(*found, strict=True))


def test_ddim_has_noise_levels_before_set_timesteps():
    stock, ours = build(DDIM, V)
    for t in (600, torch.tensor(600)):
        expected, level = noise_level(stock, t), noise_level(ours, t)
        assert level.sigma == pytest.approx(float(expected.sigma), rel=1e-6)


def test_misuse_is_refused():
    x = torch.zeros(1, 3, 4, 4)
    euler, flow, dpm = EULER(), FLOW(), DPM()
    for scheduler in (dpm, DDIM()):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(x, 10, x)
    euler.set_timesteps(4)
    flow.set_timesteps(4)
    with pytest.raises(ValueError, match="12345.0 is not one of the scheduler's 4"):
        euler.step(x, 12345.0, x)
    with pytest.raises(ValueError, match="integer 3"):
        euler.step(x, 3, x)
    with pytest.raises(ValueError, match="per_token_timesteps"):
        flow.step(x, flow.timesteps[0], x, per_token_timesteps=torch.ones(1, 4))
    with pytest.raises(ValueError, match="both"):
        ddim = DDIM()
        ddim.set_timesteps(4)
        ddim.step(x, 999, x, eta=1.0, variance_noise=x, generator=torch.Generator())


@pytest.fixture(scope="module")
def loops():
    """A tiny pipeline, and a trained one, whose samples can stop at different steps."""
    tiny, trained = guided(FAMILIES["sd"].build()), load_embedded()
    trained.set_progress_bar_config(disable=True)
    prompts = {"prompt": ["noto style fox", "twemoji style red apple"], "output_type": "latent"}
    for pipe in (tiny, trained):
        pipe.scheduler = DPM.from_config(pipe.scheduler.config)
    return (tiny, FAMILIES["sd"].call(2, False)), (trained, prompts)


@pytest.mark.parametrize("guidance", ["cfg", "apg", "rescale", "hold", AG, APG() | AG], ids=str)
def test_a_guided_loop_reads_nothing_back(guidance, loops, monkeypatch):
    """Twice the steps, no more reads: decisions come from values already on the host.

    As on a device, where a stop takes effect a step later; the samples stop at different steps.
    Only the first call reads something more, to learn how the pipeline guides.
    """
    for module in (driver, patterns, prediction):
        monkeypatch.setattr(module, "on_host", lambda device: False)
    adaptive = "Adaptive" in str(guidance)
    known, call = loops[adaptive]
    found = {}
    for steps in (5, 10):
        pipe = type(known).from_pipe(known)
        pipe.set_progress_bar_config(disable=True)
        for kind in ("first", "other"):
            with HostReads(refuse=False) as reads:
                pipe(**call | {"guidance": guidance, "num_inference_steps": steps})
            found[kind, steps] = reads.found
    assert found["first", 5] == found["first", 10]
    assert found["other", 5] == found["other", 10] and len(found["other", 5]) <= 2
    if adaptive:
        assert len(set(pipe.guidance_trace.nfe)) > 1
