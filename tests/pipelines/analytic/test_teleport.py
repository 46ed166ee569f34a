"""Teleported schedulers: exact for Gaussian data, stock where nothing is to be skipped."""

import copy
import inspect
import math
import pickle

import diffusers
import pytest
import torch

from pilotage.guidance.analytic import DatasetStatistics
from pilotage.pipelines import (
    FusedDDIMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerScheduler,
    FusedFlowMatchEulerScheduler,
    GaussianTeleport,
    guided,
    noise_level,
)
from pilotage.pipelines.analytic.teleport import (
    EXPLAINED,
    SCHEDULERS,
    levels,
    trusted_sigma,
)

from ...components import generators
from ...families import FAMILIES
from ...families.base import ddim

SHAPE = (1, 4, 4)
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
NO_CLIP = {"clip_sample": False}
# Deterministic samplers whose limit, with many steps, is the probability flow.
FLOWS = [
    ("DDIMScheduler", LINEAR | NO_CLIP | {"prediction_type": "epsilon"}),
    ("DDIMScheduler", LINEAR | NO_CLIP | ZERO_SNR | {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", LINEAR | ZERO_SNR | {"prediction_type": "v_prediction"}),
    ("DPMSolverSinglestepScheduler", LINEAR | {"lower_order_final": True}),
    ("DEISMultistepScheduler", LINEAR),
    ("UniPCMultistepScheduler", LINEAR),
    ("EulerDiscreteScheduler", LINEAR | {"use_karras_sigmas": True}),
    ("HeunDiscreteScheduler", LINEAR),
    ("KDPM2DiscreteScheduler", LINEAR),
    ("LMSDiscreteScheduler", LINEAR),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {}),
]


@pytest.fixture(scope="module")
def statistics():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator, dtype=torch.float64) * 0.3
    x = torch.randn(400, 16, generator=generator, dtype=torch.float64) @ mix + 0.4
    return DatasetStatistics.from_images(x.view(-1, *SHAPE), value_range=None)


def network(statistics, scheduler, x_in, t):
    """The exact prediction for Gaussian data."""
    level = noise_level(scheduler, t)
    alpha, sigma = float(level.alpha), float(level.sigma)
    values = lambda v: alpha * v / (alpha**2 * v + sigma**2)  # noqa: E731
    x0 = statistics.mean + statistics.apply(x_in - alpha * statistics.mean, values)
    if alpha == 0:  # only v can be predicted there
        return -x0
    return level.from_x0(x0, x_in)


def sample(statistics, scheduler, steps, x, scaled=True):
    """A plain sampling loop; also returns the number of evaluations."""
    scheduler.set_timesteps(steps)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    count = 0
    for t in scheduler.timesteps:
        scale = getattr(scheduler, "scale_model_input", None) if scaled else None
        x_in = x if scale is None else scale(x, t)
        count += 1
        x = scheduler.step(network(statistics, scheduler, x_in, t), t, x).prev_sample
    return x, count


@pytest.mark.parametrize("case", range(len(FLOWS)), ids=lambda i: f"{i}-{FLOWS[i][0]}")
def test_for_gaussian_data_nothing_is_lost(statistics, case):
    """The closed form down to zero is the truth: teleported runs come as near as full ones."""
    name, settings = FLOWS[case]
    steps = 40 if name in ("KDPM2DiscreteScheduler", "LMSDiscreteScheduler") else 100  # slow ones
    stock = getattr(diffusers, name)(**settings)
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full, count = sample(statistics, stock, steps, noise)
    start = noise * float(getattr(stock, "init_noise_sigma", 1.0))
    exact = statistics.teleport(start, levels(stock)[0], (1.0, 0.0))
    error, size = (full - exact).norm(), (exact - statistics.mean).norm()
    assert error < 0.1 * size
    for jump in ("auto", "input") if case < 3 else ("auto",):
        fast = GaussianTeleport(stock, statistics, sigma_skip=2.0, jump=jump)
        short, fewer = sample(statistics, fast, steps, noise)
        assert count - fewer == fast.skipped >= steps // 10
        assert (short - exact).norm() < 1.1 * error + 1e-3 * size


