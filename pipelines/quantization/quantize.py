"""int8 weights for the networks of a pipeline: Linear and Conv2d of UNet, VAE and text encoder.

Two thirds of a Stable Diffusion UNet's weights sit in convolutions, which torchao does not cover:
they get the layers of `int8.py`. Linear layers go to torchao or to the same layers. A
pipeline that diffusers has already quantized (torchao, bitsandbytes, quanto, GGUF) keeps what it
has; its convolutions, which stay in full precision there, are quantized here.

Whatever is made int8 here is saved in floating point, in the dtype of the network: what
``save_pretrained`` writes loads in stock diffusers and transformers.
"""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .int8 import INT8_LAYERS, Int8Layer

Backend = Literal["auto", "torchao", "pilotage"]
BACKENDS = get_args(Backend)
COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHTY = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
OTHER_BACKENDS = ("bitsandbytes.", "optimum.quanto.", "diffusers.quantizers.", "torchao.")


def quantize(
    target: Any,
    dtype: str = "int8",
    backend: Backend = "auto",
    *,
    gradients: bool = False,
    skip: Sequence[str] = (),
) -> list[str]:
    """Stores the weights of every Linear and Conv2d as int8, in place, and freezes them.

    Args:
        target: A module, or a pipeline (its UNet or transformer, VAE and text encoders).
        dtype: "int8": symmetric, one scale per output channel, weights only.
        backend: Who holds Linear layers: "torchao", "pilotage" (our layers), or "auto": torchao if
            it is installed and `gradients` is off. Conv2d are always ours.
        gradients: A gradient will flow through to the input. torchao's layers then keep their
            dequantized weights until the backward pass, ours never do.
        skip: Shell patterns of layer names that stay in full precision, e.g. ``"*.conv_out"``.

    Adapters (LoRA) keep their precision, those loaded before and those loaded later; what they are
    for is quantized.

    Returns:
        Names of the layers that stay as they were: in `skip`, adapters, or quantized already by
        others.

    Raises:
        ValueError: an unknown dtype or backend; layers with weights that are not covered (they
            are named; nothing is changed); NaN or infinite weights.
        ImportError: torchao is asked for and not installed.
    """
    if dtype != "int8":
        raise ValueError(f"quantize: dtype is 'int8', got {dtype!r}")
    if backend not in BACKENDS:
        raise ValueError(f"quantize: backend is one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torchao" and gradients:
        raise ValueError(
            "quantize: torchao keeps dequantized weights for the backward pass; with "
            "gradients=True use backend='pilotage' or 'auto'"
        )
    installed = importlib.util.find_spec("torchao") is not None
    if backend == "torchao" and not installed:
        raise ImportError("quantize: backend='torchao' needs torchao: pip install torchao")
    if backend == "auto":
        backend = "torchao" if installed and not gradients else "pilotage"
    modules = networks(target)
    found = {name: _sorted_layers(name, module, skip) for name, module in modules.items()}
    for name, module in modules.items():
        plain, _ = found[name]
        own = {m for m in plain if backend == "pilotage" or type(m) is nn.Conv2d}
        _put_int8(module, own)
        _by_torchao(module, [m for m in plain if m not in own])
    return [name for _, names in found.values() for name in names]


def networks(target: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by component name, or ``{"": module}``; else ValueError."""
    if isinstance(target, nn.Module):
        if isinstance(target, (*WEIGHTY, Int8Layer)):
            raise ValueError(f"expected a network, got a single layer: {type(target).__name__}")
        return {"": target}
    parts = {name: getattr(target, name, None) for name in COMPONENTS}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not found:
        raise ValueError(
            f"expected a module or a pipeline with one of {', '.join(COMPONENTS)}, "
            f"got {type(target).__name__}"
        )
    return found


def _sorted_layers(
    component: str, module: nn.Module, skip: Sequence[str]
) -> tuple[list[nn.Linear | nn.Conv2d], list[str]]:
    """Layers to quantize, and names of those that stay; ValueError for what is not covered."""
    plain: list[nn.Linear | nn.Conv2d] = []
    kept, foreign, hooked = [], [], []
    adapters = _adapters(module)
    for name, layer in module.named_modules():
        full = f"{component}.{name}" if component else name
        if not isinstance(layer, WEIGHTY) or isinstance(layer, Int8Layer):
            continue
        named = any(fnmatch.fnmatch(full, pattern) for pattern in skip)
        if named or layer in adapters or _by_others(layer):
            kept.append(full)
        elif not isinstance(layer, nn.Linear | nn.Conv2d) or type(layer) not in INT8_LAYERS:
            foreign.append(f"{full} ({type(layer).__name__})")
        elif layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
            hooked.append(full)
        else:
            plain.append(layer)
    if foreign:
        raise ValueError(
            f"quantize covers Linear and Conv2d, not: {', '.join(foreign)}; name them in skip="
        )
    if hooked:
        raise ValueError(f"quantize before hooks are attached (offloading): {', '.join(hooked)}")
    return plain, kept


def _adapters(module: nn.Module) -> set[nn.Module]:
    """The layers that peft's wrappers add to those they wrap."""
    return {
        layer
        for wrapper in module.modules()
        for name in getattr(wrapper, "adapter_layer_names", ())
        if isinstance(added := getattr(wrapper, name, None), nn.Module)
        for layer in added.modules()
    }


def _by_others(layer: nn.Module) -> bool:
    """Whether a layer is already quantized by a backend of diffusers or transformers."""
    weight = getattr(layer, "weight", None)
    return type(layer).__module__.startswith(OTHER_BACKENDS) or (
        isinstance(weight, Tensor)
        and (is_traceable_wrapper_subclass(weight) or not weight.is_floating_point())
    )


def _put_int8(module: nn.Module, layers: Iterable[nn.Linear | nn.Conv2d]) -> None:
    """Puts int8 layers in place of these; one that the module has at several places stays one."""
    made: dict[nn.Module | None, Int8Layer] = {m: INT8_LAYERS[type(m)](m) for m in layers}
    for parent in module.modules():
        for name, child in parent._modules.items():
            parent._modules[name] = made.get(child, child)


def _by_torchao(module: nn.Module, layers: list[Any]) -> None:
    """Quantizes Linear layers by torchao."""
    if not layers:
        return
    _torchao_weights(module, layers)
    for layer in layers:
        layer.requires_grad_(False)
        layer.register_state_dict_post_hook(_saved)
        layer.register_load_state_dict_pre_hook(_loaded)


def _torchao_weights(module: nn.Module, layers: list[nn.Linear]) -> None:
    """Makes the weights of these layers of a module torchao's."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig(), filter_fn=lambda layer, name: layer in layers)


def _saved(layer: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """The layer's weight in its state dict, in floating point."""
    weight: Any = layer.weight
    state_dict[prefix + "weight"] = weight.dequantize()


def _loaded(layer: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
    """A floating-point weight on its way into the layer."""
    key = prefix + "weight"
    if key in state_dict:
        weight: Any = layer.weight
        plain = state_dict[key].to(weight.device, weight.dtype)
        fresh = nn.Linear(1, 1, bias=False)
        fresh.weight = nn.Parameter(plain, requires_grad=False)
        _torchao_weights(fresh, [fresh])
        state_dict[key] = fresh.weight
