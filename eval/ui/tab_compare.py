"""The second tab: a small comparison, and its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from .background import followed
from .comparing import REPORTS, comparison
from .parts import LIMIT, cleared, code, progress, told
from .studio import Studio

SUGGESTED = ["cfg", "apg", "ag", "apg+ag", "forecast"]
PROMPTS = "twemoji style red apple\nnoto style penguin\nfluent style cactus\nblob style cat face"


class Compare:
    """The tab's components, and what its button does.

    Args:
        studio: The model.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            self.prompts = gr.Textbox(
                PROMPTS if studio.model is None else "",
                label="Prompts",
                elem_id="compare-prompts",
                info="one a line; more prompts tell more",
                lines=5,
                scale=2,
                min_width=280,
            )
            with gr.Column(scale=3, min_width=280):
                names = [name for name in SUGGESTED if set(name.split("+")) <= set(studio.methods)]
                self.guidances = gr.Dropdown(
                    [*names, *(name for name in studio.methods if name not in names)],
                    value=["cfg", "apg"],
                    multiselect=True,
                    allow_custom_value=True,
                    label="Guidance",
                    info="choose, or write one, such as apg(eta=0.5)+ag, and press Enter",
                )
                with gr.Row():
                    self.scales = gr.Textbox("3, 7.5, 15", label="Scales", min_width=110)
                    self.steps = gr.Slider(1, 100, 20, step=1, label="Steps", min_width=150)
                    self.seeds = gr.Slider(1, 8, 1, step=1, label="Seeds", min_width=150)
        self.make = gr.Button("Compare", variant="primary")
        self.status = gr.HTML(elem_id="compare-status")
        self.report = gr.HTML(elem_id="report")
        self.command = code("The same by command, to keep (with the prompts in prompts.txt)")
        event = self.make.click(
            told(self.run),
            [self.prompts, self.guidances, self.scales, self.steps, self.seeds],
            [self.status, self.report, self.command],
            show_progress="minimal",
            show_progress_on=self.status,
            api_name="compare",
            **LIMIT,
        )
        event.then(cleared, None, self.status, queue=False, api_visibility="private")

    def run(
        self, prompts: str, guidances: Sequence[str], scales: str, steps: int, seeds: int
    ) -> Iterator[Any]:
        """Compare; yields values of the outputs."""
        news = comparison(self.studio, prompts, guidances, scales, steps, seeds)
        report = yield from followed(
            news, lambda count: (progress(f"{count} pictures made"), gr.skip(), gr.skip())
        )
        link = f"/{REPORTS}/{report.page.parent.name}/{report.page.name}"
        frame = (
            f'<p><a href="{link}" target="_blank">Open the report in a tab of its own</a> '
            "(it is deleted when the page's program ends)</p>"
            f'<iframe class="report" src="{link}" title="Report of the comparison"></iframe>'
        )
        yield "", frame, gr.update(value=report.command, visible=True)
