r"""DreamSim: how different two pictures look to people (Fu et al. 2023, arXiv:2306.09344).

.. math:: 1 - \cos(e(x) - \bar e(x),\; e(y) - \bar e(y))

The embedding e is that of three vision transformers, one after another, tuned on what people judged
of 20,000 triplets: the class token of DINO ViT-B/16 after its last block, before the last
normalisation, and the projected embeddings of CLIP and OpenCLIP ViT-B/16; :math:`\bar e` is the
mean of its parts. This is the published ensemble, the default and best of the paper; 0 is equal.
Pictures are squashed to 224x224 by PIL's bicubic filter on 8-bit pixels, as published.

Weights: one safetensors file with the names of the published code, the low-rank updates merged, a
prefix for each network. To make it, in an environment with the ``dreamsim`` package, which
downloads the published files, pickles among them, and code of DINO, and runs it: `CONVERSION`.

Cost: three passes of a ViT-B/16 over both pictures, about 100 G multiplications and additions a
pair.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .efficientnet import DEVIATION, MEAN
from .hub import squashed
from .images import checked_pictures
from .weights import weights_of

CONVERSION = (
    'python -c "from dreamsim import dreamsim; from safetensors.torch import save_file; '
    "kinds = ('dino', 'clip', 'open_clip'); "
    "found = zip(kinds, dreamsim(device='cpu')[0].merge_and_unload().extractor_list); "
    "save_file({f'{n}.{k}': v.detach().contiguous() for n, x in found for k, v in "
    "{**x.model.state_dict(), **({} if n == 'dino' else {'proj': x.proj})}.items()}, "
    "'dreamsim.safetensors')\""
)
SIDE = 224
HEAD = 64  # width of an attention head
CLIP_MEAN, CLIP_DEVIATION = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
# What PyTorch's encoder layer calls otherwise than the published code.
NAMES = {
    "self_attn.in_proj_": "attn.qkv.",
    "self_attn.out_proj.": "attn.proj.",
    "linear": "mlp.fc",
    "patch_embed.": "patch_embed.proj.",
}


class Kind(NamedTuple):
    """What the weights of a network do not say."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    eps: float  # of layer normalisation
    activation: Callable[[Tensor], Tensor]
    projected: bool = True  # with normalisations before the blocks and after them


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


KINDS = {
    "dino": Kind(MEAN, DEVIATION, 1e-6, nn.functional.gelu, False),
    "clip": Kind(CLIP_MEAN, CLIP_DEVIATION, 1e-5, quick_gelu),
    "open_clip": Kind(CLIP_MEAN, CLIP_DEVIATION, 1e-5, nn.functional.gelu),
}


class DreamSim(nn.Module):
    """DreamSim of pictures to others.

    Args:
        file: The safetensors file. The sizes of the networks are those of its weights.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no safetensors file, or holds other weights.
    """

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        with weights_of("DreamSim", file, CONVERSION) as weights:
            self.networks = nn.ModuleList(
                _Network(weights, f"{name}.", kind) for name, kind in KINDS.items()
            )
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """DreamSim of each picture to its reference, shape (N,).

        Args:
            images: Pictures, with shape (N, 3, H, W), in [0, 1], rounded to 8 bits first.
            reference: Others of the same shape.

        Raises:
            ValueError: different shapes, or NaN.
        """
        x, y = checked_pictures(images), checked_pictures(reference)
        if x.shape != y.shape:
            raise ValueError(f"pictures of shapes {tuple(x.shape)} and {tuple(y.shape)}")
        both = squashed(torch.cat([x, y]), SIDE)
        embedded = torch.cat([network(both) for network in self.networks], 1)
        one, other = (embedded - embedded.mean(1, keepdim=True)).chunk(2)
        return 1 - nn.functional.cosine_similarity(one, other)


class _Network(nn.Module):
    """One of the three: pictures (N, 3, 224, 224) in [0, 1] to embeddings (N, D)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: dict[str, Tensor], prefix: str, kind: Kind) -> None:
        super().__init__()
        width, _, patch, _ = weights[f"{prefix}patch_embed.proj.weight"].shape
        inner = len(weights[f"{prefix}blocks.0.mlp.fc1.bias"])
        depth = sum(k.startswith(prefix) and k.endswith("fc1.bias") for k in weights)
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (SIDE // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // HEAD, inner, 0.0, kind.activation, kind.eps, True, norm_first=True
            )
            for _ in range(depth)
        )
        self.projected = kind.projected
        if kind.projected:
            self.pos_drop, self.norm = (nn.LayerNorm(width, kind.eps) for _ in range(2))
            self.proj = nn.Parameter(torch.empty_like(weights[f"{prefix}proj"]))
        found = {}
        for name in self.state_dict():
            theirs = name
            for own, published in NAMES.items():
                theirs = theirs.replace(own, published)
            found[name] = weights[prefix + theirs]
        self.load_state_dict(found)
        for name in ("mean", "deviation"):
            value = torch.tensor(getattr(kind, name)).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = (pixels.to(self.mean.device) - self.mean) / self.deviation
        x = self.patch_embed(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.pos_drop(x) if self.projected else x
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0]) @ self.proj if self.projected else x[:, 0]
