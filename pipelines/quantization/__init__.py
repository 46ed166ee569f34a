"""int8 weights for the networks of a pipeline, and files that keep them."""

from .files import load_quantized, save_quantized
from .quantize import Quantized, quantize, quantized_bytes

__all__ = ["Quantized", "load_quantized", "quantize", "quantized_bytes", "save_quantized"]
