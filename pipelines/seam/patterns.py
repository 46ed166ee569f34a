r"""How a pipeline guides: the pattern of its steps, and what a step says by it.

A pipeline evaluates its branches :math:`P_k` in one or several calls of its network and hands its
scheduler some combination of them,

.. math:: M = \sum_k a_k P_k.

Both ends can be seen, so the :math:`a_k` are found by least squares. For two branches they are
:math:`s w` and :math:`s (1 - w)` with the sign :math:`s = \pm 1`: which branch is the conditional
one and the guidance scale w come out. For more, everything that is added to the conditional
prediction c is guidance away from one effective unconditional prediction,

.. math:: \tilde u = c - \frac{M - c}{w - 1}, \qquad w = a_c / s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...guidance.device import on_host, row_index
from ...guidance.prediction import accumulate

Norm = Literal["", "match", "limit", "match channels"]
"""What becomes of the norm of every token (last dimension) of the combination: nothing; it is made
that of the conditional prediction; it is made that at most. Or, where pictures have frames, of
every pixel's channels (axis 2)."""
NORM_AXES: dict[Norm, int] = {"match": -1, "limit": -1, "match channels": 2}

ENOUGH = 4096  # elements that the scale is measured on, of every step after the first


@dataclass(frozen=True)
class Pattern:
    """How a step evaluates its branches, and what the pipeline makes of them.

    Args:
        calls: How many branches every call of the step holds, one behind the other.
        main: The conditional branch, counted over all calls; None: not known.
        sign: -1 if the pipeline negates what the network returns.
        part: Which part of the network's output is guided.
        kept: Axis, and the places along it that are guided, where others are given (frames of a
            picture that a video begins with, tokens of it); None: all.
        norm: What becomes of norms.
        alike: The branches were equal so far, so that nothing can be told of them.
        aside: Some call takes no part in the combination (it may write what another reads).
        upward: The scheduler is told a time for every token, and then counts its steps the other
            way round, so that it takes the negative of a prediction.
        reason: Why no other prediction can take the combination's place; empty: one can.
        residual: How much of the combination is not explained, relative to its norm, the worst
            sample's.
    """

    calls: tuple[int, ...]
    main: int | None = 0
    sign: int = 1
    part: Part = ""
    kept: tuple[int, tuple[int, ...]] | None = None
    norm: Norm = ""
    alike: bool = False
    aside: bool = False
    upward: bool = False
    reason: str = ""
    residual: float = 0.0

    @property
    def branches(self) -> int:
        """Number of branches of a step."""
        return sum(self.calls)


Part = Literal["", "behind", "tokens", "pixels", "pixels behind"]
"""Which part of a network's output is guided, and in which form its scheduler steps it: the
leading block; the block behind; pictures as tokens (channels last); tokens as pictures; both."""
PARTS: tuple[Part, ...] = get_args(Part)


