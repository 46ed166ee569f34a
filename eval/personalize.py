"""``pilotage personalize``: learn a word from pictures, by forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Model


def personalize(
    images: Annotated[Path, typer.Argument(help="Folder of pictures of one subject.")],
    token: Annotated[str, typer.Option(help="The new word, such as '<my-cat>'.")],
    initializer: Annotated[str, typer.Option(help="A known word to begin from (one token).")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for token, checkpoint and previews.")
    ] = Path("outputs/personalized"),
    preset: Annotated[str, typer.Option(help="ours, or zoodip (the paper's settings).")] = "ours",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; default: the preset's.")] = None,
    vectors: Annotated[int, typer.Option(min=1, help="Embeddings that make up the word.")] = 1,
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with {}; may be given several times.")
    ] = None,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after so many held-out losses without gain; 0 never.")
    ] = 0,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between held-out losses.")
    ] = None,
    preview_every: Annotated[int, typer.Option(min=0, help="Steps between previews.")] = 0,
    preview_prompt: Annotated[str, typer.Option(help="Prompt of the previews, with {}.")] = "{}",
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore a checkpoint.")] = False,
    quantize: Annotated[
        str | None, typer.Option(help="int8: quantize the networks' weights first.")
    ] = None,
    max_rows: Annotated[
        int,
        typer.Option(min=0, help="Most rows of a network call, to save memory; 0 is no limit."),
    ] = 0,
    points_per_call: Annotated[
        int, typer.Option(min=0, help="Fix the calls, for bit-equal runs on several processes.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Learn a word from pictures by forward passes; an interrupted run continues where it was."""
    from ..pipelines.personalization.inputs import TEMPLATES, check_templates, load_images
    from ..pipelines.personalization.recipes import recipe

    # What can be wrong without the model is said before it is loaded.
    recipe(preset, steps=steps)
    for texts in (template or TEMPLATES, [preview_prompt]):
        check_templates(texts)
    load_images(images, 8)

    from ..pipelines.personalization.personalizer import TOKEN, Personalizer
    from ..pipelines.processes import processes
    from .embedded import load_on

    pipe = load_on(device, model)
    if quantize is not None:
        from ..pipelines.quantization.quantize import quantize as to_integers

        to_integers(pipe, quantize)
    pipe.set_progress_bar_config(disable=True)
    result = Personalizer(pipe, max_rows=max_rows).fit(
        images,
        token,
        initializer,
        preset=preset,
        steps=steps,
        vectors=vectors,
        templates=template or TEMPLATES,
        patience=patience,
        evaluate_every=evaluate_every,
        preview_every=preview_every,
        preview_prompt=preview_prompt,
        checkpoint_every=checkpoint_every,
        resume=not fresh,
        output=output,
        points_per_call=points_per_call,
        seed=seed,
    )
    if not processes().is_main_process:
        return
    first, best = result.evaluations[0][2], min(e[2] for e in result.evaluations)
    typer.echo(
        f"{output / TOKEN}  (held-out loss {first:.4f} -> {best:.4f}, "
        f"{result.forwards} forwards, {result.seconds:.0f} s)"
    )
