"""Options that commands share, and what checks them. Importing this module imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import note

if TYPE_CHECKING:
    import torch

    from .pictures import Pictures

DEFAULT_EXTRACTOR = "efficientnet-lite0-native"


def device_of(name: str) -> torch.device:
    """The device of a name, if it can be used; ``auto``: an accelerator if there is one.

    Raises:
        ValueError: nothing can be computed on it here.
    """
    import torch

    if name == "auto":
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        from ..pipelines.processes import processes  # slow: it brings diffusers along

        return processes().device
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {name!r} cannot be used here ({reason}): expected auto, cpu, cuda, ..."
        ) from error
    return device


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _dtype(name: str) -> str:
    """The name, if it is one."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype is one of auto, {', '.join(DTYPES)}, got {name!r}")
    return name


def check_tokens(paths: Sequence[Path] | None) -> None:
    """Refuse files of learned words that cannot be read, before a model is loaded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no token file.
    """
    if paths:
        from ..pipelines.personalization.files import load_token

        for path in paths:
            load_token(path)


def add_tokens(pipe: Any, paths: Sequence[Path] | None) -> list[str]:
    """Teach a pipeline the words of files; their names."""
    if not paths:
        return []
    from ..pipelines.personalization.files import add_token

    return [add_token(pipe, path)[0] for path in paths]


def check_backend(backend: str, graphs: Path | None) -> None:
    """Refuse a backend without its graphs, before a model is loaded.

    Raises:
        ValueError: it is not known, or there are graphs for none.
        FileNotFoundError: the graphs are not there.
    """
    if (backend == "torch") != (graphs is None):
        raise ValueError(
            "--graphs is for the backends onnxruntime and openvino, which need it: 'pilotage "
            "export' writes them"
        )
    if graphs is not None:
        from ..pipelines.runtimes.graphs import check_runtime

        check_runtime(graphs, backend)


def check_target(path: Path, suffix: str | None = None) -> None:
    """Refuse the name of a file that could not be written, before there is something to write.

    Args:
        path: The file.
        suffix: What its name must end in.

    Raises:
        ValueError: another suffix, a folder, or nothing can be created where it would lie.
    """
    from ..guidance.files import is_written_to

    if suffix is not None and path.suffix.lower() != suffix:
        raise ValueError(f"the file to write must end in {suffix}, got {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if is_written_to(path):
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path} cannot be written to")
        return
    place = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{path} cannot be written: {place} is not a folder to write to")


def report(values: dict[str, Any], json_file: Path | None, *folders: Pictures | None) -> None:
    """Print a command's values, one a line, and write them as JSON if asked.

    What was changed in pictures on reading is told on the standard error.

    Args:
        values: Names and values, ready for JSON; of a list of dictionaries each is a line.
        json_file: A file to write, with command, machine and versions; ``-``: print JSON, and
            nothing else; None: no JSON.
        folders: What was read: counts and names for the JSON. None stands for a file of features.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know.
    """
    read = [folder for folder in dict.fromkeys(folders) if folder is not None]
    for line in (line for folder in read for line in folder.changes()):
        note(line)
    full = values | ({"pictures": [folder.summary() for folder in read]} if read else {})
    if json_file == Path("-"):
        typer.echo(json.dumps(full, allow_nan=False))
        return
    for name, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ["  ".join(_shown(cell) for cell in row.values()) for row in value]
            typer.echo("\n".join([f"{name}: {', '.join(value[0])}", *lines]))
        else:
            typer.echo(f"{name}: {_shown(value)}")
    if json_file is not None:
        from .record import write_figures

        write_figures(json_file, full)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _resize(form: str | None) -> str | None:
    if form is not None:
        from .pictures import Reading

        Reading(resize=form)
    return form


def _background(colour: str) -> str:
    from .pictures import Reading

    Reading(background=colour)
    return colour


def _parallel(what: str) -> str:
    if what not in ("samples", "branches"):
        raise ValueError(f"--parallel is samples or branches, got {what!r}")
    return what


def _target(path: Path | None) -> Path | None:
    if path is not None and path != Path("-"):
        check_target(path)
    return path


# What is sampled, and how.
Guidance = Annotated[
    str, typer.Option("--guidance", "-g", help="cfg, apg, ag, forecast, or e.g. 'apg(eta=0.5)+ag'.")
]
Scale = Annotated[float, typer.Option("--scale", "-w", help="Guidance scale; 1 is none.")]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps.")]
Negative = Annotated[str | None, typer.Option(help="What the pictures shall not show.")]
Seed = Annotated[int, typer.Option(help="Seed of the first picture.")]
Count = Annotated[int, typer.Option("--count", "-n", min=1, help="Number of pictures.")]
Picture = Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")]
Model = Annotated[
    str | None, typer.Option(help="Folder or hub name; default: the embedded emoji model.")
]
Device = Annotated[
    str,
    typer.Option(
        help="auto (an accelerator if there is one), cpu, cuda, ...",
        callback=lambda name: str(device_of(name)),
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Precision of the weights: fp32, bf16, fp16, or auto: fp32 on a CPU, elsewhere bf16 "
        "for transformers and fp16 for U-Nets.",
        callback=_dtype,
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        help="What runs the networks: torch, onnxruntime or openvino (of --graphs); a device of it "
        "behind a colon, such as openvino:NPU."
    ),
]
Graphs = Annotated[
    Path | None, typer.Option(help="Folder that export wrote, for another backend than torch.")
]
Token = Annotated[
    list[Path] | None,
    typer.Option("--token", help="File of a learned word (of personalize); repeat."),
]
Parallel = Annotated[
    str,
    typer.Option(
        help="What the processes of accelerate launch share out: samples, or the branches of every "
        "step.",
        callback=_parallel,
    ),
]
# What is measured.
Folder = Annotated[Path, typer.Argument(help="Folder of pictures.")]
Real = Annotated[Path, typer.Argument(help="Folder of real pictures, or a .npz of theirs.")]
Fake = Annotated[Path, typer.Argument(help="Folder of generated pictures, or a .npz of theirs.")]
Extractor = Annotated[
    str,
    typer.Option(
        "--extractor",
        "-e",
        help="Network for features: efficientnet-lite0-native, "
        "efficientnet-lite0, inception, clip:MODEL or dinov2:MODEL.",
    ),
]
Lpips = Annotated[
    Path | None, typer.Option(help="Weights of LPIPS (.safetensors); leaves it out by default.")
]
Dreamsim = Annotated[
    Path | None,
    typer.Option(help="Weights of DreamSim (.safetensors); leaves it out by default."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
Resize = Annotated[
    str | None,
    typer.Option(
        help="SIDE in pixels: the shorter side is brought to it, the middle square cut out. "
        "clean:SIDE: as clean-fid does, which squashes pictures that are not square.",
        metavar="SIDE",
        callback=_resize,
    ),
]
Recursive = Annotated[
    bool, typer.Option("--recursive", help="Read pictures in subfolders too, at any depth.")
]
Background = Annotated[
    str, typer.Option(help="Colour behind transparent pictures.", callback=_background)
]
MadeBy = Annotated[
    str | None,
    typer.Option(
        help="What made a .npz of another tool, which holds mu and sigma only: pytorch-fid, "
        "clean-fid, or the name of an extractor.",
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="File to write the values to; - prints them.", callback=_target),
]