def view(prediction: Tensor, like: Tensor, part: Part = "") -> Tensor | None:
    """The part of a network's output that a pipeline guides; None if there is none of that shape.

    Reference tokens and variance channels lie behind it, a frame that is given before it;
    dimensions of size 1 may be missing.

    Args:
        prediction: With shape (B, \\*).
        like: What its scheduler steps, with shape (B, \\*).
        part: Which part.
    """
    if prediction.shape == like.shape and part in ("", "behind"):
        return prediction
    if part == "tokens":
        tokens = prediction.flatten(2).transpose(1, 2)
        return tokens if tokens.shape == like.shape else None
    if part.startswith("pixels"):
        area = math.prod(like.shape[-2:])
        if prediction.ndim != 3 or like.ndim < 4 or prediction.shape[1] % area:
            return None
        pixels = prediction.transpose(1, 2)
        frames = (prediction.shape[1] // area,) if like.ndim == 5 else ()
        return view(
            pixels.unflatten(2, (*frames, *like.shape[-2:])),
            like,
            "behind" if part == "pixels behind" else "",
        )
    missing = prediction.ndim - like.ndim
    if missing == 1:
        sizes = prediction.shape
        for axis in range(1, prediction.ndim):
            rest = sizes[:axis] + sizes[axis + 1 :]
            if sizes[axis] == 1 and all(a >= b for a, b in zip(rest, like.shape, strict=True)):
                return view(prediction.squeeze(axis), like, part)
        return None
    if missing or any(a < b for a, b in zip(prediction.shape, like.shape, strict=True)):
        return None
    if part == "behind":
        pairs = zip(prediction.shape, like.shape, strict=True)
        return prediction[tuple(slice(size - kept, None) for size, kept in pairs)]
    return prediction[tuple(slice(size) for size in like.shape)]


def inside(tensor: Tensor, kept: tuple[int, tuple[int, ...]] | None) -> Tensor:
    """The places of a tensor that are guided; see `Pattern.kept`."""
    if kept is None:
        return tensor
    return tensor.index_select(kept[0], row_index(kept[1], tensor.device))


def branches_of(
    predictions: Sequence[Tensor], pattern: Pattern, stepped: Tensor
) -> list[Tensor] | None:
    """The prediction of every branch as far as it is guided, each with shape (B, \\*).

    Args:
        predictions: Of every call of the network.
        pattern: How they hold the branches.
        stepped: What reached the scheduler, with shape (B, \\*).

    Returns:
        Them, in the dtype of `stepped`; None if none of that shape is in `predictions`.
    """
    batch, found = stepped.shape[0], []
    for prediction, count in zip(predictions, pattern.calls, strict=True):
        for branch in prediction.split(batch) if count > 1 else (prediction,):
            seen = view(branch, stepped, pattern.part)
            if seen is None:
                return None
            seen = inside(seen, pattern.kept)
            found.append(seen if seen.dtype == stepped.dtype else seen.to(stepped.dtype))
    return found


def scale_of_normed(cond: Tensor, uncond: Tensor, mixed: Tensor, axis: int = -1) -> Tensor:
    """w of a combination whose vectors along `axis` were each rescaled by a factor of its own.

    A 0-d tensor.
    """
    difference = cond - uncond

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(axis)

    uu, ud, dd = dot(uncond, uncond), dot(uncond, difference), dot(difference, difference)
    um, dm = dot(uncond, mixed), dot(difference, mixed)
    # Of every vector: mixed = factor * uncond + product * difference, product = factor * w.
    factor, product = dd * um - ud * dm, uu * dm - ud * um
    return (product * factor).sum() / (factor * factor).sum()


def normed(guided: Tensor, cond: Tensor, norm: Norm) -> Tensor:
    """A guided prediction, with shape (B, \\*), with its norms as the pipeline has them."""
    if not norm:
        return guided
    axis = NORM_AXES[norm]
    lengths = [torch.linalg.vector_norm(t, dim=axis, keepdim=True) for t in (cond, guided)]
    ratio = lengths[0] / lengths[1]
    return guided * (ratio.clamp(max=1) if norm == "limit" else ratio)


def sample_of(tensor: Tensor) -> Tensor:
    """Some elements of a tensor, about `ENOUGH` of every sample, spread over all of it."""
    excess = tensor.numel() // (tensor.shape[0] * ENOUGH)
    if excess < 2:
        return tensor
    # Whole rows, which lie together: elements far apart take longer than all of them.
    return tensor[..., ::excess, :] if tensor.ndim > 2 else tensor[:, ::excess]


def scale_of(
    cond: Tensor,
    uncond: Tensor,
    mixed: Tensor,
    frames: int | None = None,
    guess: float | None = None,
) -> tuple[float | Tensor, Tensor | float]:
    """The guidance scale w that a pipeline really used, and what it does not explain.

    Args:
        cond, uncond: What the pipeline was given, each with shape (B, \\*).
        mixed: What it made of them, with shape (B, \\*).
        frames: Axis along which w varies.
        guess: What w may be: if the usual formula makes `mixed` of it to the last bit, it is.

    Returns:
        w, 1 where both predictions are equal: a number on the CPU, elsewhere a 0-d tensor on the
        device, or a tensor that varies along `frames`; and the norm of ``mixed - uncond - w * (cond
        - uncond)`` in units of rounding (of what every part of it has): more than a few is none.
    """
    eps = max(torch.finfo(t).eps for t in {cond.dtype, mixed.dtype})
    if frames is not None:
        c, u, m = (accumulate(t.detach()) for t in (cond, uncond, mixed))
        return _scale_by_frame(c, u, m, frames, eps)
    host = on_host(cond.device)
    c, u, m = sample_of(cond), sample_of(uncond), sample_of(mixed)
    if host and guess is not None and torch.equal(u + guess * (c - u), m):
        return guess, 0.0
    c, u, m = c.detach(), u.detach(), m.detach()
    if host and cond.dtype != torch.float64:
        return _scale_on_host(torch.stack([c, u, m]).double().flatten(1), eps)
    c, u, m = (accumulate(t) for t in (c, u, m))
    d, r = c - u, m - u
    square = (d * d).sum()
    w = ((r * d).sum() / square).where(square > 0, 1)
    left = torch.linalg.vector_norm(r - w * d)
    rounding = eps * (w.abs() + 1) * 2 * torch.linalg.vector_norm(c)
    return w, left / rounding.clamp(min=1e-30)


def _scale_on_host(rows: Tensor, eps: float) -> tuple[float, float]:
    """`scale_of` by the inner products of c, u and m, shape (3, n), which are exact in float64."""
    (cc, cu, cm), (_, uu, um), (_, _, mm) = (rows @ rows.T).tolist()
    square, product = cc - 2 * cu + uu, cm - um - cu + uu  # of d = c - u, with r = m - u
    w = product / square if square > 1e-14 * cc else 1.0
    left = max(mm - 2 * um + uu + w * (w * square - 2 * product), 0.0)
    rounding = eps * (abs(w) + 1) * (2 * cc**0.5 + 1e-300)
    return w, left**0.5 / rounding


def _scale_by_frame(
    cond: Tensor, uncond: Tensor, mixed: Tensor, frames: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`scale_of` with a scale for each frame."""
    axes = [axis for axis in range(mixed.ndim) if axis != frames]
    difference, rest = cond - uncond, mixed - uncond
    square = (difference * difference).sum(axes, keepdim=True)
    w = ((rest * difference).sum(axes, keepdim=True) / square).where(square > 0, 1)
    left = (rest - w * difference).norm()
    return w, left / (eps * (w.abs().max() + 1) * (cond.norm() + uncond.norm()))


def effective(
    cond: Tensor, others: Sequence[Tensor], mixed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The effective unconditional prediction of more than two branches.

    Args:
        cond: The conditional prediction, with shape (B, \*).
        others: The others, each with shape (B, \*).
        mixed: What the pipeline made of them, with shape (B, \*).

    Returns:
        :math:`\tilde u`, with shape (B, \*); w, a 0-d tensor on the device; and what is left over,
        as of `scale_of`: at w = 1, all that is added.
    """
    eps = max(torch.finfo(t.dtype).eps for t in (cond, mixed))
    wide = torch.float64 if mixed.device.type != "mps" else torch.float32
    samples = [sample_of(t.detach()).to(wide).flatten() for t in (cond, mixed, *others)]
    c, added = samples[0], samples[1] - samples[0]
    away = torch.stack([c - other for other in samples[2:]])
    gram = away @ away.T
    # Branches that are equal share a weight, all that are equal to c have none.
    gram.diagonal().add_(gram.trace() * 10 * torch.finfo(wide).eps + torch.finfo(wide).tiny)
    weights, _ = torch.linalg.solve_ex(gram, away @ added)
    w = 1 + weights.sum()
    none = (w - 1).abs() < 1e-3
    rest = added - (weights @ away).where(~none, 0)
    rounding = eps * (1 + 2 * weights.abs().sum()) * 2 * torch.linalg.vector_norm(c)
    left = torch.linalg.vector_norm(rest) / rounding.clamp(min=1e-30)
    w = w.to(accumulate(mixed).dtype)
    return cond - (mixed - cond) / (w - 1).where(~none, 1).to(cond.dtype), w, left


def weights_of(predictions: Sequence[Tensor], mixed: Tensor) -> Tensor:
    """The weights of some tensors in what a pipeline made of them, with shape (n,), on the device.

    Args:
        predictions: n of them, each with shape (B, \\*).
        mixed: What the pipeline made of them, with shape (B, \\*).
    """
    wide = torch.float64 if mixed.device.type != "mps" else torch.float32
    every = torch.stack([sample_of(p.detach()).to(wide).flatten() for p in predictions])
    gram, seen = every @ every.T, every @ sample_of(mixed.detach()).to(wide).flatten()
    weights, _ = torch.linalg.solve_ex(gram, seen)
    return weights.to(accumulate(mixed).dtype)
