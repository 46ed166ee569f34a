"""``pilotage compare``; see `comparison` for what is compared and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import (
    DEFAULT_EXTRACTOR,
    Background,
    BatchSize,
    Device,
    Dreamsim,
    Dtype,
    Lpips,
    MadeBy,
    Model,
    Negative,
    Parallel,
    Recursive,
    Resize,
    Token,
    add_tokens,
    check_target,
    check_tokens,
)
from ..prompts import read_prompts
from ..terminal import Yes, is_quiet, note
from .config import Config

NONE: list[str] = []
GUIDANCES = ["cfg", "apg"]
SCALES = [3.0, 7.5, 15.0]
STEPS = [20]


def compare(
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
        Path | None,
        typer.Option(help="Folder or .npz of real pictures, for distribution metrics."),
    ] = None,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    made_by: MadeBy = None,
    extractor: Annotated[str, typer.Option(help="Features for the reference.")] = DEFAULT_EXTRACTOR,
    clip: Annotated[
        str | None, typer.Option(help="CLIP folder or hub name, for the alignment.")
    ] = None,
    ridge: Annotated[
        Path | None, typer.Option(help="A map made by `alignment --fit`, for the alignment.")
    ] = None,
    score: Annotated[
        list[str],
        typer.Option(
            help="pickscore:MODEL, hpsv2:MODEL, aesthetic:MODEL, clip-iqa:MODEL (folder or hub "
            "name): what people would prefer, with the share of wins over CFG; repeat."
        ),
    ] = NONE,
    lpips: Lpips = None,
    dreamsim: Dreamsim = None,
    negative: Negative = None,
    batch_size: BatchSize = 8,
    equal_nfe: Annotated[
        bool, typer.Option(help="Add CFG with fewer steps at the cost of cheaper settings.")
    ] = True,
    matched: Annotated[
        bool,
        typer.Option(
            "--matched", help="Add every setting at the scale at which it is as strong as CFG."
        ),
    ] = False,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    config: Config = None,
    yes: Yes = False,
    token: Token = None,
    model: Model = None,
    device: Device = "auto",
    parallel: Parallel = "samples",
    dtype: Dtype = "auto",
) -> None:
    """Compare guidance settings: pictures, every metric, one HTML report; resumable.

    Under `accelerate launch -m pilotage.eval compare` the processes share out the pictures, or with
    --parallel branches the evaluations of every step.
    """
    from ..embedded import check_guidance, load_on

    texts = ([] if prompts is None else read_prompts(prompts)) + list(prompt)
    if not texts:
        raise ValueError("no prompts: name a text file with one a line, or give --prompt")
    for name in guidance:
        check_guidance(name, model)  # an unknown name fails before anything is loaded
    check_tokens(token)
    if reference is None and (resize or recursive or made_by):
        raise ValueError("--resize, --recursive and --made-by need --reference")

    from ...pipelines.fitting.runs import Runs
    from ...pipelines.processes import processes
    from ..estimate import ask
    from ..metrics.alignment import Alignment, load_scorer
    from ..metrics.distances import load_distances
    from ..metrics.preference import kinds_of, load_preference
    from ..pictures import Pictures, Reading
    from .comparison import compare as run
    from .comparison import grid, with_baselines
    from .plan import Plan
    from .reference import open_reference
    from .sampling import missing

    check_target(output / "cells.json")
    plan = Plan(
        texts,
        grid(guidance, scale, steps),
        range(first_seed, first_seed + seeds),
        batch_size,
        {"negative_prompt": negative or None},
    )
    kinds = kinds_of(score)
    scorers: dict[str, Alignment] = {}
    if clip or ridge:
        scorers["alignment"] = load_scorer(clip, ridge).to(device)
    scorers |= {kind: load_preference(name, device) for kind, name in kinds.items()}
    distances = load_distances(device, lpips=lpips, dreamsim=dreamsim)
    main = processes().is_main_process
    network, real, reading = None, None, Reading(recursive, resize, background)
    if reference is not None:
        real, network = open_reference(reference, extractor, device, reading, made_by)
    pipe = load_on(device, model, dtype)
    add_tokens(pipe, token)
    todo = missing(pipe, with_baselines(plan), output / "pictures", parallel)
    runs = Runs(pipe, texts, max(*scale, 2.0), batch_size=batch_size)
    sizes = [len(plan.chunks[number]) for number, _ in todo]
    needed = sum(size * setting.steps for size, (_, setting) in zip(sizes, todo, strict=True))
    times = 2 if matched else 1  # of each setting, another one as strong
    ask(runs, times * sum(sizes), times * needed, yes)
    loading = ["--model", model] if model else []
    loading += ["--dtype", dtype] if dtype != "auto" else []
    loading += [word for path in token or () for word in ("--token", str(path))]
    run(
        pipe,
        plan,
        output,
        reference=real,
        extractor=network,
        scorers=scorers,
        distances=distances,
        reading=reading,
        equal_nfe=equal_nfe,
        report=report,
        progress=not is_quiet(),
        matched=matched,
        parallel=parallel,
        loading=loading,
    )
    if main:
        for line in real.changes() if isinstance(real, Pictures) else ():
            note(line)
        typer.echo(str(output / ("report.html" if report else "cells.json")))
