"""Networks that turn pictures into feature vectors.

``efficientnet-lite0-native``, the default, comes as a PyPI package and needs no hub (see
`efficientnet` for ``efficientnet-lite0``). ``inception`` is the network of published FID figures,
``clip:MODEL`` that of CMMD, ``dinov2:MODEL`` that of FD-DINOv2, whose verdicts agree with people's
better than Inception's (Stein et al. 2023, arXiv:2306.04675).

Inception comes from torch-fidelity. That requires torchvision, which only its data sets and other
networks use: without torchvision its modules are imported one by one, past the package's own
start-up, so that ``pip install --no-deps torch-fidelity`` is enough.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ...guidance.names import unknown
from ..options import DEFAULT_EXTRACTOR
from .dinov2 import DINOv2Features
from .efficientnet import NETWORKS, EfficientNetLite
from .hub import CLIPFeatures


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


@contextmanager
def fidelity_modules() -> Iterator[None]:
    """Import single modules of torch-fidelity, inside the context, without torchvision.

    Raises:
        ModuleNotFoundError: torch-fidelity is not installed.
    """
    package = "torch_fidelity"
    if (spec := importlib.util.find_spec(package)) is None:
        raise ModuleNotFoundError(
            "torch_fidelity is missing: pip install --no-deps torch-fidelity (its dependency "
            "torchvision is not needed, and may replace torch)"
        )
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == package}
    for name in before:
        del sys.modules[name]
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[package] = bare
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(before)


class Inception(nn.Module):
    """Pooled features of torch-fidelity's InceptionV3 (weights of the original TensorFlow graph).

    Pictures are rounded to 8 bits and brought to 299 pixels by TensorFlow 1's bilinear rule, as
    for published figures.

    Args:
        weights: Weights file; None: torch-fidelity's, downloaded (91 MB) unless cached.

    Raises:
        FileNotFoundError: the weights file is not there, or the download fails.
        ValueError: the weights file is damaged, or holds something else.
        ModuleNotFoundError: torch-fidelity is not installed.
    """

    name = "inception"
    preprocessing = "uint8, TensorFlow-1 bilinear to 299x299"

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        with fidelity_modules():
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"no Inception weights at {weights}")
        # torch-fidelity unpickles whatever the file holds, so what holds more than tensors is
        # refused first. A download stays in torch.hub's cache, where torch-fidelity finds it.
        try:
            if weights is None:
                torch.hub.load_state_dict_from_url(module.URL_INCEPTION_V3, weights_only=True)
            else:
                torch.load(weights, weights_only=True)
            self.network = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
            )
        except OSError as error:
            if weights is not None:
                raise
            raise FileNotFoundError(
                f"the Inception weights cannot be downloaded ({error}): fetch "
                f"{module.URL_INCEPTION_V3} elsewhere and name the file as inception:FILE"
            ) from error
        except Exception as error:  # torch.load raises half a dozen kinds
            source = weights or "the download"
            raise ValueError(
                f"{source} is damaged or does not hold the Inception weights ({error})"
            ) from error

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, 2048), of pictures (N, 3, H, W) in [0, 1]."""
        device = next(self.network.parameters()).device
        pixels = (images.to(device) * 255).round().clamp(0, 255).byte()
        return self.network(pixels)[0]


HUB: dict[str, type[CLIPFeatures | DINOv2Features]] = {
    "clip": CLIPFeatures,
    "dinov2": DINOv2Features,
}
EXTRACTORS = (*NETWORKS, "inception", "inception:FILE", "clip:MODEL", "dinov2:MODEL")


def load_extractor(name: str = DEFAULT_EXTRACTOR, device: str | torch.device = "cpu") -> Extractor:
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
    if name in NETWORKS:
        return EfficientNetLite(name).to(device)
    if kind == "inception":
        return Inception(model or None).to(device)
    if kind in HUB and model:
        return HUB[kind](model).to(device)
    raise unknown("extractor", name, EXTRACTORS)
