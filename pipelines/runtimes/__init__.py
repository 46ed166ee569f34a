"""Networks as ONNX graphs, which ONNX Runtime or OpenVINO run: inference only, int8 included.

    export_onnx(pipe, "graphs/")                 # unet/model.onnx, text_encoder/model.onnx
    on_runtime(pipe, "graphs/", "openvino")      # the pipeline goes on as before, on these graphs

What is built on forward passes works on them: pictures, guidance, personalization.
"""

from .export import export_onnx, quantize_onnx
from .graphs import RUNTIMES, on_runtime, recorded

__all__ = ["RUNTIMES", "export_onnx", "on_runtime", "quantize_onnx", "recorded"]
