"""Analytic denoisers as a diffusers model, called like a ``UNet2DModel``."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from ...guidance import NoiseLevel
from ...guidance.analytic import DENOISERS, DatasetStatistics, Denoiser
from ...guidance.analytic.accumulate import hash_of_images
from ...guidance.names import unknown
from ..seam.noise_levels import (
    BY_FLOW_SIGMA,
    BY_STEP,
    EDM,
    UnknownSchedulerError,
    check_scheduler,
    prediction_type_of,
    scheduler_name,
)

# What `AnalyticDenoiserModel.levels` cannot read a noise level from.
OWN_TIMES = EDM | BY_STEP | {"HeliosDMDScheduler", "HeliosScheduler", "MiniMaxH3Scheduler"}
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def noise_schedule_of(scheduler: Any) -> dict[str, Any]:
    """What a model must know of its scheduler, as arguments; UnknownSchedulerError if unknown."""
    check_scheduler(scheduler)
    config, name = scheduler.config, scheduler_name(scheduler)
    if name in OWN_TIMES:
        raise UnknownSchedulerError(f"the timesteps of {name} are not those of a training table")
    flow = name in BY_FLOW_SIGMA or config.get("use_flow_sigmas", False)
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
        statistics: Facts of the `DatasetStatistics` and the shapes of their tensors; None if they
            are computed when first needed.
        prediction_type, flow, num_train_timesteps, beta_*, trained_betas, rescale_betas_zero_snr:
            What the scheduler expects of its network; see `noise_schedule_of`.
    """

    config_name: Any  # diffusers' own bases disagree about its type
    images: Tensor
    labels: Tensor | None
    anchor: Tensor

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
        # Its dtype is what the model takes and returns (`to` changes it); it computes in float32
        # at least.
        self.register_buffer("anchor", torch.zeros(1), persistent=False)
        shape = (num_images, in_channels, *sample_size)
        self.register_buffer("images", torch.zeros(shape, dtype=getattr(torch, stored)))
        labels = torch.zeros(num_images, dtype=torch.int64) if labelled else None
        self.register_buffer("labels", labels)
        for name, size in (statistics or {}).get("tensors", {}).items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        self._made: tuple[Any, Denoiser] | None = None
        self._computed: DatasetStatistics | None = None
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
        size: int | None = None,
        **options: Any,
    ) -> AnalyticDenoiserModel:
        """A model of a data set.

        Args:
            images: Anything that ``pilotage.guidance.analytic.load_images`` reads: a folder, a
                tensor (N, C, H, W), a pair (images, labels), a data set.
            labels: Classes (N,), 0 to K - 1; None for what the source has.
            method: Which denoiser.
            scheduler: The scheduler the model is for; None for the linear beta of DDPM.
            statistics: Of the same images; None to compute them, for methods that use them.
            value_range: Range of float pixels; None for latents.
            size: Side in pixels of the squares that files are cropped to; None for a side that
                fits, see `Denoiser`.
            options: Arguments of the denoiser.

        Raises:
            ValueError: unknown method, or images that no denoiser can be made of.
        """
        kind = denoiser_class(method)
        images, found = kind.load(images, value_range=value_range, size=size)
        labels = found if labels is None else torch.as_tensor(labels)
        if statistics is None and kind.uses_statistics:
            statistics = DatasetStatistics.from_images(images, value_range=None)
        if images.dtype != torch.uint8:
            images = images.float()
        tensors, facts = ({}, None) if statistics is None else statistics.parts()
        if facts is not None:
            facts["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
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
    def statistics(self) -> DatasetStatistics:
        """Mean and covariance of the images."""
        facts = self.config["statistics"]
        if facts is None:
            if self._computed is None:
                self._computed = DatasetStatistics.from_images(self.images, value_range=None)
            return self._computed
        tensors = {name: getattr(self, name) for name in facts["tensors"]}
        return DatasetStatistics.from_parts(tensors, facts)

    @property
    def data_hash(self) -> str:
        """Of the images, whatever their order; the "data" of their statistics' identity."""
        return f"{hash_of_images(self.images):032x}"

    def set_method(self, method: str, **options: Any) -> None:
        """Change the denoiser; images and statistics stay.

        Raises:
            ValueError: unknown method.
        """
        denoiser_class(method)
        self.register_to_config(method=method, options=options)

    def denoiser(self) -> Denoiser:
        """The denoiser ``D(y, sigma, labels)`` behind the model, made when first needed.

        Its label for any class is -1. With ``return_info=True`` it also names the image that each
        pixel comes from.
        """
        method, options = self.config["method"], self.config["options"] or {}
        key = (method, repr(sorted(options.items())), self.images.device)
        if self._made is None or self._made[0] != key:
            # Floats were checked, and mapped to [-1, 1], by `from_images`.
            kind, settings = denoiser_class(method), {"value_range": None, **options}
            if kind.uses_statistics:
                settings["statistics"] = self.statistics
            self._made = key, kind(self.images, self.labels, **settings)
        return self._made[1]

    def levels(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) of the network's input at one timestep, whole or fractional."""
        if self.config["flow"]:
            sigma = t / self.config["num_train_timesteps"]
            return 1 - sigma, sigma
        if self._table is None:
            names = {name: self.config[name] for name in NOISE_SCHEDULE}
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
        found = {t: self.levels(t) for t in set(steps)}
        silent = [t for t, (_, sigma) in found.items() if sigma == 0]
        if silent:
            raise ValueError(f"timestep {silent[0]:g} has no noise: there is nothing to predict")
        pairs = torch.tensor([found[t] for t in steps], dtype=torch.float64)
        alpha, sigma = pairs.to(x.device, x.dtype)[..., None, None, None].unbind(1)
        # Where there is noise alone every image is as likely.
        y = torch.where(alpha > 0, x / alpha, 0)
        if class_labels is not None:
            any_class = self.config["num_class_embeds"] or 0
            class_labels = class_labels.where(class_labels != any_class, -1)
        x0 = self.denoiser()(y, pairs[:, 1] / pairs[:, 0], class_labels)
        if self.config["prediction_type"] == "epsilon":  # not as below: alpha may be 0
            prediction = (x - alpha * x0) / sigma
        else:
            level = NoiseLevel(alpha, sigma, self.config["prediction_type"])
            prediction = level.from_x0(x0, x)
        prediction = prediction.to(sample.dtype)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


def denoiser_class(method: str) -> type[Denoiser]:
    """The denoiser of a name.

    Raises:
        ValueError: there is none.
    """
    if method not in DENOISERS:
        raise unknown("method", method, sorted(DENOISERS))
    return DENOISERS[method]
