"""int8 weights for the networks of a pipeline."""

from .quantize import quantize

__all__ = ["quantize"]
