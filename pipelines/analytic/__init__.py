"""Analytic denoisers as a diffusers model and pipeline, and schedulers that begin later."""

from ..guided import guided_class
from . import pipeline
from .model import AnalyticDenoiserModel
from .pipeline import encode_images
from .teleport import GaussianTeleport

AnalyticDenoisingPipeline = guided_class(pipeline.AnalyticDenoisingPipeline)

__all__ = [
    "AnalyticDenoiserModel",
    "AnalyticDenoisingPipeline",
    "GaussianTeleport",
    "encode_images",
]
