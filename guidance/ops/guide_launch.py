"""The launches of the fused guidance step: what is allocated, how it is divided into programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import Space
from ..rules.apg import APG
from ..rules.cfg import CFG
from ..rules.cfg_zero_star import CFGZeroStar
from ..rules.magnitude_aware import MagnitudeAware
from ..rules.rescale import CFGRescale
from ..rules.tcfg import TCFG
from .guide_kernel import guide_kernel
from .guide_sums import ROWS

ONE_PROGRAM = 65536
"""Elements of a sample up to which one program sums and writes all of it."""

BLOCK = 4096
"""Elements that a program holds at a time, at most; 16 warps do."""

PARTS = 256
"""Largest number of partial sums of a sample."""

LONG = 2**31 - 2**16
"""Elements of a sample from which their numbers need 64 bits."""

Numbers = tuple[float, float, float]
"""The first and the second number of a rule's formula in `guide_sums.coefficients`, and beta."""

KERNELS: dict[type[Rule], Callable[[Any, int], Numbers]] = {
    CFG: lambda rule, elements: (0.0, 0.0, 0.0),
    CFGRescale: lambda rule, elements: (rule.phi, 0.0, 0.0),
    APG: lambda rule, elements: (rule.eta, _radius(rule, elements), rule.momentum),
    CFGZeroStar: lambda rule, elements: (float(rule.optimized_scale), 0.0, 0.0),
    TCFG: lambda rule, elements: (0.0, 0.0, 0.0),
    MagnitudeAware: lambda rule, elements: (rule.alpha, 0.0, 0.0),
}
"""Rule with a kernel -> its numbers, from the rule and the number of elements of a sample."""


def has_kernel(rule: Rule, step: Step) -> bool:
    """Whether a rule is computed by the kernel at a step.

    A subclass of such a rule may combine differently and is not; neither are the first steps of
    CFG-Zero*, which are 0.
    """
    if isinstance(rule, CFGZeroStar) and step.index < rule.zero_steps:
        return False
    return type(rule) in KERNELS


def launch(
    rule: Rule,
    predictions: Predictions,
    step: Step,
    w: float | Tensor,
    state: Tensor | None,
    gamma_space: Space | None,
    want_prediction: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The fields `finite`, `prediction`, `state` and `gamma` of a `GuideStep`.

    Arguments as of `guide_step`, for a rule that `has_kernel`.

    Raises:
        ValueError: samples have scales of their own, or denoised images are needed and the noise
            level or x_t is not known.
    """
    if isinstance(w, Tensor) and w.ndim > 0:
        raise ValueError(f"the kernel takes one scale for all samples, got {tuple(w.shape)}")
    cond, uncond = predictions.pair("native")
    batch, *shape = cond.shape
    elements, device = math.prod(shape), cond.device
    first, second, momentum = KERNELS[type(rule)](rule, elements)
    x: Tensor | None = None
    a_x: float | Tensor = 0.0
    a_p: float | Tensor = 1.0
    if "x0" in (rule.space, gamma_space):
        level, x = step.level, step.x_t
        if level is None or x is None:
            raise ValueError("denoised images need the noise level of the scheduler and x_t")
        a_x, a_p = level.coefficients()
    inputs = [cond, uncond, x, state if momentum != 0 else None]
    strides = _strides(cond)

    def without_gaps(tensor: Tensor | None) -> Tensor | None:
        """A tensor whose samples lie as those of `cond` do: itself, or a copy."""
        if tensor is None:
            return None
        found = zip(shape, tensor.stride()[1:], strides, strict=True)
        if tensor.shape == cond.shape and all(n == 1 or a == b for n, a, b in found):
            return tensor
        return like_cond(tensor.dtype).copy_(tensor)

    def like_cond(dtype: torch.dtype) -> Tensor:
        size = (elements, *strides)
        return torch.empty_strided(cond.shape, size, dtype=dtype, device=device)

    inputs = [without_gaps(t) for t in (cond, uncond, x, state if momentum != 0 else None)]
    prediction = like_cond(cond.dtype) if want_prediction else None
    if want_prediction:
        state = like_cond(torch.float32) if momentum != 0 else None
    finite = torch.empty(batch, dtype=torch.bool, device=device)
    gamma = None
    if gamma_space is not None:
        gamma = torch.empty(batch, dtype=torch.float32, device=device)
    numbers = [_number(value, device) for value in (a_x, a_p, w)]
    block = min(BLOCK, max(128, triton.next_power_of_2(elements)))
    blocks = triton.cdiv(elements, block)
    table, part, parts = None, block * blocks, 1
    if elements > ONE_PROGRAM:
        part = block * triton.cdiv(blocks, PARTS)
        parts = triton.cdiv(elements, part)
        table = torch.empty(batch, ROWS, parts, dtype=torch.float32, device=device)

    def run(stage: str, programs: int, chunk: int) -> None:
        guide_kernel[programs, batch](
            *inputs,
            table,
            prediction,
            state if want_prediction else None,
            gamma,
            finite,
            *numbers,
            first,
            second,
            momentum,
            elements,
            *(0 if t is None else t.stride(0) for t in inputs),
            POINTERS=tuple(isinstance(number, Tensor) for number in numbers),
            RULE=rule.name,
            IN_X0=rule.space == "x0",
            GAMMA=gamma_space,
            WIDE=elements > LONG,
            STAGE=stage,
            PARTS=parts,
            PADDED=triton.next_power_of_2(parts),
            PART=part,
            CHUNK=chunk,
            BLOCK=block,
            num_warps=16 if elements > BLOCK else 4,
        )

    if table is None:
        run("whole", 1, part)
    else:
        run("sums", parts, part)
        # Small programs write; one is enough where nothing but gamma and finite is wanted.
        run("write", triton.cdiv(blocks, 2) if want_prediction else 1, 2 * block)
    return finite[0] if batch == 1 else finite.all(), prediction, state, gamma


def _radius(rule: APG, elements: int) -> float:
    return rule.norm_threshold * (math.sqrt(elements) if rule.threshold_unit == "rms" else 1.0)


def _number(value: float | Tensor, device: torch.device) -> float | Tensor:
    """What the kernel takes for a number: one that lies on another device is read."""
    return value if isinstance(value, Tensor) and value.device == device else float(value)


def _strides(tensor: Tensor) -> list[int]:
    """Strides of a sample without gaps whose dimensions lie in the same order as the tensor's."""
    shape, own = tensor.shape[1:], tensor.stride()[1:]
    order = sorted(range(len(shape)), key=lambda d: (shape[d] == 1, -own[d], d))
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d], step = step, step * shape[d]
    return strides
