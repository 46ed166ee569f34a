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


class _HubFeatures(nn.Module):
    dimension: int
    resolution: int

    def __init__(self, kind: str, network: Any, model: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor

        self.name = f"{kind}:{model}"
        self.processor = from_pretrained(AutoImageProcessor, model)
        self.network = network.eval().requires_grad_(False)
        self.preprocessing = describe(self.processor)

    def _pooled(self, images: Tensor) -> Tensor:
        weights = next(self.network.parameters())
        pixels = pixel_values(self.processor, images).to(weights.device, weights.dtype)
        return self.network(pixel_values=pixels).pooler_output


class CLIPFeatures(_HubFeatures):
    """Projected image embeddings of a CLIP model, not normalised.

    Args:
        model: Folder or hub name, e.g. ``openai/clip-vit-large-patch14-336``.
    """

    def __init__(self, model: str) -> None:
        from transformers import CLIPModel

        # The model with projection alone takes its width from another place of the config.
        whole = from_pretrained(CLIPModel, model)
        super().__init__("clip", whole.vision_model, model)
        self.projection = whole.visual_projection.requires_grad_(False)
        self.dimension = self.projection.out_features
        self.resolution = whole.config.vision_config.image_size

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Embeddings, shape (N, D), of pictures (N, 3, H, W) in [0, 1]."""
        return self.projection(self._pooled(images)).float()


class DINOv2Features(_HubFeatures):
    """The class token of a DINOv2 model after its last normalisation.

    Args:
        model: Folder or hub name, e.g. ``facebook/dinov2-large``.
    """

    def __init__(self, model: str) -> None:
        from transformers import Dinov2Model

        network = from_pretrained(Dinov2Model, model)
        super().__init__("dinov2", network, model)
        self.dimension = network.config.hidden_size
        self.resolution = network.config.image_size

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, D), of pictures (N, 3, H, W) in [0, 1]."""
        return self._pooled(images).float()