def test_closed_form_composes_and_needs_no_signal_at_its_start(statistics):
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start, middle, end = (0.0, 1.0), (0.6, 0.8), (0.9, 0.3)
    once = statistics.teleport(x, start, end)
    twice = statistics.teleport(statistics.teleport(x, start, middle), middle, end)
    torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-12)
    exploding = statistics.teleport(x / middle[0], (1.0, 0.8 / 0.6), (1.0, 0.3 / 0.9))
    torch.testing.assert_close(
        statistics.teleport(x, middle, end), 0.9 * exploding, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nothing_to_skip_is_the_stock_scheduler_bit_for_bit(statistics, name):
    stock = getattr(diffusers, name)()
    same = GaussianTeleport(stock, statistics, sigma_skip=math.inf)
    assert type(same).__name__ == name and isinstance(same, type(stock))
    results = []
    for scheduler in (stock, same):
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(6)
        x = torch.randn(2, *SHAPE, generator=generator)
        takes = inspect.signature(scheduler.step).parameters
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            pred = torch.randn(x.shape, generator=generator)
            extra = {"generator": generator} if "generator" in takes else {}
            x = scheduler.step(pred, t, x, **extra).prev_sample
        results.append(x)
    assert torch.equal(*results)


def test_auto_is_the_level_that_is_explained(statistics):
    sigma = trusted_sigma(statistics)
    assert statistics.explained(sigma) == pytest.approx(EXPLAINED, abs=1e-9)
    assert GaussianTeleport(diffusers.DDIMScheduler(), statistics).sigma_skip == sigma


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_pipelines_that_do_not_scale_their_input(name):
    """DDIMPipeline and DDPMPipeline hand the noise to the network unseen by the scheduler."""
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8),
        norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    pipe_class = getattr(diffusers, name.replace("Scheduler", "Pipeline"))
    pipe = pipe_class(unet, getattr(diffusers, name)(**LINEAR, **NO_CLIP))
    pipe.set_progress_bar_config(disable=True)
    data = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    statistics = DatasetStatistics.from_images(data)
    stock = pipe.scheduler
    seen = []
    unet.register_forward_hook(lambda _m, args, _o: seen.append((float(args[1]), args[0])))

    def run(scheduler):
        pipe.scheduler = scheduler
        seen.clear()
        generator = torch.Generator().manual_seed(3)
        return pipe(
            batch_size=2, num_inference_steps=10, generator=generator, output_type="np"
        ).images

    run(stock)
    full = [t for t, _ in seen]
    run(GaussianTeleport(stock, statistics, sigma_skip=1.0))
    skipped = pipe.scheduler.skipped
    assert skipped >= 3 and [t for t, _ in seen] == full[skipped:]
    alphas = stock.alphas_cumprod.double()[[int(full[0]), int(full[skipped + 1])]].sqrt().tolist()
    source, target = ((a, math.sqrt(1 - a * a)) for a in alphas)
    moved = statistics.teleport(seen[0][1], source, target)
    torch.testing.assert_close(seen[1][1], moved)
    with pytest.raises(ValueError, match="jump='auto'"):
        run(GaussianTeleport(stock, statistics, sigma_skip=1.0, jump="input"))


def test_guided_pipeline_sees_the_teleported_sample_and_saves_as_stock(tmp_path):
    pipe = guided(FAMILIES["sd"].build())
    pipe.scheduler = ddim()
    shape = (pipe.unet.config.in_channels,) + (pipe.unet.config.sample_size,) * 2
    data = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
    statistics = DatasetStatistics.from_images(data, value_range=None)
    stock = copy.copy(pipe.scheduler)
    pipe.scheduler = GaussianTeleport(stock, statistics, sigma_skip=1.0, jump="input")
    call = FAMILIES["sd"].call(2, negative=False) | {"num_inference_steps": 10}
    plain = pipe(**call).images
    skipped = pipe.scheduler.skipped
    cfg = pipe(**call | {"generator": generators(2)}, guidance="cfg").images
    assert skipped >= 2 and pipe.guidance_trace.nfe == [2 * (10 - skipped)] * 2
    assert (torch.as_tensor(plain) == torch.as_tensor(cfg)).all()
    noises = []
    pipe(
        **call | {"generator": generators(2)},
        guidance="apg+ag",
        detailed_trace=True,
        callback_on_step_end=lambda p, i, t, k: noises.append(i) or {},
    )
    first = pipe.guidance_trace.steps[0].noise
    assert len(noises) == 10 - skipped and first >= 1.0
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is type(stock)
    assert again.scheduler.config.beta_end == stock.config.beta_end
    assert type(pipe.scheduler.from_config(pipe.scheduler.config)) is type(stock)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_noise_levels_see_through(statistics, name):
    fast = GaussianTeleport(getattr(diffusers, name)(), statistics, sigma_skip=2.0, jump="input")
    fast.set_timesteps(10)
    x = torch.zeros(1, *SHAPE)
    for t, (alpha, sigma) in zip(fast.timesteps, levels(fast), strict=True):
        fast.scale_model_input(x, t)
        assert noise_level(fast, t).ratio == pytest.approx(sigma / alpha, rel=1e-5)
        x = fast.step(x, t, x).prev_sample


FUSED = [
    (FusedDDIMScheduler, NO_CLIP),
    (FusedEulerScheduler, {}),
    (FusedDPMSolverMultistepScheduler, {}),
    (FusedFlowMatchEulerScheduler, {}),
]


