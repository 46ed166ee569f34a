"""Sampling from a set of images, without a network.

pipe = AnalyticDenoisingPipeline(images="folder/of/pictures")
pipe(num_images=4, method="local").images[0]
pipe(num_images=4, class_labels=3, guidance="apg", guidance_scale=4)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...guidance.analytic import decode, load_images
from .model import AnalyticDenoiserModel, noise_schedule_of


class AnalyticDenoisingPipeline(DiffusionPipeline):
    """Sample from a set of images, without a network.

    Args:
        unet: An `AnalyticDenoiserModel`; None to make one of `images`.
        scheduler: Any scheduler whose noise levels are known; None for DDIM with linear beta.
        vae: An ``AutoencoderKL``: images are encoded once and sampled in its latent space.
        images: See `AnalyticDenoiserModel.from_images`.
        labels: Classes of the images.
        size: Side in pixels of the squares that picture files are cropped to; None for a side that
            fits the method, see `Denoiser`, and with a vae for the pictures as they are.
        method: Which denoiser, a name in ``pilotage.guidance.analytic.DENOISERS``.
        options: Arguments of that denoiser, and of `AnalyticDenoiserModel.from_images`.
    """

    model_cpu_offload_seq: Any = "unet->vae"
    _optional_components = ["unet", "scheduler", "vae"]
    unet: AnalyticDenoiserModel
    scheduler: Any
    vae: Any

    def __init__(
        self,
        unet: AnalyticDenoiserModel | None = None,
        scheduler: Any = None,
        vae: Any = None,
        *,
        images: Any = None,
        labels: Tensor | None = None,
        size: int | None = None,
        method: str = "local",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (unet is None) == (images is None):
            raise ValueError("expected either unet or images")
        scheduler = scheduler or DDIMScheduler(clip_sample=False)
        if unet is None:
            settings: dict[str, Any] = {"method": method, "scheduler": scheduler}
            if vae is None:
                settings["size"] = size
            else:
                images, found = encode_images(vae, images, size=size)
                labels = found if labels is None else labels
                settings["value_range"] = None
            settings |= options or {}
            unet = AnalyticDenoiserModel.from_images(images, labels, **settings)
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

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
        if method is not None and method != self.unet.config["method"]:
            self.unet.set_method(method)
        labels = self._checked_labels(class_labels, num_images, guidance_scale)
        device, scheduler = self._execution_device, self.scheduler
        expected = noise_schedule_of(scheduler)
        wrong = sorted(k for k, v in expected.items() if self.unet.config.get(k, v) != v)
        if wrong:
            raise ValueError(
                f"the scheduler and the model disagree about {', '.join(wrong)}: make the "
                "model with from_images(..., scheduler=scheduler)"
            )
        shape = (num_images, *self.unet.images.shape[1:])
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents {tuple(latents.shape)}, expected {shape}")
        scheduler.set_timesteps(num_inference_steps, device=device)
        x = latents.to(device) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        for t in self.progress_bar(scheduler.timesteps):
            x_in = torch.cat([x] * 2) if guidance_scale > 1 else x
            if hasattr(scheduler, "scale_model_input"):
                x_in = scheduler.scale_model_input(x_in, t)
            pred = self.unet(x_in, t, class_labels=labels, return_dict=False)[0]
            if guidance_scale > 1:
                uncond, cond = pred.chunk(2)
                pred = uncond + guidance_scale * (cond - uncond)
            x = scheduler.step(pred, t, x, **extra, return_dict=False)[0]
        images: Any = x
        if output_type != "latent":
            if self.vae is not None:
                x = self.vae.decode(x / self.vae.config.scaling_factor, return_dict=False)[0]
            processor = VaeImageProcessor(vae_scale_factor=1)
            images = processor.postprocess(x.clamp(-1, 1), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _checked_labels(self, labels: Any, count: int, scale: float) -> Tensor | None:
        """Labels of every row of the network's batch, unconditional rows first."""
        classes = self.unet.config["num_class_embeds"]
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
        for label in labels.unique().tolist():
            try:
                self.unet.denoiser().pool(label)
            except ValueError as error:  # too few images of it
                raise ValueError(f"method {self.unet.config['method']!r}: {error}") from None
        if scale > 1:
            labels = torch.cat([torch.full_like(labels, classes), labels])
        return labels.to(self._execution_device)


@torch.no_grad()
def encode_images(
    vae: Any, source: Any, batch_size: int = 64, size: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scaled latents (posterior means) of all images of a source, and their labels.

    Args:
        vae: An ``AutoencoderKL``.
        source: See ``pilotage.guidance.analytic.load_images``; size likewise.
        batch_size: Images encoded at once.
        size: Side in pixels of the squares that files and PIL images are cropped to.
    """
    images, labels = load_images(source, size=size)
    parts = [
        vae.encode(decode(part.to(vae.device), vae.dtype)).latent_dist.mode().float().cpu()
        for part in images.split(batch_size)
    ]
    return torch.cat(parts) * vae.config.scaling_factor, labels
