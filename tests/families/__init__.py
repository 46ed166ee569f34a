"""The pipeline families of the test suite: tiny real pipelines, and a call for each.

`FAMILIES[name].build()` gives a stock diffusers pipeline with random weights in float32;
`pipe(**FAMILIES[name].call(batch, negative))[0]` gives its latents (pixels where a pipeline cannot
return latents). Both are seeded: the same build and call give the same numbers.
"""

from . import (
    animatediff,
    audio,
    controlnets,
    flux,
    flux_like,
    images,
    kolors,
    language,
    ltx2,
    pag,
    qwen,
    stable_diffusion,
    unets,
    videos,
    wan,
    worlds,
)
from .base import FAMILIES, Family

__all__ = [
    "FAMILIES",
    "Family",
    "animatediff",
    "audio",
    "controlnets",
    "flux",
    "flux_like",
    "images",
    "kolors",
    "language",
    "ltx2",
    "pag",
    "qwen",
    "stable_diffusion",
    "unets",
    "videos",
    "wan",
    "worlds",
]
