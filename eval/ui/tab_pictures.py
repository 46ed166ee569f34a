"""The first tab: a prompt under two settings, side by side."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from .background import followed
from .parts import LIMIT, cleared, code, enlarged, progress, table, told
from .sides import Side
from .studio import Picture, Step, Studio, Wish

COLOURS = {"left": "#0d9488", "right": "#ea580c"}
PLOTS = {  # column of the trace -> what is said of it
    "evaluations": "Network evaluations per step",
    "cosine": "Cosine of the two predictions",
    "update": "Norm of the update",
}
EMOJI = "a style (noto, twemoji, fluent, blob, flat, emojione) and a thing, as an emoji"
UNMEASURED = (
    "Effective guidance is measured by cfg with the same scale and steps: put that on one side."
)


class Pictures:
    """The tab's components, and what its buttons do.

    Args:
        studio: The model.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        embedded = studio.model is None
        with gr.Row(equal_height=False):
            self.prompt = gr.Textbox(
                "noto style fox" if embedded else "",
                label="Prompt",
                elem_id="prompt",
                info=EMOJI if embedded else None,
                placeholder="what the picture shall show",
                scale=4,
                min_width=260,
                lines=1,
                max_lines=4,
            )
            self.negative = gr.Textbox(
                label="Negative prompt",
                info="what it shall not show" if embedded else None,
                scale=2,
                min_width=160,
                lines=1,
                max_lines=4,
            )
            self.seed = gr.Number(
                0,
                label="Seed",
                info="of the noise" if embedded else None,
                precision=0,
                min_width=90,
            )
        with gr.Row():
            self.make = gr.Button("Make both pictures", variant="primary", scale=3)
            self.stop = gr.Button("Stop", scale=1, min_width=80)
            self.new = gr.Button("New seed", scale=1, min_width=80)
        self.status = gr.HTML(elem_id="status")
        with gr.Row(equal_height=False):
            self.left = Side(studio.methods, "Left", "cfg")
            with gr.Column(scale=2, min_width=320, elem_id="picture"):
                self.slider = gr.ImageSlider(
                    label="Left and right, same noise",
                    interactive=False,
                    format="png",
                    max_height=440,
                )
                self.figures = gr.HTML(elem_classes="figures", elem_id="figures")
                self.plots = [
                    gr.LinePlot(
                        x="step",
                        y=name,
                        color="side",
                        title=title,
                        color_map=COLOURS,
                        x_title="step",
                        y_title=" ",
                        y_lim=[0, None],
                        height=180,
                        buttons=[],
                    )
                    for name, title in PLOTS.items()
                ]
                with gr.Row():
                    self.files = [
                        gr.DownloadButton(f"{x} as PNG", size="sm", min_width=120)
                        for x in ("Left", "Right")
                    ]
                with gr.Accordion("The same by command or in Python", open=False):
                    self.codes = []
                    for side in ("Left", "Right"):
                        name = side.lower()
                        self.codes += [
                            code(f"{side}, command", "shell", f"{name}-command", True),
                            code(f"{side}, Python", "python", f"{name}-python", True),
                        ]
            self.right = Side(studio.methods, "Right", "apg")
        self._connect()

    def _connect(self) -> None:
        outputs = [self.status, self.slider, self.figures, *self.files, *self.codes, *self.plots]
        inputs = [self.prompt, self.negative, self.seed, *self.left.inputs, *self.right.inputs]
        event = gr.on(
            [self.make.click, self.prompt.submit],
            told(self.run),
            inputs,
            outputs,
            show_progress="minimal",
            show_progress_on=self.status,
            api_name="pictures",
            **LIMIT,
        )
        event.then(cleared, None, self.status, queue=False, api_visibility="private")
        self.stop.click(
            cleared, None, self.status, cancels=[event], queue=False, api_visibility="private"
        )
        self.new.click(
            lambda: random.randrange(2**31), None, self.seed, queue=False, api_visibility="private"
        )

    def run(self, prompt: str, negative: str, seed: int, *values: Any) -> Iterator[Any]:
        """Make both pictures; yields values of the outputs."""
        half = len(values) // 2
        wishes = [
            Wish(prompt, negative or "", seed, *side.read(part))
            for side, part in ((self.left, values[:half]), (self.right, values[half:]))
        ]
        for wish in wishes:  # both are known to be right before the first one is made
            self.studio.pipe.resolve_guidance(wish.guidance)
        made: list[Picture] = []
        same = [gr.skip()] * (1 + 2 + len(self.codes) + len(self.plots))
        for name, wish in zip(("left", "right"), wishes, strict=True):

            def live(step: Step, name: str = name) -> Any:
                slider: Any = gr.skip()
                if step.preview is not None:
                    preview = enlarged(step.preview)
                    left = enlarged(made[0].image) if made else preview
                    slider = _marked(left, name, step.done), _marked(preview, name, step.done)
                text = f"{name}: step {step.done} of {step.total}"
                return progress(text, step.done, step.total), slider, *same

            made.append((yield from followed(self.studio.picture(wish), live)))
        yield "", tuple(enlarged(one.image) for one in made), *self._results(made)

    def _results(self, made: list[Picture]) -> list[Any]:
        heads = [f"{side}: {one.wish.guidance}" for side, one in zip(COLOURS, made, strict=True)]
        effective = [self.studio.effective(one) for one in made]
        figures = table(
            heads,
            {
                "network evaluations": [float(one.samples.nfe[0]) for one in made],
                "effective guidance": effective,
                "saturation of the picture": [one.saturation for one in made],
                "seconds": [one.samples.seconds for one in made],
            },
        )
        if None in effective:
            figures += f'<div class="summary"><p>{UNMEASURED}</p></div>'
        rows = [
            row | {"side": s} for s, one in zip(COLOURS, made, strict=True) for row in one.trace
        ]
        codes = [text for one in made for text in (one.command, one.python)]
        plots = []
        for name in PLOTS:
            known = [row for row in rows if row[name] is not None]
            plots.append(pd.DataFrame(known, columns=["step", name, "side"]))
        return [figures, *(str(one.samples.paths[0]) for one in made), *codes, *plots]


def _marked(image: Image.Image, name: str, done: int) -> Image.Image:
    """The same picture with a text that no other step has.

    Gradio names a picture's file after its content: it would write a file anew that is being read.
    """
    marked = image.copy()
    marked.info = image.info | {"step": f"{name} {done}"}
    return marked
