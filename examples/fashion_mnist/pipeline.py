"""Class-conditional sampling in pixel space, with classifier-free guidance.

pipe = load_classes()
pipe([3, 9], guidance_scale=3, generator=torch.Generator().manual_seed(0)).images
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

BLOCK = 2  # side of the squares of pixels that become channels


def to_blocks(pictures: Tensor) -> Tensor:
    """Pictures (N, 1, 28, 28) as (N, 4, 14, 14): the same values, squares of pixels as channels.

    That only orders them anew, so noise and denoising are those of the pixels; a network of the
    same size is three times as fast there.
    """
    return pixel_unshuffle(pictures, BLOCK)


class ClassPipeline(DiffusionPipeline):
    """Pictures of given classes.

    Args:
        unet: A ``UNet2DModel`` with class embeddings, the last one for "no class", which takes
            pictures as `to_blocks` orders them.
        scheduler: Any scheduler with the network's noise schedule.
    """

    model_cpu_offload_seq: Any = "unet"
    unet: Any
    scheduler: Any

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """One picture for every label.

        Args:
            class_labels: Classes, with shape (N,).
            num_inference_steps: Steps of the scheduler.
            guidance_scale: w; 1 is no guidance.
            generator: One, or one for each picture.
            output_type: "pil", "np" or "pt" (in [0, 1]).
            return_dict: Return an ``ImagePipelineOutput`` rather than a tuple.
            callback_on_step_end: Called after every step with the pipeline, the number of the step,
                its timestep, and a dictionary of the picture with its noise, "latents", with shape
                (N, 4, 14, 14); one that it returns goes on from there.
            callback_on_step_end_tensor_inputs: There is "latents" only.

        Raises:
            ValueError: a label that the network does not know, or another tensor for the callback.
        """
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f"a callback gets latents, got {callback_on_step_end_tensor_inputs}")
        none = self.unet.config.num_class_embeds - 1
        labels = torch.as_tensor(class_labels, device=self._execution_device).flatten()
        if not len(labels) or bool(((labels < 0) | (labels >= none)).any()):
            raise ValueError(f"expected class labels of 0 to {none - 1}, got {labels.tolist()}")
        guided = guidance_scale > 1
        classes = torch.cat([torch.full_like(labels, none), labels]) if guided else labels
        side = self.unet.config.sample_size
        shape = (len(labels), self.unet.config.in_channels, side, side)
        x_t = randn_tensor(shape, generator, self._execution_device, self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=x_t.device)
        x_t = x_t * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            x_in = self.scheduler.scale_model_input(torch.cat([x_t, x_t]) if guided else x_t, t)
            prediction = self.unet(x_in, t, class_labels=classes, return_dict=False)[0]
            if guided:
                uncond, cond = prediction.chunk(2)
                prediction = uncond + guidance_scale * (cond - uncond)
            x_t = self.scheduler.step(prediction, t, x_t, return_dict=False)[0]
            if callback_on_step_end is not None:
                told = {name: x_t for name in callback_on_step_end_tensor_inputs}
                x_t = callback_on_step_end(self, i, t, told).pop("latents", x_t)
        pictures = pixel_shuffle(x_t, BLOCK).clamp(-1, 1)
        images = VaeImageProcessor(vae_scale_factor=1).postprocess(pictures, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
