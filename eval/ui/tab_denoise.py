"""The fourth tab: pictures like some given ones, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .background import followed
from .denoising import METHODS, sample
from .parts import LIMIT, cleared, code, enlarged, progress, told
from .studio import Step, Studio

ABOUT = (
    "Drop pictures, or name a folder of them. A denoiser is computed from them in closed form, "
    "nothing is trained, and new pictures are sampled with it."
)


class Denoise:
    """The tab's components, and what its buttons do.

    Args:
        studio: Its folder is used.
        local: Whether only this machine can reach the page; else folders cannot be named.
    """

    def __init__(self, studio: Studio, local: bool) -> None:
        self.studio, self.local = studio, local
        gr.Markdown(
            ABOUT if local else ABOUT.replace(", or name a folder of them", ""),
            elem_classes="summary",
        )
        with gr.Row(equal_height=False):
            self.pictures = gr.Gallery(
                label="Pictures",
                interactive=True,
                type="filepath",
                columns=4,
                height=240,
                min_width=280,
                scale=2,
                elem_id="denoise-pictures",
            )
            with gr.Column(scale=3, min_width=280):
                self.folder = gr.Textbox(
                    label="or a folder on this machine", placeholder="photos/", visible=local
                )
                with gr.Row():
                    self.method = gr.Dropdown(
                        list(METHODS),
                        value="local",
                        label="Denoiser",
                        filterable=False,
                        min_width=130,
                    )
                    self.size = gr.Number(
                        32,
                        label="Side in pixels",
                        info="cropped to; empty: as they are",
                        precision=0,
                        placeholder="as they are",
                        min_width=130,
                    )
                with gr.Row():
                    self.count = gr.Slider(1, 16, 4, step=1, label="How many", min_width=130)
                    self.steps = gr.Slider(1, 50, 10, step=1, label="Steps", min_width=130)
                    self.seed = gr.Number(0, label="Seed", precision=0, min_width=90)
        with gr.Row():
            self.make = gr.Button("Sample", variant="primary", scale=3)
            self.stop = gr.Button("Stop", scale=1, min_width=80)
        self.status = gr.HTML(elem_id="denoise-status")
        self.made = gr.Gallery(
            label="Made without a network",
            columns=4,
            height=320,
            format="png",
            object_fit="contain",
            elem_id="denoised",
        )
        self.command = code("The same by command")
        inputs = [self.pictures, self.folder, self.method, self.size]
        event = self.make.click(
            told(self.run),
            [*inputs, self.count, self.steps, self.seed],
            [self.status, self.made, self.command],
            show_progress="minimal",
            show_progress_on=self.status,
            api_name="denoise",
            **LIMIT,
        )
        event.then(cleared, None, self.status, queue=False, api_visibility="private")
        self.stop.click(
            cleared, None, self.status, cancels=[event], queue=False, api_visibility="private"
        )

    def run(self, pictures: Any, folder: str, *settings: Any) -> Iterator[Any]:
        """Sample; yields values of the outputs."""
        if folder and not self.local:
            raise ValueError("folders can be named only where this machine alone has the page")
        files = [picture[0] for picture in pictures or ()]
        news = sample(self.studio, files, folder or "", *settings)

        def shown(step: Step) -> Any:
            text = f"step {step.done + 1} of {step.total}"
            return progress(text, step.done, step.total), gr.skip(), gr.skip()

        made = yield from followed(news, shown)
        if made.note:
            gr.Info(made.note)
        images = [enlarged(image) for image in made.made.images]
        yield "", images, gr.update(value=made.command, visible=True)
