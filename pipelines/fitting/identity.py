"""What a pipeline is, in a form that files can keep and compare: hash of weights, scheduler."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...guidance.files import fingerprint
from ..seam.noise_levels import UnknownSchedulerError, prediction_type_of

PACKAGES = ("pilotage", "diffusers")


def pipeline_identity(
    pipe: Any, hash_of: Callable[[nn.Module, str], str] | None = None
) -> dict[str, Any]:
    """Class, weights, scheduler and versions of a pipeline, ready for JSON.

    Args:
        pipe: The pipeline.
        hash_of: Stands in for `network_hash`, e.g. one that remembers.

    Returns:
        ``pipeline``: name of the stock class. ``networks``: SHA-256 of each network's
        configuration and weights. ``model``: SHA-256 over all of them. ``dtype``: of the
        denoiser as loaded. ``scheduler``: its class. ``scheduler_config``: its configuration.
        ``prediction_type``: what the network predicts, None if the scheduler is not known.
        ``versions``: of pilotage and diffusers.

    Floating-point weights are hashed as float32, so that one checkpoint in half precision has one
    hash in whichever precision it is loaded.

    Raises:
        ValueError: weights are not in memory (sequential offloading).
    """
    hash_of = hash_of or network_hash
    networks = {
        name: hash_of(part, name)
        for name, part in sorted(pipe.components.items())
        if isinstance(part, nn.Module)
    }
    scheduler = pipe.scheduler
    try:
        prediction = prediction_type_of(scheduler)
    except UnknownSchedulerError:
        prediction = None
    return {
        "pipeline": getattr(type(pipe), "stock_class", type(pipe)).__name__,
        "model": fingerprint(networks),
        "networks": networks,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": _configuration(scheduler),
        "prediction_type": prediction,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def network_hash(network: nn.Module, name: str = "network") -> str:
    """SHA-256 of a network's configuration and weights.

    Raises:
        ValueError: weights are not in memory.
    """
    digest = hashlib.sha256(json.dumps(_configuration(network), sort_keys=True).encode())
    for key, value in _plain_tensors(network.state_dict()):
        if value.is_meta:
            raise ValueError(
                f"{name}.{key} is not in memory (sequential offloading): load the pipeline "
                "without offloading to take its identity"
            )
        value = value.detach().to("cpu", torch.float32 if value.is_floating_point() else None)
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Named tensors in the order of their names; of quantized ones, those they consist of."""
    for key, value in sorted(state.items()):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _plain_tensors({f"{key}.{name}": getattr(value, name) for name in names})
        elif isinstance(value, Tensor):
            yield key, value


def _configuration(part: Any) -> dict[str, Any]:
    """The configuration without what changes from one installation to the next."""
    config = getattr(part, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    passing = {"_name_or_path", "dtype", "torch_dtype", "transformers_version"}
    # Here diffusers lists the settings that were not given, in another order in every process.
    passing.add("_use_default_values")
    kept = {k: v for k, v in config.items() if k not in passing and "diffusers_version" not in k}
    return _plain(kept)


def _plain(value: Any) -> Any:
    """JSON without NaN and infinity (schedulers' configurations hold both) or objects."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=str)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
