"""The command line, thin over the Python API."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .personalize import personalize

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Guidance for diffusion sampling, on every diffusers pipeline.",
)

app.command()(personalize)


def check_picture(output: Path) -> None:
    """Refuse a name that no PNG can be written to, before anything is loaded.

    Raises:
        ValueError: another suffix, or what `check_target` refuses.
    """
    from .metrics.options import check_target

    if output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {output}")
    check_target(output)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    guidance: Annotated[
        str, typer.Option("--guidance", "-g", help="cfg, apg, ag, forecast, or e.g. apg+ag.")
    ] = "apg",
    scale: Annotated[float, typer.Option("--scale", "-w", help="Guidance scale; 1 is none.")] = 7.5,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path("out.png"),
    negative: Annotated[str, typer.Option(help="What the picture shall not show.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of pictures.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name; default: the embedded emoji model.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Make pictures from a prompt; the settings are kept in the PNG's metadata."""
    from .embedded import check_guidance, load_on
    from .metrics.options import device_of

    check_guidance(guidance, model)  # an unknown name fails before anything is loaded
    check_picture(output)
    place = device_of(device)

    import torch
    from PIL.PngImagePlugin import PngInfo

    from ..pipelines.fitting.fitted import negative_argument, unconditional_text
    from ..pipelines.guided import scale_option

    pipe = load_on(place, model)
    none = scale == 1
    settings = pipe.resolve_guidance("cfg" if none else guidance)
    strength = scale_option(pipe, scale)
    unwanted = unconditional_text(pipe, negative or None)
    result = pipe(
        prompt=[prompt],
        guidance=settings,
        num_inference_steps=steps,
        num_images_per_prompt=count,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
        **strength,
        **negative_argument(pipe, unwanted, 1),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    nfe = pipe.guidance_trace.nfe
    for i, image in enumerate(result.images):
        path = output if count == 1 else output.with_stem(f"{output.stem}-{i}")
        info = PngInfo()
        made = {
            "prompt": prompt,
            "negative_prompt": unwanted,
            "guidance": None if none else str(settings),
            **strength,
            "steps": steps,
            "seed": seed + i,
            "scheduler": type(pipe.scheduler).__name__,
            "model": str(model or "embedded"),
            "nfe": nfe[i],
        }
        info.add_text("pilotage", json.dumps(made))
        image.save(path, pnginfo=info)
        typer.echo(f"{path}  ({nfe[i]} network evaluations)")


@app.command()
def denoise(
    images: Annotated[Path, typer.Argument(help="Folder of pictures of one size.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="local (pictures up to 104 x 104 in colour), soft (up to 73 x 73), optimal, "
            "wiener, ls, els, pspc.",
        ),
    ] = "local",
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path("out.png"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of pictures.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps (DDIM).")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    tau: Annotated[float | None, typer.Option(help="local: threshold of the mask.")] = None,
    label: Annotated[
        int | None, typer.Option(help="Class: number of the subfolder in alphabetical order.")
    ] = None,
    guidance: Annotated[str, typer.Option("--guidance", "-g", help="With --scale above 1.")] = "",
    scale: Annotated[float, typer.Option("--scale", "-w", help="Guidance scale; 1 is none.")] = 1.0,
) -> None:
    """Sample from a folder of pictures, without a network (analytic denoisers)."""
    from ..guidance import resolve
    from ..guidance.analytic import DENOISERS

    if guidance:
        resolve(guidance)
    if method not in DENOISERS:
        raise ValueError(f"unknown method {method!r}: expected one of {sorted(DENOISERS)}")
    if tau is not None and method not in ("local", "soft"):
        raise ValueError(f"--tau belongs to the local denoisers, not to {method!r}")
    if not images.is_dir():
        raise FileNotFoundError(f"no folder {images}")
    check_picture(output)

    import torch
    from PIL.PngImagePlugin import PngInfo

    from ..pipelines import AnalyticDenoisingPipeline

    options = {} if tau is None else {"tau": tau}
    pipe = AnalyticDenoisingPipeline(images=images, method=method, options=options)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    result = pipe(
        count,
        num_inference_steps=steps,
        class_labels=label,
        guidance_scale=scale,
        guidance=guidance or None,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(result.images):
        path = output if count == 1 else output.with_stem(f"{output.stem}-{i}")
        made = {
            "images": str(images),
            "data": pipe.unet.config.statistics["identity"]["data"],
            "method": method,
            **options,
            "steps": steps,
            "seed": seed + i,
            "label": label,
            "guidance": guidance,
            "guidance_scale": scale,
        }
        tags = PngInfo()
        tags.add_text("pilotage", json.dumps(made))
        image.save(path, pnginfo=tags)
        typer.echo(str(path))


@app.command()
def info() -> None:
    """Versions, guidance names and presets."""
    from rich.console import Console
    from rich.table import Table

    from ..guidance import PRESETS, available
    from ..guidance.presets import LITERATURE
    from .record import machine, versions

    console = Console()
    console.print(
        ", ".join(f"{name} {version}" for name, version in versions().items()), highlight=False
    )
    console.print(f"machine: {machine()['processor']}, accelerator: {machine()['accelerator']}")
    console.print(f"guidance: {', '.join(available())}; combined: apg+ag, apg+interval")
    table = Table("model family", "name", "settings", title="presets")
    for family, presets in (PRESETS | {"any (literature)": LITERATURE}).items():
        for name, preset in presets.items():
            values = ", ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in asdict(preset).items()
            )
            table.add_row(family, name, values)
    console.print(table)


MODULES = {
    "compare": ("comparison.compare", "Compare guidance settings: pictures, metrics and a report."),
    "fit": ("tuning.fit", "Fit LinearAG's coefficients to a model."),
    "calibrate": (
        "tuning.calibrate",
        "Find Adaptive Guidance's threshold for a cost or a quality.",
    ),
    "search": ("tuning.search", "Search a schedule of evaluated, estimated and forecast steps."),
    "fid": ("metrics.frechet", "Fréchet distance between two sets of pictures."),
    "kid": ("metrics.kid", "Kernel distance between two sets of pictures."),
    "cmmd": ("metrics.cmmd", "CMMD between two sets of pictures, on CLIP embeddings."),
    "precision-recall": ("metrics.precision_recall", "Precision, recall, density and coverage."),
    "saturation": ("metrics.saturation", "Saturation, contrast and colourfulness of pictures."),
    "similarity": ("metrics.similarity", "SSIM and PSNR to pictures of the same name."),
    "alignment": ("metrics.alignment", "How well pictures show what their prompts say."),
    "statistics": ("metrics.statistics", "Keep a folder's features or their statistics in a file."),
}


def _register(name: str, module: str, text: str) -> None:
    # The module is imported when its command runs, so that ``pilotage --help`` stays fast; it
    # parses its own arguments, --help too.
    def forward(context: typer.Context) -> None:
        command = importlib.import_module(f".{module}", __package__).app
        command(context.args, prog_name=context.command_path)

    forward.__doc__ = text
    settings = {
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    }
    app.command(name, context_settings=settings)(forward)


for _name, (_module, _text) in MODULES.items():
    _register(_name, _module, _text)


def main() -> None:
    """Entry point of ``pilotage``."""
    run(app)


def run(command: typer.Typer) -> None:
    """Run a command: errors of the user's making end in one line and status 2."""
    try:
        command()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
