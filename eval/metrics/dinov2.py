"""DINOv2 features as dgm-eval takes them, for FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675).

dgm-eval (github.com/layer6ai-labs/dgm-eval) squashes pictures to 224x224 by PIL's bicubic filter on
8-bit pixels, whatever their shape, takes ImageNet's mean and deviation, and the class token of
DINOv2 ViT-L/14 after the last normalisation. The model card's own way (the shorter side to 256,
then the middle 224x224) gives other figures. Published figures need
``dinov2:facebook/dinov2-large``, lossless files, and 50,000 pictures (fewer if the data set is
smaller).

Position embeddings are brought to the 16x16 patches of 224 pixels by Meta's own rule, which
stretches by (16 + 0.1) / 37; transformers stretches by 16 / 37.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .efficientnet import DEVIATION, MEAN
from .hub import from_pretrained, squashed

SIDE = 224
OFFSET = 0.1  # of Meta's interpolation of position embeddings


class DINOv2Features(nn.Module):
    """Class tokens of a DINOv2 model.

    Args:
        model: Folder or hub name, e.g. ``facebook/dinov2-large``: ``config.json`` and
            ``model.safetensors``.

    Raises:
        FileNotFoundError, ValueError: see `from_pretrained`.
    """

    mean: Tensor
    std: Tensor
    preprocessing = "PIL bicubic to 224x224, ImageNet mean and deviation"

    def __init__(self, model: str) -> None:
        super().__init__()
        from transformers import Dinov2Model

        self.name = f"dinov2:{model}"
        self.network = from_pretrained(Dinov2Model, model)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(DEVIATION).view(1, 3, 1, 1))
        embeddings = self.network.embeddings
        embeddings.position_embeddings = nn.Parameter(
            _stretched(embeddings.position_embeddings.detach(), SIDE // embeddings.patch_size)
        )
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, D), of pictures (N, 3, H, W) in [0, 1], rounded to 8 bits first."""
        pixels = squashed(images, SIDE).to(self.mean.device)
        return self.network(pixel_values=(pixels - self.mean) / self.std).pooler_output


def _stretched(embeddings: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n * n, D) for side x side patches, by Meta's rule."""
    token, grid = embeddings[:, :1], embeddings[:, 1:]
    own = round(grid.shape[1] ** 0.5)
    if own == side:
        return embeddings
    grid = grid.float().view(1, own, own, -1).permute(0, 3, 1, 2)
    factor = (side + OFFSET) / own
    grid = nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([token, grid.flatten(2).mT.to(token)], 1)
