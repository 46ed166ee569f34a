"""Models of the Hugging Face hub, or folders of the same form: loading, and CLIP's features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from ..hub import located


def from_pretrained(kind: Any, model: str, **options: Any) -> Any:
    """``kind.from_pretrained(model, **options)`` with an error that says what to do.

    Raises:
        FileNotFoundError: the folder is not there, or the hub cannot be reached.
        ValueError: it holds something else, or damaged or incomplete weights.
    """
    model = located(model)
    local = Path(model).is_dir()
    network = isinstance(kind, type) and issubclass(kind, nn.Module)
    try:
        if not network:
            return kind.from_pretrained(model, **options)
        found, loaded = kind.from_pretrained(model, output_loading_info=True, **options)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        if local:
            raise ValueError(f"{model} does not hold a {kind.__name__} ({first})") from error
        raise FileNotFoundError(
            f"{model!r} is no folder here, and it cannot be fetched from the hub ({first}): "
            "download it where there is a connection and name the folder"
        ) from error
    # transformers would go on with random weights in their place.
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{model} does not hold a {kind.__name__}: {len(missing)} weights are missing, "
            f"{missing[0]} for one"
        )
    return found


def describe(processor: Any) -> str:
    """What an image processor does, in words that identify it."""
    parts = [type(processor).__name__]
    for step, setting in (
        ("resize", "size"),
        ("center_crop", "crop_size"),
        ("normalize", "image_mean"),
        ("normalize", "image_std"),
    ):
        if getattr(processor, f"do_{step}", False):
            value = getattr(processor, setting)
            value = dict(value) if hasattr(value, "items") else list(value)
            parts.append(f"{step} {value}")
    if getattr(processor, "do_resize", False):
        parts.append(f"resample {int(processor.resample)}")
    return ", ".join(parts)


def eight_bits(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the 8-bit files that published figures are made of, on the CPU."""
    return (images.detach().cpu() * 255).round().clamp(0, 255).byte()


def squashed(images: Tensor, side: int) -> Tensor:
    """Pictures as 8-bit squares by PIL's bicubic filter, whatever their shape.

    Args:
        images: With shape (N, 3, H, W), in [0, 1].
        side: In pixels.

    Returns:
        With shape (N, 3, side, side), in [0, 1], on the CPU.
    """
    small = [
        np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
        for picture in eight_bits(images).permute(0, 2, 3, 1).numpy()
    ]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255


class CLIPFeatures(nn.Module):
    """Image embeddings of a CLIP model: projected, not normalised.

    Args:
        model: Folder or hub name, e.g. ``openai/clip-vit-large-patch14-336``.
        options: For `from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: see `from_pretrained`.
    """

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, CLIPModel

        self.name = f"clip:{model}"
        # CLIP's model with projection alone takes its width from another place of the config.
        self.network = from_pretrained(CLIPModel, model, **options)
        self.processor = from_pretrained(AutoImageProcessor, model)
        self.preprocessing = describe(self.processor)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, D), of pictures (N, 3, H, W) in [0, 1], rounded to 8 bits first."""
        inputs = self.processor(images=list(eight_bits(images).numpy()), return_tensors="pt")
        weights = next(self.network.parameters())
        pixels = inputs["pixel_values"].to(weights.device, weights.dtype)
        features = self.network.vision_model(pixel_values=pixels).pooler_output
        return self.network.visual_projection(features).float()
