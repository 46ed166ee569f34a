"""Where the embedded emoji model lies, and how to load a guided text-to-image pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..guidance import load_guidance, resolve
from ..pipelines import guided
from .hub import located
from .options import DTYPES

CHECKOUT = Path(__file__).resolve().parents[1]


def embedded_folder() -> Path:
    """Folder of the embedded model: in the checkout that runs, else the package `pilotage-emoji`.

    Raises:
        FileNotFoundError: neither is there. Says how to install it.
    """
    folder = CHECKOUT / "examples" / "emoji" / "model"
    if (folder / "model_index.json").is_file():
        return folder
    try:
        from pilotage_emoji import FOLDER
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "the embedded model is a package of its own, which is not installed: "
            "pip install pilotage-emoji, or name another model"
        ) from error
    return FOLDER


def load_pipeline(model: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A guided pipeline from a folder or hub name.

    Raises:
        FileNotFoundError: see `located`.
        ValueError: a weights file is damaged or incomplete.
    """
    from diffusers import DiffusionPipeline

    model = located(str(model))
    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and not Path(model).is_dir():
            raise
        raise ValueError(
            f"the weights in {model} are damaged or incomplete ({error}): fetch them again"
        ) from error
    return guided(pipe)


def load_embedded(dtype: torch.dtype = torch.float32) -> Any:
    """The embedded emoji model as a guided ``StableDiffusionPipeline``."""
    return load_pipeline(embedded_folder(), dtype)


def load_on(
    device: str,
    model: str | None,
    dtype: str = "auto",
    backend: str = "torch",
    graphs: Path | None = None,
) -> Any:
    """The pipeline of a folder or hub name, None: the embedded one, on a device.

    `dtype` is a name in `DTYPES`, or "auto" (see `precision_of`). On another backend than "torch"
    the graphs of a folder take the place of its networks.
    """
    on_cpu = graphs is not None or torch.device(device).type == "cpu"
    precision = precision_of(dtype, on_cpu, model)
    pipe = load_embedded(precision) if model is None else load_pipeline(model, precision)
    if graphs is None:
        return pipe.to(device)
    from ..pipelines.runtimes import on_runtime

    return on_runtime(pipe, graphs, backend)


def precision_of(dtype: str, on_cpu: bool, model: str | None) -> torch.dtype:
    """The precision of a name in `DTYPES`.

    "auto" is float32 on a CPU. Elsewhere it is bfloat16 for pipelines around a transformer, which
    were trained in it and overflow in float16, and float16 for those around a U-Net, which lose
    less by it.
    """
    if dtype != "auto":
        return getattr(torch, DTYPES[dtype])
    if on_cpu:
        return torch.float32
    from diffusers import DiffusionPipeline

    config = DiffusionPipeline.load_config(embedded_folder() if model is None else model)
    return torch.bfloat16 if "transformer" in config else torch.float16


def check_guidance(name: str, model: str | None) -> None:
    """Find mistakes in a guidance name before a model is loaded.

    Args:
        name: As written by the user: a name the model's own folder has settings for, or any other.
        model: Folder or hub name; None: the embedded model.

    Raises:
        ValueError: unknown name, or damaged settings.
    """
    own = (embedded_folder() if model is None else Path(model)) / "guidance" / f"{name}.json"
    if own.is_file():
        load_guidance(own)
    else:
        resolve(name)
