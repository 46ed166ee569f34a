r"""LPIPS: how different two pictures look to a network (Zhang et al. 2018, arXiv:1801.03924).

.. math:: \sum_l \frac{1}{H_l W_l} \sum_{h,w} \sum_c v_{lc}\, (\hat x_{lhwc} - \hat y_{lhwc})^2

version 0.1 with AlexNet, the paper's default: :math:`\hat x` are the activations after each of the
five convolutions, brought to length 1 over the channels, v the learned weights. 0 is equal.

Weights: one safetensors file, made of two published ones. It holds ``features.0.weight``, ... of
torchvision's AlexNet (``alexnet-owt-7be5be79.pth`` from download.pytorch.org/models) and
``lin0.model.1.weight``, ... (``alex.pth``, which comes with torchmetrics). To make it:
`CONVERSION`.

Cost: one pass of AlexNet over both pictures, small beside making them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .images import checked_pictures
from .weights import weights_of

CONVERSION = (
    'python -c "import torch, torchmetrics as t; from safetensors.torch import save_file; '
    "p = t.__path__[0] + '/functional/image/lpips_models/alex.pth'; "
    "w = torch.load('alexnet-owt-7be5be79.pth', 'cpu', weights_only=True); "
    "w.update(torch.load(p, 'cpu', weights_only=True)); "
    "save_file({k: v for k, v in w.items() if k.startswith(('features.', 'lin'))}, "
    "'lpips.safetensors')\""
)
# Number in torchvision's AlexNet, channels in and out, kernel, stride, padding.
CONVOLUTIONS = (
    (0, 3, 64, 11, 4, 2),
    (3, 64, 192, 5, 1, 2),
    (6, 192, 384, 3, 1, 1),
    (8, 384, 256, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
)
POOLED = (0, 1)  # after these a maximum over 3 x 3, every second pixel
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # for pictures in [-1, 1]
SMALLEST = 31  # pixels: smaller pictures leave nothing to the last convolutions


class LPIPS(nn.Module):
    """LPIPS of pictures to others.

    Args:
        file: The safetensors file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no safetensors file, or holds other weights.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, size, stride, padding)
            for _, i, o, size, stride, padding in CONVOLUTIONS
        )
        self.heads = nn.ParameterList(torch.empty(1, c[2], 1, 1) for c in CONVOLUTIONS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        found = {}
        with weights_of("LPIPS", file, CONVERSION) as weights:
            for number, (place, *_) in enumerate(CONVOLUTIONS):
                for part in ("weight", "bias"):
                    found[f"layers.{number}.{part}"] = weights[f"features.{place}.{part}"]
                found[f"heads.{number}"] = weights[f"lin{number}.model.1.weight"]
            self.load_state_dict(found)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """LPIPS of each picture to its reference, shape (N,).

        Args:
            images: Pictures, with shape (N, 3, H, W), in [0, 1].
            reference: Others of the same shape.

        Raises:
            ValueError: different shapes, NaN, or a side below 31 pixels.
        """
        x, y = checked_pictures(images), checked_pictures(reference)
        if x.shape != y.shape:
            raise ValueError(f"pictures of shapes {tuple(x.shape)} and {tuple(y.shape)}")
        if min(x.shape[2:]) < SMALLEST:
            raise ValueError(
                f"LPIPS needs pictures of at least {SMALLEST}x{SMALLEST} pixels, got "
                f"{x.shape[3]}x{x.shape[2]}"
            )
        both = torch.cat([x, y]).to(self.shift.device, torch.float32)
        both = (2 * both - 1 - self.shift) / self.scale
        total = torch.zeros(len(x), device=both.device)
        for number, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
            both = layer(both).relu()
            unit = both / (both.square().sum(1, keepdim=True).sqrt() + 1e-10)
            one, other = unit.chunk(2)
            total += ((one - other).square() * head).sum(1).mean((1, 2))
            if number in POOLED:
                both = nn.functional.max_pool2d(both, 3, 2)
        return total
