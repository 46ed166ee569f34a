"""The command line, thin over the Python API.

What a command needs is imported when it runs, so that ``pilotage --help`` stays fast.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .comparison.command import compare
from .export import export
from .metrics import commands as metrics
from .metrics import variety
from .metrics.scoring import score
from .options import (
    Backend,
    Count,
    Device,
    Dtype,
    Graphs,
    Guidance,
    Json,
    Model,
    Negative,
    Parallel,
    Picture,
    Scale,
    Seed,
    Steps,
    Token,
    add_tokens,
    check_backend,
    check_target,
    check_tokens,
    report,
)
from .personalize import personalize
from .terminal import finish, note, with_quiet
from .tuning.commands import calibrate, fit, search
from .ui.command import ui

if TYPE_CHECKING:
    from .generation import Made

OUT = Path("out.png")
Force = Annotated[bool, typer.Option("--force", help="Write over pictures that exist.")]

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pilotage {sys.modules[__name__.partition('.')[0]].__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Tell the version.", callback=_show_version)
    ] = False,
) -> None:
    """Guidance for diffusion sampling, for diffusers pipelines."""


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    guidance: Guidance = "apg",
    scale: Scale = 7.5,
    output: Picture = OUT,
    negative: Negative = None,
    steps: Steps = 20,
    seed: Seed = 0,
    count: Count = 1,
    force: Force = False,
    token: Token = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "torch",
    graphs: Graphs = None,
    parallel: Parallel = "samples",
) -> None:
    """Make pictures from a prompt; the settings are kept in the PNG's metadata.

    Under `accelerate launch -m pilotage.eval generate` the processes share out the pictures, or
    with --parallel branches the evaluations of every step.
    """
    from .embedded import check_guidance, load_on

    check_guidance(guidance, model)  # an unknown name fails before anything is loaded
    paths = _targets(output, count, force)
    check_tokens(token)
    check_backend(backend, graphs)

    from ..pipelines.processes import processes
    from ..pipelines.seam.exchange import connected
    from .generation import generate as make

    state, together = processes(), parallel == "branches"
    if together:
        connected()
    state.wait_for_everyone()  # none writes before all have seen what is there
    pipe = load_on(device, model, dtype, backend, graphs)
    words = add_tokens(pipe, token)
    own = range(count)
    if state.num_processes > 1:
        pipe.set_progress_bar_config(disable=not state.is_main_process)
        if not together:
            own = own[state.process_index :: state.num_processes]
    if not own:
        return
    made = make(
        pipe,
        prompt,
        guidance,
        scale,
        steps,
        [seed + i for i in own],
        negative,
        model,
        words,
        parallel="branches" if together else None,
    )
    if state.is_main_process or not together:
        _write([paths[i] for i in own], made)


def denoise(
    images: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="local (pictures up to 104 x 104 in colour), soft (up to 73 x 73), optimal, "
            "wiener, ls, els, pspc.",
        ),
    ] = "local",
    output: Picture = OUT,
    count: Count = 1,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps (DDIM).")] = 10,
    seed: Seed = 0,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side in pixels of the squares that pictures are cropped to. By default they stay "
            "as they are if they are alike and fit the method, else 256 (local, soft: 64; els: "
            "32) or what memory allows.",
        ),
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="local, soft: threshold of the mask, 0 to 1.")
    ] = None,
    label: Annotated[
        int | None,
        typer.Option(help="Class to draw: its subfolder's place in the alphabet, from 0."),
    ] = None,
    guidance: Annotated[
        str, typer.Option("--guidance", "-g", help="How to guide; needs --scale above 1.")
    ] = "",
    scale: Scale = 1.0,
    force: Force = False,
) -> None:
    """Sample from a folder of pictures, without a network (analytic denoisers)."""
    from ..guidance import resolve
    from ..pipelines.analytic.model import denoiser_class

    denoiser_class(method)
    if guidance:
        resolve(guidance)
    if tau is not None and method not in ("local", "soft"):
        raise ValueError(f"--tau belongs to the local denoisers, not to {method!r}")
    if not images.is_dir():
        raise FileNotFoundError(f"no folder {images}")
    paths = _targets(output, count, force)

    from .generation import denoise as make

    options = {} if tau is None else {"tau": tau}
    made = make(
        images,
        method,
        size,
        options,
        count,
        steps,
        seed,
        label,
        guidance,
        scale,
        lambda why: note(f"{why} (--size)"),
    )
    _write(paths, made)


def _targets(output: Path, count: int, force: bool) -> list[Path]:
    """The pictures to write, several numbered.

    Raises:
        ValueError: they cannot be written, or one is there already and shall not be lost.
    """
    check_target(output, ".png")
    paths = [output]
    if count > 1:
        paths = [output.with_stem(f"{output.stem}-{i}") for i in range(count)]
    if not force and (there := [str(path) for path in paths if path.exists()]):
        raise ValueError(
            f"there is already {', '.join(there)}: name another file with --output, or write over "
            "what is there with --force"
        )
    return paths


def _write(paths: Sequence[Path], made: Made) -> None:
    """Write PNGs, and name them."""
    made.save(paths)
    for path, own in zip(paths, made.settings, strict=True):
        typer.echo(f"{path}  ({own['nfe']} network evaluations)" if "nfe" in own else str(path))


def info(json: Json = None) -> None:
    """Versions, guidance names and presets."""
    from . import record

    found = record.info()
    if json is not None:
        report(found, json)
        return

    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    console.print(versions, highlight=False)
    machine = found["machine"]
    console.print(f"machine: {machine['processor']}, accelerator: {machine['accelerator']}")
    console.print(f"guidance: {', '.join(found['guidance'])}; combined: apg+ag, apg+interval")
    table = Table("model family", "name", "settings", title="presets")
    for family, presets in found["presets"].items():
        for name, settings in presets.items():
            table.add_row(family, name, settings)
    console.print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "compare": compare,
    "fit": fit,
    "calibrate": calibrate,
    "search": search,
    "personalize": personalize,
    "export": export,
    "denoise": denoise,
    "ui": ui,
    "info": info,
    "fid": metrics.fid,
    "kid": metrics.kid,
    "cmmd": metrics.cmmd,
    "precision-recall": metrics.precision_recall,
    "fd-infinity": variety.fd_infinity,
    "vendi": variety.vendi,
    "nearest": variety.nearest,
    "saturation": metrics.saturation,
    "similarity": metrics.similarity,
    "alignment": metrics.alignment,
    "score": score,
    "statistics": metrics.statistics,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(with_quiet(_command))


def main() -> None:
    """Entry point of ``pilotage``."""
    finish(functools.partial(app, prog_name="pilotage"))
