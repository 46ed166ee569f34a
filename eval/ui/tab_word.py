"""The third tab: a word from pictures, by forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .background import followed
from .learning import Learning, learn
from .parts import LIMIT, cleared, code, progress, told
from .studio import Studio

ABOUT = (
    "Drop a few pictures of one thing. The model learns a word for it, which prompts may then "
    "contain, also those of the first tab. The network itself stays as it is: the word's embedding "
    "is searched by forward passes, which takes a while; the held-out loss tells whether it works."
)


class MakeWord:
    """The tab's components, and what its buttons do.

    Args:
        studio: The model.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        gr.Markdown(ABOUT, elem_classes="summary")
        with gr.Row(equal_height=False):
            self.pictures = gr.Gallery(
                label="Pictures of one thing",
                interactive=True,
                type="filepath",
                columns=4,
                height=240,
                min_width=280,
                scale=2,
                elem_id="word-pictures",
            )
            with gr.Column(scale=3, min_width=280):
                with gr.Row():
                    self.word = gr.Textbox("<my-word>", label="New word", min_width=130)
                    self.initializer = gr.Textbox(
                        label="Known word to begin from",
                        placeholder="cat",
                        min_width=130,
                    )
                with gr.Row():
                    self.template = gr.Textbox(
                        "noto style {}" if studio.model is None else "a photo of {}",
                        label="Prompt of the pictures",
                        info="{} stands for the word",
                        min_width=180,
                    )
                    self.steps = gr.Slider(
                        10, 1000, 75, step=5, label="Steps", info="of eight forward passes each"
                    )
        with gr.Row():
            self.make = gr.Button("Make the word", variant="primary", scale=3)
            self.stop = gr.Button("Stop", scale=1, min_width=80)
        self.status = gr.HTML(elem_id="word-status")
        with gr.Row(equal_height=False):
            self.curve = gr.Image(
                label="Held-out loss", interactive=False, height=280, min_width=280, buttons=[]
            )
            self.previews = gr.Gallery(
                label="The best word so far", columns=4, height=280, min_width=280, buttons=[]
            )
        self.result = gr.Markdown(elem_id="word-result")
        self.file = gr.DownloadButton("Download the word", visible=False)
        self.command = code("The same by command (with the pictures in pictures/)")
        event = self.make.click(
            told(self.run),
            [self.pictures, self.word, self.initializer, self.steps, self.template],
            [self.status, self.curve, self.previews, self.result, self.file, self.command],
            show_progress="minimal",
            show_progress_on=self.status,
            api_name="word",
            **LIMIT,
        )
        event.then(cleared, None, self.status, queue=False, api_visibility="private")
        self.stop.click(
            cleared, None, self.status, cancels=[event], queue=False, api_visibility="private"
        )

    def run(
        self, pictures: Any, word: str, initializer: str, steps: int, template: str
    ) -> Iterator[Any]:
        """Learn; yields values of the outputs."""
        files = [picture[0] for picture in pictures or ()]
        news = learn(self.studio, files, word, initializer, steps, template)
        before = Learning(0, 0, (), ())

        def shown(now: Learning) -> Any:
            nonlocal before
            curve = now.curve if now.losses != before.losses else None
            previews = gallery(now) if now.previews != before.previews else gr.skip()
            before = now
            line = progress(f"step {now.done} of {now.total}", now.done, now.total)
            return line, curve or gr.skip(), previews, gr.skip(), gr.skip(), gr.skip()

        made = yield from followed(news, shown)
        text = f"`{made.name}` is learned: {made.summary}. Prompts of the first tab may contain it."
        yield (
            "",
            made.last.curve,
            gallery(made.last),
            text,
            gr.update(value=str(made.file), visible=True),
            gr.update(value=made.command, visible=True),
        )


def gallery(learning: Learning) -> list[tuple[str, str]]:
    """Previews with the step they are of, as a gallery shows them."""
    return [(str(file), text) for file, text in learning.previews]
