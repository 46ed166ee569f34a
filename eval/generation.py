"""Pictures with how they were made: what ``generate``, ``denoise`` and the page in a browser do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..guidance.analytic import size_for
from ..pipelines import guided
from ..pipelines.analytic.model import denoiser_class
from ..pipelines.analytic.pipeline import AnalyticDenoisingPipeline
from ..pipelines.fitting.fitted import negative_argument, unconditional_text
from ..pipelines.guided import scale_option
from .metadata import save_picture


@dataclass(frozen=True)
class Made:
    """Pictures of one call.

    Args:
        images: The pictures.
        settings: How each was made, ready for JSON.
    """

    images: Sequence[Image.Image]
    settings: Sequence[dict[str, Any]]

    def save(self, paths: Sequence[Path]) -> None:
        """Write PNGs, one for each picture, with their settings inside."""
        for file, image, own in zip(paths, self.images, self.settings, strict=True):
            save_picture(file, image, own)


def generate(
    pipe: Any,
    prompt: str,
    guidance: str,
    scale: float,
    steps: int,
    seeds: Sequence[int] = (0,),
    negative: str | None = None,
    model: str | None = None,
    words: Sequence[str] = (),
    **options: Any,
) -> Made:
    """Make pictures from a prompt.

    Args:
        pipe: A guided pipeline, on its device.
        prompt: What they show.
        guidance: See `pilotage.guidance.resolve`.
        scale: w; 1 is no guidance.
        steps: Sampling steps.
        seeds: One for each picture.
        negative: What they shall not show.
        model: Folder or hub name of the pipeline, to be told; None: the embedded model.
        words: Learned words that the pipeline knows, to be told.
        **options: Further arguments of the pipeline's call that pictures do not depend on.

    Raises:
        ValueError: the guidance is unknown, or cannot be had on this pipeline.
    """
    none = scale == 1
    settings = pipe.resolve_guidance("cfg" if none else guidance)
    strength = scale_option(pipe, scale)
    unwanted = unconditional_text(pipe, negative or None)
    images = pipe(
        prompt=[prompt],
        guidance=settings,
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **strength,
        **negative_argument(pipe, unwanted, 1),
        **options,
    ).images
    made = {
        "prompt": prompt,
        "negative_prompt": unwanted,
        "guidance": None if none else str(settings),
        **strength,
        "steps": steps,
        "scheduler": type(pipe.scheduler).__name__,
        "model": model or "embedded",
    } | ({"tokens": list(words)} if words else {})
    each = zip(seeds, pipe.guidance_trace.nfe, strict=True)
    return Made(images, [made | {"seed": seed, "nfe": nfe} for seed, nfe in each])


def denoise(
    images: Path,
    method: str = "local",
    size: int | None = None,
    options: dict[str, Any] | None = None,
    count: int = 1,
    steps: int = 10,
    seed: int = 0,
    label: int | None = None,
    guidance: str = "",
    scale: float = 1.0,
    tell: Callable[[str], Any] = lambda text: None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Made:
    """Sample from a folder of pictures, without a network.

    Args:
        images: The folder.
        method: A name in ``pilotage.guidance.analytic.DENOISERS``.
        size: Side in pixels that pictures are cropped to; None: what fits them and the method.
        options: Further settings of the denoiser.
        count: How many pictures.
        steps: Sampling steps (DDIM).
        seed: Of the first picture; the others take the next ones.
        label: Class to draw: its subfolder's place in the alphabet, from 0.
        guidance: How to guide, where `scale` is above 1.
        scale: w; 1 is no guidance.
        tell: Called with a line of text where the pictures cannot be taken at their own size.
        progress: Iterates through the steps in the place of the pipeline's progress bar.

    Raises:
        ValueError: the method is unknown, or the pictures do not suit it.
    """
    if size is None:
        kind = denoiser_class(method)
        size, why = size_for(images, kind.accept, kind.side)
        if why:
            tell(why)
    options = options or {}
    pipe: Any = guided(
        AnalyticDenoisingPipeline(images=images, size=size, method=method, options=options)
    )
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    if progress is not None:
        pipe.progress_bar = progress
    pictures = pipe(
        count,
        num_inference_steps=steps,
        class_labels=label,
        guidance_scale=scale,
        guidance=guidance or None,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
    ).images
    made = {
        "images": str(images),
        "data": pipe.unet.data_hash,
        "size": list(pipe.unet.images.shape[2:]),
        "method": method,
        **options,
        "steps": steps,
        "label": label,
        "guidance": guidance,
        "guidance_scale": scale,
    }
    return Made(pictures, [made | {"seed": seed + i} for i in range(count)])
