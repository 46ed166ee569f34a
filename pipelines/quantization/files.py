"""Files of modules with int8 layers: safetensors, nothing dequantized."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...guidance.files import atomic
from .int8 import INT8_LAYERS, Int8Layer
from .quantize import put_int8

FORMAT = {"format": "pilotage-int8", "version": "1"}


def save_quantized(module: nn.Module, path: str | Path) -> None:
    """Writes a module with int8 layers of ours to one safetensors file, whole or not at all.

    Raises:
        ValueError: no int8 layer of ours, or tensors of another backend (they are named).
    """
    if not any(isinstance(m, Int8Layer) for m in module.modules()):
        raise ValueError("save_quantized: no int8 layer here: quantize(module) first")
    others = [k for k, v in module.state_dict().items() if is_traceable_wrapper_subclass(v)]
    if others:
        raise ValueError(
            f"save_quantized: tensors of another backend ({', '.join(others[:3])}, … "
            f"{len(others)} in all): quantize with backend='pilotage'"
        )
    with atomic(path) as partial:
        safetensors.torch.save_model(module, str(partial), metadata=FORMAT)


def load_quantized(module: nn.Module, path: str | Path) -> None:
    """Reads such a file into a module of the same architecture, replacing its layers in place.

    Raises:
        ValueError: not a file of `save_quantized`, or one of another architecture.
    """
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata, keys = file.metadata() or {}, set(file.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if {k: metadata.get(k) for k in FORMAT} != FORMAT:
        raise ValueError(f"{path}: expected {FORMAT} in its metadata, got {metadata}")
    names = {key.removesuffix(".scale") for key in keys if key.endswith(".scale")}
    layers = {name: layer for name, layer in module.named_modules() if name in names}
    fits = {n for n, m in layers.items() if type(m) in INT8_LAYERS or isinstance(m, Int8Layer)}
    if missing := names - fits:
        raise ValueError(f"{path}: the module has no Linear or Conv2d {', '.join(sorted(missing))}")
    put_int8(module, layers.values())
    try:
        safetensors.torch.load_model(module, str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to another architecture: {error}") from error
