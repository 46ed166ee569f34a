"""diffusers pipelines that take ``guidance=``.

``from pilotage.pipelines import StableDiffusionXLPipeline`` gives diffusers' class with that one
argument more; so does every other pipeline name of diffusers, and ``AutoPipelineForText2Image``
and its like choose among them. ``guidance=`` is refused, with the reason, where a pipeline has no
guidance or keeps its branches in a way that is not known: ``pipelines/SUPPORT.md`` lists what is.
"""

from typing import Any

import diffusers

from .analytic import AnalyticDenoiserModel, AnalyticDenoisingPipeline, GaussianTeleport
from .auto import guided_auto
from .families import model_family
from .guided import GuidedMixin, guided, guided_class
from .guiders import Guider
from .personalization import LearnedToken, Personalizer, add_token, load_token, remove_token
from .schedulers import (
    FusedDDIMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerScheduler,
    FusedFlowMatchEulerScheduler,
)
from .seam.layouts import LayoutError
from .seam.noise_levels import UnknownSchedulerError, noise_level

__all__ = [
    "AnalyticDenoiserModel",
    "AnalyticDenoisingPipeline",
    "FusedDDIMScheduler",
    "FusedDPMSolverMultistepScheduler",
    "FusedEulerScheduler",
    "FusedFlowMatchEulerScheduler",
    "GaussianTeleport",
    "GuidedMixin",
    "Guider",
    "LayoutError",
    "LearnedToken",
    "Personalizer",
    "UnknownSchedulerError",
    "add_token",
    "guided",
    "guided_class",
    "load_token",
    "model_family",
    "noise_level",
    "remove_token",
]


def __getattr__(name: str) -> Any:
    stock = getattr(diffusers, name, None) if not name.startswith("_") else None
    if isinstance(stock, type) and name.startswith("AutoPipelineFor"):
        return guided_auto(stock)
    if not (isinstance(stock, type) and issubclass(stock, diffusers.DiffusionPipeline)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return guided_class(stock)


def __dir__() -> list[str]:
    names = (n for n in dir(diffusers) if n.endswith("Pipeline") or n.startswith("AutoPipelineFor"))
    return sorted([*__all__, *names])
