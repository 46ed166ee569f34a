"""``pilotage personalize``: learn a word from pictures, by forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Backend, Device, Dtype, Graphs, Model, check_backend, check_target
from .terminal import Yes, go_on, is_quiet


def personalize(
    images: Annotated[
        Path,
        typer.Argument(help="Folder of pictures of one subject; x.txt is the caption of x.png."),
    ],
    token: Annotated[str, typer.Option(help="The new word, such as '<my-cat>'.")],
    initializer: Annotated[
        str,
        typer.Option(help="A known word to begin from (one token), or a token file to continue."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for token, checkpoint, curve and previews."),
    ] = Path("outputs/personalized"),
    preset: Annotated[str, typer.Option(help="ours, or zoodip (the paper's settings).")] = "ours",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; default: the preset's.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Instead of --steps: as many as fit into this time.")
    ] = None,
    vectors: Annotated[
        int | None,
        typer.Option(min=1, help="Embeddings that make up the word; default: the initializer's."),
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with {}; may be given several times.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Folder of other pictures of the subject, for the held-out loss."),
    ] = None,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after so many held-out losses without gain; 0 never.")
    ] = 5,
    evaluate_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between held-out losses; default: a twentieth of all."),
    ] = None,
    preview_every: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps between pictures of the best token; 0 never; default: a quarter of all.",
        ),
    ] = None,
    preview_prompt: Annotated[str, typer.Option(help="Prompt of the previews, with {}.")] = "{}",
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; default: a minute.")
    ] = None,
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
    yes: Yes = False,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "torch",
    graphs: Graphs = None,
) -> None:
    """Learn a word from pictures by forward passes; an interrupted run continues where it was.

    Exits with status 1 if nothing was learned.
    """
    from ..pipelines.personalization.inputs import (
        TEMPLATES,
        captions,
        check_templates,
        list_images,
        load_images,
        starting_point,
    )
    from ..pipelines.personalization.recipes import recipe

    # What can be wrong without the model is said before it is loaded.
    recipe(preset, steps=steps)
    check_backend(backend, graphs)
    if quantize is not None and graphs is not None:
        raise ValueError("--quantize is for torch: graphs are int8 if export made them so")
    for texts in (template or TEMPLATES, [preview_prompt]):
        check_templates(texts)
    for folder in filter(None, (images, held_out)):
        load_images(folder, 8)
        captions(list_images(folder), token)
    starting_point(initializer)

    from ..pipelines.personalization.files import loading_lines
    from ..pipelines.personalization.output import TOKEN
    from ..pipelines.personalization.personalizer import Personalizer
    from ..pipelines.processes import processes
    from .embedded import load_on

    check_target(output / TOKEN)
    pipe = load_on(device, model, dtype, backend, graphs)
    if quantize is not None:
        from ..pipelines.quantization.quantize import quantize as to_integers

        to_integers(pipe, quantize)
    pipe.set_progress_bar_config(disable=True)
    state = processes()

    def ask(seconds: float) -> None:
        if state.is_main_process:
            go_on(seconds, yes or state.num_processes > 1)

    result = Personalizer(pipe, max_rows=max_rows).fit(
        images,
        token,
        initializer,
        preset=preset,
        steps=steps,
        minutes=minutes,
        vectors=vectors,
        templates=template or TEMPLATES,
        held_out=held_out,
        patience=patience,
        evaluate_every=evaluate_every,
        preview_every=preview_every,
        preview_prompt=preview_prompt,
        checkpoint_every=checkpoint_every,
        resume=not fresh,
        output=output,
        points_per_call=points_per_call,
        seed=seed,
        before=None if minutes is not None else ask,
        progress=not is_quiet(),
    )
    if not state.is_main_process:
        return
    first, best = result.evaluations[0][2], min(e[2] for e in result.evaluations)
    cost = f"{result.forwards} forwards, {result.seconds:.0f} s"
    if not result.learned:
        typer.secho(
            f"error: nothing was learned, held-out loss {first:.4f} ({cost}): try more steps, "
            "another --initializer, or prompts that fit the pictures (--template, captions)",
            fg="red",
            err=True,
        )
        raise typer.Exit(1)
    typer.echo(f"{output / TOKEN}  (held-out loss {first:.4f} -> {best:.4f}, {cost})")
    lines = loading_lines(output / TOKEN, token, len(result.widths))
    needs = ", after `import safetensors.torch`" if len(lines) > 1 else ""
    typer.echo("\n  ".join([f"in diffusers{needs}:", *lines]))
