"""One APG step as different libraries compute it, on the same predictions."""

from __future__ import annotations

import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from torch import Tensor

from examples.studies.timing import Operation
from pilotage.guidance import APG, Predictions, Step
from pilotage.guidance.ops import guide_step

SCALE, ETA, RADIUS, MOMENTUM = 7.5, 0.0, 15.0, -0.5
# On the predictions as they are: so all providers do the same work.
RULE = APG(ETA, RADIUS, MOMENTUM, threshold_unit="l2", space="native")
STEP = Step(1, 2)


def comfyui_apg(
    cond: Tensor, uncond: Tensor, buffer: Tensor, scale: float = SCALE
) -> tuple[Tensor, Tensor]:
    """The formula of ComfyUI's node in plain PyTorch, with its c + w g' and its three dimensions.

    Args:
        cond, uncond: Predictions, with shape (B, ..., H, W).
        buffer: The momentum buffer, with the shape of `cond`.
        scale: w.

    Returns:
        The guided prediction and the new buffer.
    """
    dims = [d for d in (-1, -2, -3) if -d < cond.ndim]
    update = buffer = cond - uncond + MOMENTUM * buffer
    norm = torch.linalg.vector_norm(update, dim=dims, keepdim=True)
    update = update * torch.minimum(torch.ones_like(norm), RADIUS / norm)
    unit = torch.nn.functional.normalize(cond, dim=dims)
    parallel = (update * unit).sum(dim=dims, keepdim=True) * unit
    return cond + scale * (update - parallel + ETA * parallel), buffer


def diffusers_apg(cond: Tensor, uncond: Tensor, momentum: MomentumBuffer) -> Tensor:
    """diffusers' operation, told to follow the paper's formula."""
    return normalized_guidance(
        cond, uncond, SCALE - 1, momentum, ETA, RADIUS, use_original_formulation=True
    )


def our_apg(cond: Tensor, uncond: Tensor, buffer: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Our operation.

    Returns:
        The guided prediction and the new buffer.
    """
    predictions = Predictions({"cond": cond, "uncond": uncond}, STEP)
    done = guide_step(RULE, predictions, STEP, SCALE, buffer, impl=impl)
    return done.prediction, done.state


def providers(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Operation]:
    """One call of an APG step by provider, on fixed random predictions with a filled buffer.

    Args:
        shape: Of one sample; the batch is 1.
        dtype: Of the predictions.
        device: Where to run; "fused" is there on CUDA only.
        compiled: Whether to offer ``torch.compile`` of the reference.
    """
    generator = torch.Generator().manual_seed(0)
    cond, uncond, last = (
        torch.randn(1, *shape, generator=generator).to(device, dtype) for _ in range(3)
    )
    momentum = MomentumBuffer(MOMENTUM)
    momentum.update(last)
    buffer = last.float()
    found = {
        "diffusers": lambda: diffusers_apg(cond, uncond, momentum),
        "comfyui": lambda: comfyui_apg(cond, uncond, last),
        "reference": lambda: our_apg(cond, uncond, buffer, "reference"),
    }
    if compiled:
        torch._dynamo.reset()  # past a limit of shapes it would silently go on uncompiled
        graph = torch.compile(our_apg, dynamic=False)
        found["compiled"] = lambda: graph(cond, uncond, buffer, "reference")
    if device.type == "cuda":
        found["fused"] = lambda: our_apg(cond, uncond, buffer, "fused")
    return found


def minimum_bytes(elements: int, itemsize: int, buffer_itemsize: int = 4) -> int:
    """Bytes that an APG step must move: predictions and buffer in, guided one and buffer out."""
    return elements * (3 * itemsize + 2 * buffer_itemsize)
