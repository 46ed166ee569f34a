"""The page: four tabs over one model."""

from __future__ import annotations

import gradio as gr

from .studio import Studio
from .tab_compare import Compare
from .tab_denoise import Denoise
from .tab_pictures import Pictures
from .tab_word import MakeWord

ABOUT = "# Pilotage\nGuidance side by side: same prompt, same noise. Model: {}, on {}."
KEPT = 24 * 3600  # seconds after which files that were given or made are deleted


def build(studio: Studio, local: bool = True) -> gr.Blocks:
    """The page of a model.

    Args:
        studio: The model.
        local: Whether only this machine can reach the page.
    """
    model = studio.model or "the embedded one"
    with gr.Blocks(title="Pilotage", analytics_enabled=False, delete_cache=(3600, KEPT)) as page:
        gr.Markdown(ABOUT.format(model, studio.pipe.device), elem_id="title")
        with gr.Tab("Pictures", id="pictures"):
            Pictures(studio)
        with gr.Tab("Compare", id="compare"):
            Compare(studio)
        with gr.Tab("Make a word", id="word"):
            MakeWord(studio)
        with gr.Tab("Denoise", id="denoise"):
            Denoise(studio, local)
    return page
