"""Analytic denoisers as diffusers parts: any scheduler, saving, guidance, a latent space."""

import json

import diffusers
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pilotage import pipelines
from pilotage.eval import embedded
from pilotage.eval.cli import app
from pilotage.guidance import APG
from pilotage.guidance.analytic import DENOISERS, DatasetStatistics, OptimalDenoiser
from pilotage.pipelines import (
    AnalyticDenoiserModel,
    AnalyticDenoisingPipeline,
    GaussianTeleport,
    UnknownSchedulerError,
    noise_level,
)
from pilotage.pipelines.analytic import encode_images

from ... import components

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
CASES = [
    ("DDIMScheduler", SD | {"prediction_type": "epsilon", "clip_sample": False}),
    ("DDIMScheduler", SD | ZERO_SNR | {"prediction_type": "v_prediction"}),
    ("DDPMScheduler", {"prediction_type": "sample", "clip_sample": False}),
    ("EulerDiscreteScheduler", SD | {"use_karras_sigmas": True}),
    ("HeunDiscreteScheduler", SD | {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", SD),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


@pytest.fixture(scope="module")
def data():
    """uint8 pictures (60, 1, 6, 6) of three classes, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    noise = torch.randint(0, 60, (60, 1, 6, 6), generator=generator)
    return (noise + 80 * labels[:, None, None, None]).to(torch.uint8), labels


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i][0]}")
def test_the_scheduler_reads_the_denoisers_image_from_the_prediction(data, case):
    name, settings = CASES[case]
    scheduler = getattr(diffusers, name)(**settings)
    model = AnalyticDenoiserModel.from_images(*data, method="optimal", scheduler=scheduler)
    denoiser = OptimalDenoiser(data[0])
    scheduler.set_timesteps(5)
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        level = noise_level(scheduler, t)
        alpha, sigma = float(level.alpha), float(level.sigma)
        pred = model(x_in, t).sample
        if alpha > 0:
            found = level.to_x0(pred, x_in)
            expected = denoiser(x_in / alpha, sigma / alpha)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
        else:
            mean = (data[0].double() / 127.5 - 1).mean(0)
            flow = "Flow" in name
            torch.testing.assert_close(pred, (x_in if flow else torch.zeros_like(x_in)) - mean)
        x = scheduler.step(pred, t, x).prev_sample


@pytest.mark.parametrize("method", DENOISERS)
def test_every_method_samples_with_and_without_classes(data, method):
    images, labels = data
    pipe = quiet(AnalyticDenoisingPipeline(images=images, labels=labels, method=method))
    made = pipe(2, num_inference_steps=3, generator=components.generators(2), output_type="latent")
    assert made.images.shape == (2, 1, 6, 6) and made.images.isfinite().all()
    made = pipe(
        3, num_inference_steps=4, class_labels=[0, 1, 2], generator=components.generators(3),
        output_type="pt",
    ).images  # fmt: skip
    # Classes differ by 80 grey levels of 255; a class' own spread is below 60.
    levels = made.mean((1, 2, 3)) * 255
    assert ((levels - torch.tensor([30.0, 110.0, 190.0])).abs() < 30).all()


def test_guidance_goes_through_the_seam(data):
    images, labels = data
    pipe = quiet(AnalyticDenoisingPipeline(images=images, labels=labels, method="wiener"))
    call = {
        "num_images": 2, "num_inference_steps": 4, "class_labels": [0, 2], "guidance_scale": 3.0,
        "output_type": "latent",
    }  # fmt: skip

    def run(**extra):
        return pipe(**call | extra, generator=components.generators(2)).images

    stock = run()
    assert torch.equal(stock, run(guidance="cfg"))
    assert pipe.guidance_trace.nfe == [8, 8]
    torch.testing.assert_close(run(guidance=APG(1, 0, 0)), stock, rtol=1e-4, atol=1e-5)
    assert (run(guidance="apg") - stock).abs().max() > 0.01
    with pytest.raises(ValueError, match="needs class_labels"):
        run(class_labels=None)
    with pytest.raises(ValueError, match="0 to 2"):
        run(class_labels=[0, 3])


def test_saved_and_loaded_is_the_same(data, tmp_path):
    images, labels = data
    tau = {"tau": 0.3}
    pipe = AnalyticDenoisingPipeline(images=images, labels=labels, method="local", options=tau)
    quiet(pipe)
    call = {"num_images": 2, "num_inference_steps": 3, "class_labels": [0, 1]}

    def run(pipe):
        return pipe(**call, generator=components.generators(2), output_type="latent").images

    before = run(pipe)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 30000
    again = quiet(AnalyticDenoisingPipeline.from_pretrained(tmp_path))
    assert again.unet.images.dtype == torch.uint8 and again.unet.mean.dtype == torch.float64
    assert again.unet.config.options == {"tau": 0.3}
    assert torch.equal(run(again), before)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("pipelines.analytic.model", "pipelines.analytic"))
    assert torch.equal(run(quiet(AnalyticDenoisingPipeline.from_pretrained(tmp_path))), before)
    model = AnalyticDenoiserModel.from_pretrained(tmp_path / "unet")
    assert model.statistics.identity == pipe.unet.statistics.identity


def test_half_precision_in_and_out(data):
    model = AnalyticDenoiserModel.from_images(*data, method="wiener")
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    full = model(x, 500).sample
    half = model.to(torch.bfloat16)(x.bfloat16(), 500).sample
    assert model.dtype == half.dtype == torch.bfloat16 and model.images.dtype == torch.uint8
    assert (half.float() - full).abs().max() < 0.05


def test_rows_with_their_own_timesteps(data):
    model = AnalyticDenoiserModel.from_images(*data, method="ls", k=3)
    x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([900, 20, 900])
    together = model(x, steps).sample
    alone = torch.cat([model(x[i : i + 1], t).sample for i, t in enumerate(steps)])
    torch.testing.assert_close(together, alone)


def test_attribution_names_the_training_image(data):
    model = AnalyticDenoiserModel.from_images(*data, method="optimal")
    y = data[0][7:8].float() / 127.5 - 1
    _, info = model.denoiser()(y, 0.01, return_info=True)
    assert (info.top == 7).all() and info.n_eff.max() < 1.001


def test_a_folder_and_a_teleported_scheduler(data, tmp_path):
    for i, image in enumerate(data[0]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:02}.png")
    pipe = quiet(AnalyticDenoisingPipeline(images=tmp_path, method="wiener"))
    assert torch.equal(pipe.unet.images, data[0])
    call = {"num_images": 3, "num_inference_steps": 100, "output_type": "latent"}
    full = pipe(**call, generator=components.generators(3)).images
    pipe.scheduler = GaussianTeleport(pipe.scheduler, pipe.unet.statistics, sigma_skip=1.0)
    fast = pipe(**call, generator=components.generators(3)).images
    assert pipe.scheduler.skipped > 20
    spread = (data[0].float() / 127.5 - 1).var(0).mean().sqrt()
    assert (full - fast).square().mean().sqrt() < 0.1 * spread


@pytest.mark.parametrize("method", DENOISERS)
def test_the_command_takes_a_folder_of_photos(tmp_path, method):
    """Photos of a camera, one with transparency: the line of the README, for every method."""
    folder, out = tmp_path / "photos", tmp_path / "x.png"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for name, mode, size in (("a.jpg", "RGB", (640, 480)), ("b.png", "RGBA", (300, 500))):
        rough = torch.randint(0, 256, (6, 6, len(mode)), generator=draw, dtype=torch.uint8)
        Image.fromarray(rough.numpy(), mode).resize(size).save(folder / name)
    call = ["denoise", str(folder), "-m", method, "-o", str(out), "--steps", "2", "--force"]
    small = CliRunner().invoke(app, [*call, "--size", "9"])
    assert small.exit_code == 0, small.output
    picture = Image.open(out)
    assert picture.size == (9, 9) and json.loads(picture.text["pilotage"])["size"] == [9, 9]
    if method in ("optimal", "wiener"):
        result = CliRunner().invoke(app, call)
        assert result.exit_code == 0, result.output
        assert "cropped to squares of 256 x 256 (--size)" in result.stderr
        assert Image.open(out).size == (256, 256)
    else:
        side = {"els": 32, "local": 64, "soft": 64}.get(method, 256)
        assert DENOISERS[method].side(3, 2) == side
        DENOISERS[method].accept((3, side, side))
    assert DENOISERS[method].side(3, 2**24) == 6  # two GiB of pictures
    (folder / "b.png").unlink()
    one = CliRunner().invoke(app, [*call, "--size", "9"])
    if method in ("ls", "els", "pspc"):
        assert one.exit_code == 0, one.output
    else:
        assert "at least two images, got 1" in str(one.exception)


def test_a_folder_is_cropped_with_a_warning_and_statistics_wait(tmp_path):
    for i, size in enumerate(((12, 10), (9, 14), (11, 11))):
        noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="9 x 14 .*squares of 9 x 9; size sets another"):
        pipe = quiet(AnalyticDenoisingPipeline(images=tmp_path, method="optimal"))
    assert pipe.unet.images.shape == (3, 3, 9, 9)
    assert pipe.unet.config.statistics is None
    pipe.save_pretrained(tmp_path / "saved")
    again = AnalyticDenoiserModel.from_pretrained(tmp_path / "saved" / "unet")
    again.set_method("wiener")
    given = AnalyticDenoiserModel.from_images(pipe.unet.images, method="wiener")
    x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x, 300).sample, given(x, 300).sample)
    assert given.statistics.identity == again.statistics.identity
    assert given.data_hash == given.statistics.identity["data"]
    sized = AnalyticDenoisingPipeline(images=tmp_path, size=7, method="ls")
    assert sized.unet.images.shape == (3, 3, 7, 7)


def test_in_the_latent_space_of_an_autoencoder():
    torch.manual_seed(0)
    vae = components.vae()
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    pipe = quiet(
        AnalyticDenoisingPipeline(vae=vae, images=images.to(torch.uint8), method="optimal")
    )
    latents, _ = encode_images(vae, images.to(torch.uint8))
    assert torch.equal(pipe.unet.images, latents)
    call = {"num_images": 2, "num_inference_steps": 8}
    x = pipe(**call, generator=components.generators(2), output_type="latent").images
    nearest = (x[:, None] - latents).flatten(2).norm(dim=2).min(1).values
    assert nearest.max() < 0.05 * latents.flatten(1).norm(dim=1).mean()
    picture = pipe(**call, generator=components.generators(2)).images[0]
    assert picture.size == (16, 16) and picture.mode == "RGB"


def test_classes_that_a_method_cannot_use_are_refused_up_front(data):
    images, labels = data
    y = torch.zeros(2, 1, 6, 6)
    labels = torch.where(torch.arange(60) < 59, 2 * labels.clamp(max=1), 5)  # 0, 2 and one of 5
    for method in ("wiener", "optimal"):
        pipe = quiet(AnalyticDenoisingPipeline(images=images, labels=labels, method=method))
        with pytest.raises(ValueError, match=f"method '{method}': no images of class 1"):
            pipe(2, class_labels=[0, 1])
        assert pipe(1, class_labels=2, num_inference_steps=2, output_type="latent").images.any()
        if method == "wiener":
            with pytest.raises(ValueError, match="'wiener': class 5: .*at least two images, got 1"):
                pipe(2, class_labels=[0, 5])
            with pytest.raises(ValueError, match="class 5: .*two images"):
                pipe.unet.denoiser()(y, 1.0, torch.tensor([0, 5]))
            for given in (None, torch.tensor([0, 2])):
                with pytest.raises(ValueError, match="no info to return"):
                    pipe.unet.denoiser()(y, 1.0, given, return_info=True)


def test_another_method_and_precision_make_another_denoiser(data):
    model = AnalyticDenoiserModel.from_images(data[0], method="wiener")
    y = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = model.denoiser()(y, 1.0)
    model.set_method("optimal")
    assert (model.denoiser()(y, 1.0) - expected).abs().max() > 0.1
    model.to(torch.float16).set_method("wiener")
    torch.testing.assert_close(model.denoiser()(y, 1.0), expected, rtol=0, atol=5e-3)


def test_large_pictures_are_refused_before_statistics_are_made(monkeypatch):
    monkeypatch.setattr(DatasetStatistics, "from_images", None)
    with pytest.raises(ValueError, match="n = 120000 coordinates"):
        AnalyticDenoiserModel.from_images(torch.zeros(3, 3, 200, 200, dtype=torch.uint8))


@pytest.mark.parametrize("command", [["denoise", "{folder}"], ["generate", "noto style fox"]])
@pytest.mark.parametrize(
    ("output", "message"),
    [("out", "end in .png"), ("out.txt", "end in .png"), ("a.png", "a folder"), ("f/x.png", "f")],
)
def test_the_name_of_the_output_is_checked_before_anything_is_loaded(
    tmp_path, monkeypatch, command, output, message
):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "f").write_text("")
    monkeypatch.setattr(embedded, "load_embedded", None)
    monkeypatch.setattr(pipelines, "AnalyticDenoisingPipeline", None)
    call = [part.format(folder=tmp_path) for part in command]
    result = CliRunner().invoke(app, [*call, "-o", str(tmp_path / output)])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_bad_input_is_refused(data):
    images, labels = data
    for scheduler in (diffusers.EDMEulerScheduler(), diffusers.IPNDMScheduler()):
        with pytest.raises(UnknownSchedulerError, match="not those of a training table"):
            AnalyticDenoiserModel.from_images(*data, method="optimal", scheduler=scheduler)
    with pytest.raises(ValueError, match="unknown method 'magic'.*wiener"):
        AnalyticDenoiserModel.from_images(images, method="magic")
    with pytest.raises(ValueError, match="either unet or images"):
        AnalyticDenoisingPipeline()
    with pytest.raises(ValueError, match="two images"):
        AnalyticDenoisingPipeline(images=images[:1])
    with pytest.raises(ValueError, match="the same"):
        AnalyticDenoisingPipeline(images=images[:1].expand(5, -1, -1, -1))
    pipe = quiet(AnalyticDenoisingPipeline(images=images, method="wiener"))
    with pytest.raises(ValueError, match="without labels"):
        pipe(class_labels=1)
    with pytest.raises(ValueError, match=r"expected \(1, 1, 6, 6\)"):
        pipe(latents=torch.zeros(1, 3, 6, 6))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="disagree about flow, prediction_type"):
        pipe()
    statistics = DatasetStatistics.from_images(torch.rand(9, 3, 6, 6))
    with pytest.raises(ValueError, match="statistics"):
        AnalyticDenoiserModel.from_images(images, statistics=statistics)
