"""Analytic denoisers as a diffusers model and pipeline, and schedulers that begin later."""

# Pipelines saved by version 0.1 name this module, and diffusers looks for the base class in it.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401

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
