"""Analytic denoisers as diffusers parts: a model that stands in for a UNet, and its pipeline.

pipe = AnalyticDenoisingPipeline(images="folder/of/pictures")
pipe(num_images=4, method="local").images[0]
pipe(num_images=4, class_labels=3, guidance="apg", guidance_scale=4)
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...guidance.analytic import (
    DENOISERS,
    DatasetStatistics,
    Denoiser,
    Info,
    WienerDenoiser,
    decode,
    load_images,
)
from ..seam.noise_levels import BY_FLOW_SIGMA, check_scheduler, prediction_type_of

# What a method is given where nothing is asked for; "exact" normalization is the denoiser's own.
DEFAULTS: dict[str, dict[str, Any]] = {
    "local": {"tau": 0.02},
    "soft": {"power": 1.0},
    "ls": {"k": "cifar10"},
    "els": {"k": "cifar10"},
    "pspc": {"size": "edm32"},
}
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def noise_schedule_of(scheduler: Any) -> dict[str, Any]:
    """What a model must know of the scheduler it is made for, as arguments of the model.

    Raises:
        UnknownSchedulerError: the scheduler's noise levels are not known.
    """
    check_scheduler(scheduler)
    config = scheduler.config
    flow = type(scheduler).__name__ in BY_FLOW_SIGMA or config.get("use_flow_sigmas", False)
    known = {name: config[name] for name in NOISE_SCHEDULE if name in config}
    return known | {"prediction_type": prediction_type_of(scheduler), "flow": bool(flow)}


class AnalyticDenoiserModel(ModelMixin, ConfigMixin):
    """A denoiser computed from images, called like a ``UNet2DModel``.

    Build it with `from_images`; the arguments here are what is saved in ``config.json``.

    Args:
        method: Name in ``pilotage.guidance.analytic.DENOISERS``.
        options: Arguments of that denoiser, e.g. ``{"tau": 0.005}``.
        num_images, in_channels, sample_size: N, C and (H, W).
        stored: "uint8" (meaning [-1, 1]) or "float32".
        labelled: Whether every image has a class.
        num_class_embeds: Number of classes, K; the label K stands for "any".
        statistics: Facts of the `DatasetStatistics` and the shapes of their tensors.
        prediction_type, flow, num_train_timesteps, beta_*, trained_betas, rescale_betas_zero_snr:
            What the scheduler expects of its network; see `noise_schedule_of`.
    """

    @register_to_config
    def __init__(
        self,
        method: str = "local",
        options: dict[str, Any] | None = None,
        num_images: int = 2,
        in_channels: int = 1,
        sample_size: tuple[int, int] = (8, 8),
        stored: str = "uint8",
        labelled: bool = False,
        num_class_embeds: int | None = None,
        statistics: dict[str, Any] | None = None,
        prediction_type: str = "epsilon",
        flow: bool = False,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()
        _check_method(method)
        shape = (num_images, in_channels, *sample_size)
        self.register_buffer("images", torch.zeros(shape, dtype=getattr(torch, stored)))
        labels = torch.zeros(num_images, dtype=torch.int64) if labelled else None
        self.register_buffer("labels", labels)
        for name, size in (statistics or {}).get("tensors", {}).items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        # Its dtype and device are those the model computes in (`to` moves it along).
        self.register_buffer("anchor", torch.zeros(1), persistent=False)
        self._denoisers: dict[Any, Denoiser] = {}
        self._table: Tensor | None = None

    @classmethod
    def from_images(
        cls,
        images: Any,
        labels: Tensor | None = None,
        *,
        method: str = "local",
        scheduler: Any = None,
        statistics: DatasetStatistics | None = None,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        **options: Any,
    ) -> AnalyticDenoiserModel:
        """A model of a data set.

        Args:
            images: Anything that ``pilotage.guidance.analytic.load_images`` reads: a folder, a
                tensor (N, C, H, W), a pair (images, labels), a data set.
            labels: Classes (N,), 0 to K - 1; None for what the source has.
            method: Which denoiser.
            scheduler: The scheduler the model is for; None for the linear beta of DDPM.
            statistics: Of the same images; None to compute them.
            value_range: Range of float pixels; None for latents.
            options: Arguments of the denoiser.

        Raises:
            ValueError: unknown method, or images that no denoiser can be made of.
        """
        _check_method(method)
        images, found = load_images(
            images, value_range=value_range, accept=DENOISERS[method].accept
        )
        labels = found if labels is None else torch.as_tensor(labels)
        statistics = statistics or DatasetStatistics.from_images(images, value_range=None)
        if statistics.shape != tuple(images.shape[1:]):
            raise ValueError(f"images {tuple(images.shape[1:])}, statistics {statistics.shape}")
        if images.dtype != torch.uint8:
            images = images.float()
        basis = statistics.basis
        tensors = {
            "mean": statistics.mean,
            "eigenvalues": statistics.eigenvalues,
            "basis": torch.view_as_real(basis) if basis.is_complex() else basis,
        }
        facts = {
            "count": statistics.count,
            "kind": statistics.kind,
            "residual": statistics.residual,
            "identity": statistics.identity,
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        }
        model = cls(
            method=method,
            options=options,
            num_images=len(images),
            in_channels=images.shape[1],
            sample_size=tuple(images.shape[2:]),
            stored=str(images.dtype).removeprefix("torch."),
            labelled=labels is not None,
            num_class_embeds=None if labels is None else int(labels.max()) + 1,
            statistics=facts,
            **noise_schedule_of(scheduler or DDPMScheduler()),
        )
        model.images, model.labels = images, labels
        for name, tensor in tensors.items():
            setattr(model, name, tensor.contiguous())
        model.denoiser()  # refuses what cannot be denoised
        return model.eval()

    @property
    def dtype(self) -> torch.dtype:
        """What the model takes and returns; it computes in float32 at least."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @property
    def statistics(self) -> DatasetStatistics:
        """Mean and covariance of the images."""
        facts = dict(self.config.statistics)
        facts.pop("tensors")
        kind = facts["kind"]
        basis = torch.view_as_complex(self.basis) if kind == "stationary" else self.basis
        shape = (self.config.in_channels, *self.config.sample_size)
        return DatasetStatistics(
            shape=shape, mean=self.mean, eigenvalues=self.eigenvalues, basis=basis, **facts
        )

    def set_method(self, method: str, **options: Any) -> None:
        """Change the denoiser; images and statistics stay.

        Raises:
            ValueError: unknown method.
        """
        _check_method(method)
        self.register_to_config(method=method, options=options)

    def denoiser(self, label: int | None = None) -> Denoiser:
        """The denoiser ``D(y, sigma, labels)`` behind the model, made when first needed.

        Args:
            label: A class, for denoisers (Wiener) that cannot choose among their images.
        """
        method, options = self.config.method, dict(self.config.options or {})
        key = (method, repr(sorted(options.items())), label, self.images.device)
        if key not in self._denoisers:
            cls = DENOISERS[method]
            options = DEFAULTS.get(method, {}) | options
            if self.config.stored != "uint8":
                options.setdefault("value_range", None)
            if label is None:
                made = cls(self.images, self.labels, statistics=self.statistics, **options)
            else:
                try:
                    made = cls(self.images[self.labels == label], **options)
                except ValueError as error:
                    raise ValueError(f"method {method!r}, class {label}: {error}") from None
            if label is None:  # earlier methods hold a sorted copy of the images each
                self._denoisers.clear()
            self._denoisers[key] = made
        return self._denoisers[key]

    def denoise(
        self, y: Tensor, sigma: float, labels: Tensor | None = None, return_info: bool = False
    ) -> Tensor | tuple[Tensor, Info]:
        """The denoised images of y = x0 + sigma z, all at one noise level.

        Args:
            labels: Classes (B,); K for any.
            return_info: Return the effective number of images and the one that counts most.
        """
        if labels is None or self.labels is None:
            if labels is not None and bool((labels != (self.config.num_class_embeds or 0)).any()):
                raise ValueError("class labels were given, but the images came without")
            return self.denoiser()(y, sigma, return_info=return_info)
        labels = labels.where(labels != self.config.num_class_embeds, -1)
        if return_info or not isinstance(self.denoiser(), WienerDenoiser):
            return self.denoiser()(y, sigma, labels, return_info=return_info)
        out = torch.empty_like(y)
        for label in labels.unique().tolist():
            one = self.denoiser(None if label == -1 else label)
            out[labels == label] = one(y[labels == label], sigma)
        return out

    def check_classes(self, labels: Tensor) -> None:
        """Refuse classes (B,) that the method has too few images of; K for any passes.

        Raises:
            ValueError: no image of a class, or for the Wiener filter none that differ.
        """
        for label in sorted(set(labels.tolist()) - {self.config.num_class_embeds}):
            if not bool((self.labels == label).any()):
                raise ValueError(f"method {self.config.method!r}: no images of class {label}")
            if self.config.method == "wiener":
                self.denoiser(label)

    def levels(self, timestep: Tensor) -> tuple[float, float]:
        """(alpha, sigma) of the network's input at one timestep, whole or fractional."""
        t = float(timestep)
        if self.config.flow:
            sigma = t / self.config.num_train_timesteps
            return 1 - sigma, sigma
        if self._table is None:
            names = {name: getattr(self.config, name) for name in NOISE_SCHEDULE}
            self._table = DDPMScheduler(**names).alphas_cumprod.double()
        low = min(max(int(math.floor(t)), 0), len(self._table) - 1)
        high = min(low + 1, len(self._table) - 1)
        square = float(self._table[low])
        if t != low:  # sigma schedules of their own: linear in log sigma, as they interpolate
            logs = [0.5 * math.log((1 - a) / a) for a in self._table[[low, high]].tolist()]
            ratio = math.exp((1 - (t - low)) * logs[0] + (t - low) * logs[1])
            square = 1 / (1 + ratio**2)
        return math.sqrt(square), math.sqrt(1 - square)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The prediction of a network that knew the data.

        Args:
            sample: x_t as a scheduler scales it for its network, with shape (B, C, H, W).
            timestep: A number, or one for every row.
            class_labels: Classes (B,); K for any; None for any.
        """
        x = sample if sample.dtype.itemsize >= 4 else sample.float()
        steps = torch.as_tensor(timestep).flatten().cpu().expand(len(x)).tolist()
        prediction = torch.empty_like(x)
        for t in sorted(set(steps)):
            rows = torch.tensor([step == t for step in steps], device=x.device)
            labels = None if class_labels is None else class_labels[rows]
            prediction[rows] = self._predict(x[rows], t, labels)
        prediction = prediction.to(sample.dtype)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def _predict(self, x: Tensor, t: float, labels: Tensor | None) -> Tensor:
        alpha, sigma = self.levels(t)
        if sigma == 0:
            raise ValueError(f"timestep {t:g} has no noise: there is nothing to predict")
        if alpha > 0:
            x0 = self.denoise(x / alpha, sigma / alpha, labels)
        else:  # pure noise: every image is as likely
            x0 = self.denoise(torch.zeros_like(x), math.inf, labels)
        match self.config.prediction_type:
            case "epsilon":
                return (x - alpha * x0) / sigma
            case "v_prediction":
                return (alpha * x - x0) / sigma
            case "flow":
                return (x - x0) / sigma
        return x0


def _check_method(method: str) -> None:
    if method not in DENOISERS:
        raise ValueError(f"unknown method {method!r}: expected one of {sorted(DENOISERS)}")


class AnalyticDenoisingPipeline(DiffusionPipeline):
    """Sample from a set of images, without a network.

    Args:
        unet: An `AnalyticDenoiserModel`; None to make one of `images` or `dataset`.
        scheduler: Any scheduler whose noise levels are known; None for DDIM with linear beta.
        vae: An ``AutoencoderKL``: images are encoded once and sampled in its latent space.
        images: See `AnalyticDenoiserModel.from_images`.
        dataset: The same (a torch or Hugging Face data set).
        labels: Classes of the images.
        method: Which denoiser, a name in ``pilotage.guidance.analytic.DENOISERS``.
        options: Arguments of that denoiser, and of `AnalyticDenoiserModel.from_images`.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["unet", "scheduler", "vae"]

    def __init__(
        self,
        unet: AnalyticDenoiserModel | None = None,
        scheduler: Any = None,
        vae: Any = None,
        *,
        images: Any = None,
        dataset: Any = None,
        labels: Tensor | None = None,
        method: str = "local",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sources = [s for s in (unet, images, dataset) if s is not None]
        if len(sources) != 1:
            raise ValueError(f"expected one of unet, images and dataset, got {len(sources)}")
        scheduler = scheduler or DDIMScheduler(clip_sample=False)
        if unet is None:
            source, settings = sources[0], {"method": method, "scheduler": scheduler}
            if vae is not None:
                source, found = encode_images(vae, source)
                labels = found if labels is None else labels
                settings["value_range"] = None
            settings |= options or {}
            unet = AnalyticDenoiserModel.from_images(source, labels, **settings)
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call evaluates both branches."""
        return self._guidance_scale > 1

    @property
    def guidance_scale(self) -> float:
        """w of the running call; 1 means no guidance."""
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        method: str | None = None,
        num_inference_steps: int = 10,
        class_labels: int | list[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures.

        Args:
            num_images: How many.
            method: Which denoiser (with its default options; `AnalyticDenoiserModel.set_method`
                takes others), for this and later calls; None for the model's.
            num_inference_steps: Steps of the scheduler.
            class_labels: One class for all, or one for each.
            guidance_scale: w; above 1 it needs class labels.
            generator: One, or one for each picture.
            latents: Noise to begin with, (num_images, C, H, W).
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent" (the raw samples).
            return_dict: Return an ``ImagePipelineOutput`` rather than a tuple.

        Raises:
            ValueError: labels missing or unknown, wrong shapes, an unknown method.
        """
        if method is not None and method != self.unet.config.method:
            self.unet.set_method(method)
        labels = self._checked_labels(class_labels, num_images, guidance_scale)
        self._guidance_scale = guidance_scale
        device, scheduler = self._execution_device, self.scheduler
        expected = noise_schedule_of(scheduler)
        wrong = {
            k for k, v in expected.items() if k in self.unet.config and self.unet.config[k] != v
        }
        if wrong:
            raise ValueError(
                f"the scheduler and the model disagree about {', '.join(sorted(wrong))}: make the "
                "model with from_images(..., scheduler=scheduler)"
            )
        shape = (num_images, self.unet.config.in_channels, *self.unet.config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents {tuple(latents.shape)}, expected {shape}")
        scheduler.set_timesteps(num_inference_steps, device=device)
        x = latents.to(device) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        self._num_timesteps = len(scheduler.timesteps)
        for t in self.progress_bar(scheduler.timesteps):
            x_in = torch.cat([x] * 2) if self.do_classifier_free_guidance else x
            if hasattr(scheduler, "scale_model_input"):
                x_in = scheduler.scale_model_input(x_in, t)
            pred = self.unet(x_in, t, class_labels=labels, return_dict=False)[0]
            if self.do_classifier_free_guidance:
                uncond, cond = pred.chunk(2)
                pred = uncond + self.guidance_scale * (cond - uncond)
            x = scheduler.step(pred, t, x, **extra, return_dict=False)[0]
        images = self._decoded(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the running call."""
        return self._num_timesteps

    def _checked_labels(self, labels: Any, count: int, scale: float) -> Tensor | None:
        """Labels of every row of the network's batch, unconditional rows first."""
        classes = self.unet.config.num_class_embeds
        if labels is None:
            if scale > 1:
                raise ValueError(f"guidance_scale={scale} needs class_labels")
            return None
        if classes is None:
            raise ValueError("class_labels were given, but the images came without labels")
        labels = torch.as_tensor(labels).flatten()
        labels = labels.expand(count) if len(labels) == 1 else labels
        if len(labels) != count or bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(
                f"expected one or {count} class labels of 0 to {classes - 1}, got {labels.tolist()}"
            )
        self.unet.check_classes(labels)
        if scale > 1:
            labels = torch.cat([torch.full_like(labels, classes), labels])
        return labels.to(self._execution_device)

    def _decoded(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = self.vae.decode(x / self.vae.config.scaling_factor, return_dict=False)[0]
        processor = VaeImageProcessor(vae_scale_factor=1)
        return processor.postprocess(x.clamp(-1, 1), output_type=output_type)


@torch.no_grad()
def encode_images(vae: Any, source: Any, batch_size: int = 64) -> tuple[Tensor, Tensor | None]:
    """Scaled latents (posterior means) of all images of a source, and their labels."""
    images, labels = load_images(source)
    parts = [
        vae.encode(decode(part.to(vae.device), vae.dtype)).latent_dist.mode().float().cpu()
        for part in images.split(batch_size)
    ]
    return torch.cat(parts) * vae.config.scaling_factor, labels
