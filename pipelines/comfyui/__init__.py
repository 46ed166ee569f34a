"""Guidance within ComfyUI's samplers: the same rules and policies, as patches of its models.

    model = guided(model, "apg+ag")  # a patched clone, for KSampler and every other sampler node

ComfyUI is not imported before a patched model samples; its node pack is ``examples/comfyui``.
"""

from .patch import guidance_of, guided, model_family, trace_of, with_policy, with_rule
from .picture import trace_picture
from .run import SamplingError
from .widgets import make, methods, widgets

__all__ = [
    "SamplingError",
    "guidance_of",
    "guided",
    "make",
    "methods",
    "model_family",
    "trace_of",
    "trace_picture",
    "widgets",
    "with_policy",
    "with_rule",
]