@pytest.mark.parametrize(("cls", "settings"), FUSED, ids=lambda v: getattr(v, "__qualname__", ""))
@pytest.mark.parametrize("taken", [{}, {"s_churn": 2.0}], ids=str)
def test_fused_schedulers_teleport_as_the_stock_ones(statistics, cls, settings, taken):
    """Also where a step is handed to the stock scheduler."""
    if "s_churn" in taken and cls is FusedDDIMScheduler:
        taken = {"eta": 0.7}
    if "s_churn" in taken and cls is FusedDPMSolverMultistepScheduler:
        settings, taken = settings | {"thresholding": True}, {}
    found, skipped = [], []
    for scheduler in (cls.stock_class(**settings), cls(**settings)):
        fast = GaussianTeleport(scheduler, statistics, sigma_skip=2.0)
        assert isinstance(fast, type(scheduler))
        for again in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert type(again) is type(fast)
            again.set_timesteps(20)
            source = torch.Generator().manual_seed(0)
            x = torch.randn(2, *SHAPE, generator=source) * float(
                getattr(again, "init_noise_sigma", 1.0)
            )
            for t in again.timesteps:
                scale = getattr(again, "scale_model_input", None)
                x_in = x if scale is None else scale(x, t)
                level = noise_level(again, t)
                pred = level.from_x0(0.4 * torch.tanh(x_in), x_in)
                x = again.step(pred, t, x, generator=source, **taken).prev_sample
            found.append(x)
            skipped.append(again.skipped)
    assert set(skipped) == {skipped[0]} and skipped[0] > 3
    for x in found:
        torch.testing.assert_close(x, found[0], rtol=1e-4, atol=1e-5)


def test_a_fused_scheduler_teleports_in_a_guided_pipeline_and_saves_as_stock(tmp_path):
    pipe = guided(FAMILIES["sd"].build())
    shape = (pipe.unet.config.in_channels,) + (pipe.unet.config.sample_size,) * 2
    data = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
    statistics = DatasetStatistics.from_images(data, value_range=None)
    found = []
    for cls in (FusedEulerScheduler.stock_class, FusedEulerScheduler):
        inner = cls.from_config(ddim().config)
        pipe.scheduler = GaussianTeleport(inner, statistics, sigma_skip=1.0)
        call = FAMILIES["sd"].call(2, negative=False) | {"num_inference_steps": 10}
        found.append(torch.as_tensor(pipe(**call, guidance="apg+ag").images))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(again) is diffusers.EulerDiscreteScheduler
    assert type(pipe.scheduler.from_config(pipe.scheduler.config)) is FusedEulerScheduler
    assert again.config.beta_end == inner.config.beta_end


class Counting(GaussianTeleport):
    """Counts its steps."""

    def __init__(self, *args, steps=0, **options):
        super().__init__(*args, **options)
        self.steps = steps

    def step(self, *args, **options):
        self.steps += 1
        return super().step(*args, **options)


@pytest.mark.parametrize("cls", [diffusers.DDIMScheduler, FusedEulerScheduler])
def test_subclasses_are_made_and_copied(statistics, cls):
    plain = GaussianTeleport(cls(), statistics, sigma_skip=2.0)
    fast = Counting(cls(), statistics, sigma_skip=2.0, steps=1)
    assert isinstance(fast, Counting) and isinstance(fast, cls)
    assert not isinstance(plain, Counting) and type(plain).__name__ == cls.__name__
    fast = pickle.loads(pickle.dumps(fast))
    results = []
    for scheduler in (plain, fast):
        scheduler.set_timesteps(10)
        x = torch.ones(1, *SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(scheduler.scale_model_input(x, t) * 0.5, t, x).prev_sample
        results.append(x)
    assert torch.equal(*results)
    assert fast.steps == 1 + 10 - fast.skipped and fast.skipped == plain.skipped > 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_teleport_too(statistics, again):
    fast = GaussianTeleport(diffusers.DDIMScheduler(), statistics, sigma_skip=2.0)
    other = again(fast)
    other.set_timesteps(10)
    assert type(other) is type(fast) and other.skipped > 0 == fast.skipped
    assert torch.equal(other.statistics.basis, statistics.basis)


def test_what_cannot_work_is_refused(statistics):
    ddim = diffusers.DDIMScheduler()
    for name in ("PNDMScheduler", "LCMScheduler"):
        with pytest.raises(ValueError, match="DDIMScheduler"):
            GaussianTeleport(getattr(diffusers, name)(), statistics)
    with pytest.raises(ValueError, match="teleports already"):
        GaussianTeleport(GaussianTeleport(ddim, statistics), statistics)
    with pytest.raises(ValueError, match="unknown jump 'later'"):
        GaussianTeleport(ddim, statistics, jump="later")
    for sigma in ("high", 0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="sigma_skip"):
            GaussianTeleport(ddim, statistics, sigma_skip=sigma)
    fast = GaussianTeleport(ddim, statistics, sigma_skip=2.0)
    fast.set_timesteps(10)
    wrong = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        fast.scale_model_input(wrong, fast.timesteps[0])
    with pytest.raises(ValueError, match="pure noise"):
        fast.add_noise(wrong, wrong, fast.timesteps[:1])
    with pytest.raises(ValueError, match="begins at timestep"):
        fast.step(wrong, fast.timesteps[2], wrong)
