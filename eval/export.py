"""``pilotage export``: a model's networks as graphs for ONNX Runtime and OpenVINO."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .options import Model
from .terminal import note

PRECISIONS = ("fp32", "fp16", "int8")


def _precision(name: str) -> str:
    if name not in PRECISIONS:
        from ..guidance.names import unknown

        raise unknown("precision", name, PRECISIONS)
    return name


def export(
    output: Annotated[Path, typer.Argument(help="Folder for the graphs.")],
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, fp16, or int8 (weights and activations; needs --images).",
            callback=_precision,
        ),
    ] = "fp32",
    images: Annotated[
        Path | None,
        typer.Option(help="int8: folder of pictures, such as will be learned from."),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="int8: pictures with noise that the ranges are taken from.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="int8: seed of their noise.")] = 0,
    model: Model = None,
) -> None:
    """Write unet/model.onnx and text_encoder/model.onnx, for `personalize --backend`."""
    from ..pipelines.personalization.inputs import load_images
    from ..pipelines.runtimes.export import check_folder, export_onnx, quantize_onnx

    # What can be wrong without the model is said before it is loaded.
    if (images is None) == (precision == "int8"):
        raise ValueError("int8 needs --images, to fix its ranges on; other precisions do not")
    if images is not None:
        load_images(images, 8)
    check_folder(output)

    from ..pipelines.personalization.calibration import calibrate
    from ..pipelines.personalization.personalizer import Personalizer
    from ..pipelines.runtimes import on_runtime, recorded
    from .embedded import load_on

    def load(dtype: str) -> object:
        pipe = load_on("cpu", model, dtype)
        for name in ("unet", "text_encoder"):
            getattr(pipe, name).requires_grad_(False)
        return pipe

    if precision != "int8":
        export_onnx(load(precision), output)
    else:
        assert images is not None
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=output.parent) as scratch:
            pipe = load("fp32")
            export_onnx(pipe, scratch)
            note(f"calibrating on {images}")
            with recorded(on_runtime(pipe, scratch)) as inputs:
                calibrate(Personalizer(pipe), images, rows, seed)
            quantize_onnx(scratch, output, inputs)
    for path in sorted(output.rglob("*.onnx")):
        size = sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6
        typer.echo(f"{path}  ({precision}, {size:.1f} MB)")
