"""Compare guidance settings: the command.

    python -m pilotage.eval.comparison.compare -p "twemoji style fox" -g cfg -g apg -w 3 -w 7.5 -o outputs/fox

See `comparison` for what is compared and how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_EXTRACTOR = "efficientnet-lite0"
NONE: list[str] = []
GUIDANCES = ["cfg", "apg"]
SCALES = [3.0, 7.5, 15.0]
STEPS = [20]

app = typer.Typer(add_completion=False)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ValueError: there is none, or the file is not UTF-8 text.
    """
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from error
    if not any(prompts):
        raise ValueError(f"{path} has no prompts: one a line is expected")
    return [prompt for prompt in prompts if prompt]


@app.command()
def command(
    prompts: Annotated[
        Path | None, typer.Argument(help="Text file, one prompt a line.", show_default=False)
    ] = None,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A prompt; repeat.")] = NONE,
    guidance: Annotated[
        list[str], typer.Option("--guidance", "-g", help="cfg, apg, ag, apg+ag, ...; repeat.")
    ] = GUIDANCES,
    scale: Annotated[
        list[float], typer.Option("--scale", "-w", help="Guidance scale, 1 is none; repeat.")
    ] = SCALES,
    steps: Annotated[list[int], typer.Option(min=1, help="Sampling steps; repeat.")] = STEPS,
    seeds: Annotated[int, typer.Option(min=1, help="Samples of every prompt.")] = 1,
    first_seed: Annotated[int, typer.Option(help="Seed of the first sample.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path(
        "outputs/compare"
    ),
    reference: Annotated[
        Path | None, typer.Option(help="Folder of real pictures, for distribution metrics.")
    ] = None,
    extractor: Annotated[str, typer.Option(help="Features for the reference.")] = DEFAULT_EXTRACTOR,
    clip: Annotated[
        str | None, typer.Option(help="CLIP folder or hub name, for the alignment.")
    ] = None,
    ridge: Annotated[
        Path | None, typer.Option(help="A ridge map of `alignment --fit`, for the alignment.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What the pictures shall not show.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 8,
    equal_nfe: Annotated[bool, typer.Option(help="Add CFG with fewer steps.")] = True,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name; default: the embedded emoji model.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Compare guidance settings: pictures, every metric, one HTML report; resumable.

    Under `accelerate launch -m pilotage.eval.comparison.compare` the work is split among the processes.
    """
    from ..embedded import check_guidance, load_on

    texts = ([] if prompts is None else read_prompts(prompts)) + list(prompt)
    if not texts:
        raise ValueError("no prompts: name a text file with one a line, or give --prompt")
    if clip is not None and ridge is not None:
        raise ValueError("name one of --clip and --ridge")
    for name in guidance:
        check_guidance(name, model)  # an unknown name fails before anything is loaded

    from ...pipelines.processes import processes
    from ..metrics.options import check_target, device_of
    from .comparison import compare, grid
    from .sampling import Plan

    check_target(output / "cells.json")
    settings = grid(guidance, scale, steps)
    options = {"negative_prompt": negative or None}
    seed_list = range(first_seed, first_seed + seeds)
    Plan(texts, settings, seed_list, batch_size, options)

    place = device_of(device)
    pipe = load_on(place, model)
    real = network = score = None
    if reference is not None:
        from ..metrics.extractors import load_extractor
        from ..metrics.pictures import load_pictures

        real = load_pictures(reference)
        network = load_extractor(extractor).to(place)
    if clip is not None or ridge is not None:
        from ..metrics.alignment import CLIPAlignment, RidgeAlignment

        score = CLIPAlignment(clip) if clip is not None else RidgeAlignment.load(ridge)
        score = score.to(place)
    compare(
        pipe,
        texts,
        settings,
        output,
        seed_list,
        reference=real,
        extractor=network,
        alignment=score,
        batch_size=batch_size,
        equal_nfe=equal_nfe,
        report=report,
        options=options,
    )
    if processes().is_main_process:
        page = output / "report.html"
        typer.echo(str(page if report else output / "cells.json"))


if __name__ == "__main__":
    from ..cli import run

    run(app)
