"""CLIP and DINOv2 features through transformers, from a folder or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def from_pretrained(kind: Any, model: str) -> Any:
    """``kind.from_pretrained(model)`` with an error that says what to do.

    Raises:
        FileNotFoundError: the folder is not there, or the hub cannot be reached.
        ValueError: it holds something else, or damaged or incomplete weights.
    """
    from safetensors import SafetensorError

    local = Path(model).is_dir()
    network = isinstance(kind, type) and issubclass(kind, nn.Module)
    try:
        if not network:
            return kind.from_pretrained(model)
        found, loaded = kind.from_pretrained(model, output_loading_info=True)
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


def pixel_values(processor: Any, images: Tensor) -> Tensor:
    """What the network is given of pictures (N, 3, H, W) in [0, 1], rounded to 8 bits first."""
    pixels = (images.detach().cpu() * 255).round().clamp(0, 255).byte()
    return processor(images=list(pixels.numpy()), return_tensors="pt")["pixel_values"]


class HubFeatures(nn.Module):
    """Features of a model of the hub.

    CLIP: the projected image embeddings, not normalised. DINOv2: the class token after the last
    normalisation.

    Args:
        kind: ``clip`` or ``dinov2``.
        model: Folder or hub name, e.g. ``openai/clip-vit-large-patch14-336``.

    Raises:
        FileNotFoundError, ValueError: see `from_pretrained`.
    """

    def __init__(self, kind: str, model: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, CLIPModel, Dinov2Model

        self.name = f"{kind}:{model}"
        self.projection: nn.Module = nn.Identity()
        if kind == "clip":
            # The model with projection alone takes its width from another place of the config.
            whole = from_pretrained(CLIPModel, model)
            self.network, self.projection = whole.vision_model, whole.visual_projection
        else:
            self.network = from_pretrained(Dinov2Model, model)
        self.processor = from_pretrained(AutoImageProcessor, model)
        self.preprocessing = describe(self.processor)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, D), of pictures (N, 3, H, W) in [0, 1]."""
        weights = next(self.network.parameters())
        pixels = pixel_values(self.processor, images).to(weights.device, weights.dtype)
        return self.projection(self.network(pixel_values=pixels).pooler_output).float()
