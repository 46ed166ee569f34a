"""diffusers pipelines that take ``guidance=``.

``from pilotage.pipelines import StableDiffusionXLPipeline`` gives diffusers' class with that one
argument more; so does every other pipeline name of diffusers whose branches are known.
"""

import diffusers

from .families import model_family
from .guided import GuidedMixin, guided, guided_class
from .layouts import LayoutError
from .noise_levels import UnknownSchedulerError, noise_level
from .support import LAYOUTS

__all__ = [
    "LAYOUTS",
    "GuidedMixin",
    "LayoutError",
    "UnknownSchedulerError",
    "guided",
    "guided_class",
    "model_family",
    "noise_level",
]


def __getattr__(name: str):
    stock = getattr(diffusers, name, None) if name in LAYOUTS else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return guided_class(stock)


def __dir__():
    return sorted([*__all__, *LAYOUTS])
