"""The Inception network of published FID figures, from torch-fidelity.

torch-fidelity requires torchvision, which only its data sets and other networks use. Without
torchvision its modules are imported one by one, past the package's own start-up; so
``pip install --no-deps torch-fidelity`` is enough.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn


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


@functools.cache
def torchmetrics(name: str) -> types.ModuleType:
    """A module of torchmetrics, which imports parts of torch-fidelity where that is installed."""
    installed = importlib.util.find_spec("torch_fidelity") is not None
    with fidelity_modules() if installed else nullcontext():
        return importlib.import_module(f"torchmetrics.{name}")


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
