r"""How a pipeline guides, learned from one of its steps.

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

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ...guidance.prediction import accumulate

Norm = Literal["", "match", "limit"]
"""What becomes of the norm of every token (last dimension) of the combination: nothing; it is made
that of the conditional prediction; it is made that at most."""

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
        norm: What becomes of the norms of tokens.
        alike: The branches were equal so far, so that nothing can be told of them.
        aside: Some call takes no part in the combination (it may write what another reads).
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
        return prediction[
            tuple(
                slice(len_ - n, None) for len_, n in zip(prediction.shape, like.shape, strict=True)
            )
        ]
    return prediction[tuple(slice(size) for size in like.shape)]


def learn(
    predictions: Sequence[Tensor],
    mixed: Tensor,
    calls: tuple[int, ...],
    main: int | None = None,
    frames: int | None = None,
    sample: Tensor | None = None,
) -> Pattern | None:
    """The pattern of a step whose branches were all evaluated.

    Args:
        predictions: Of every branch, with shape (B, \\*), as far as they are guided.
        mixed: What reached the scheduler, with shape (B, \\*).
        calls: See `Pattern`.
        main: The conditional branch, if that is known.
        frames: Axis along which the guidance scale varies, if it does.
        sample: What the scheduler steps, with shape (B, \\*), if a multiple of it is added.

    Returns:
        The pattern; None if it cannot be said: the branches are too much alike, or the pipeline
        stepped one of them as it is.
    """
    eps = max(torch.finfo(t.dtype).eps for t in (*predictions, mixed))
    wide = torch.float64 if mixed.device.type != "mps" else torch.float32
    parts = [*predictions] if sample is None else [*predictions, sample]
    if frames is not None:  # every frame has weights of its own: one of them tells
        parts = [p.select(frames, -1) for p in parts]
        mixed = mixed.select(frames, -1)
    flat = torch.stack([p.detach().to(wide).flatten(1) for p in parts])  # (n, B, N)
    target = mixed.detach().to(wide).flatten(1)
    every = flat.flatten(1)
    gram, seen = (every @ every.T).cpu(), (every @ target.flatten()).cpu()
    lengths = gram.diagonal().sqrt()
    if not (torch.isfinite(gram).all() and torch.isfinite(seen).all() and (lengths > 0).all()):
        return None  # the run itself says what is wrong with such predictions
    unit = gram / lengths / lengths[:, None]
    if torch.linalg.eigvalsh(unit)[0] < (8 * eps) ** 2 + 1e-14:
        return None
    weights = torch.linalg.solve(gram, seen)
    rest = (target - torch.einsum("k,kbn->bn", weights.to(target), flat)).norm(dim=1).cpu()
    allowed = 4 * eps * (weights.abs() @ flat.norm(dim=2).cpu())
    length = target.norm(dim=1).cpu()
    residual = float((rest / length.where(length > 0, 1)).max())
    exact = bool((rest <= allowed).all())
    weights = weights[: len(predictions)]
    sum_, listed = float(weights.sum()), weights.tolist()
    sign = -1 if sum_ < 0 else 1
    if main is None:
        main = _main([weight / sum_ for weight in listed]) if exact or residual < 0.5 else None
    ends = list(itertools.accumulate(calls))
    shares = [listed[end - n : end] for end, n in zip(ends, calls, strict=True)]
    taking = [n for n, own in zip(calls, shares, strict=True) if max(map(abs, own)) > 1e-3]
    if exact and len(taking) < len(calls) and sum(taking) < 2:
        return None
    found = Pattern(calls, main, sign, aside=len(taking) < len(calls), residual=residual)
    if exact and (sample is not None or abs(sign * sum_ - 1) <= max(1e-3, 2 * eps)):
        return found
    if exact:
        return replace(
            found,
            reason="it changes its combination afterwards: the weights of its branches are "
            f"{', '.join(f'{w:.3g}' for w in listed)}, which sum to {sum_:.2g}",
        )
    return replace(
        found,
        reason="what it hands its scheduler is no sum of what its network returned (a share of "
        f"{residual:.2g} is left over)",
    )


def _main(shares: Sequence[float]) -> int | None:
    """The branch that the others are guided away from: the only one with a positive share."""
    positive = [k for k, share in enumerate(shares) if share > 1e-3]
    return positive[0] if len(positive) == 1 else None


def learn_norm(
    predictions: Sequence[Tensor], mixed: Tensor, calls: tuple[int, ...], main: int | None
) -> Pattern | None:
    """The pattern of two branches where the norms of tokens are changed afterwards, if they are.

    Arguments as of `learn`.
    """
    eps = max(torch.finfo(t.dtype).eps for t in (*predictions, mixed))
    norms: tuple[Norm, ...] = ("match", "limit")
    for norm in norms:
        for sign in (1, -1):
            for which in (0, 1) if main is None else (main,):
                pair = predictions[which], predictions[1 - which]
                left, w = norm_residual(*pair, sign * mixed, norm)
                if w > 1 and left <= 64 * eps * w:
                    return Pattern(calls, which, sign, norm=norm, residual=left)
    return None


def learn_kept(
    predictions: Sequence[Tensor],
    mixed: Tensor,
    calls: tuple[int, ...],
    axis: int,
    sample: Tensor,
    preconditioned: bool,
) -> Pattern | None:
    """The pattern of a step in which only some places along an axis are guided, if it is so.

    What is given elsewhere owes nothing to the network.

    Args:
        predictions, mixed, calls: See `learn`.
        axis: That of the places.
        sample: What the scheduler steps, with shape (B, \\*).
        preconditioned: Whether a multiple of it is added to the predictions.
    """
    eps = max(torch.finfo(t.dtype).eps for t in (*predictions, mixed))
    count = len(predictions)

    def places(tensor: Tensor) -> Tensor:
        return tensor.detach().double().movedim(axis, 0).flatten(1)

    flat = torch.stack([places(t) for t in (*predictions, sample)], 1)  # (places, count + 1, N)
    target = places(mixed)
    size = flat.norm(dim=2).mean(0)  # of a place, on average

    def weigh(flat: Tensor) -> Tensor:
        return torch.linalg.solve_ex(flat @ flat.mT, (flat @ target[..., None])[..., 0])[0]

    fitted = flat if preconditioned else flat[:, :count]
    weights = weigh(fitted)
    rest = (target - torch.einsum("pk,pkn->pn", weights, fitted)).norm(dim=1)
    allowed = 4 * eps * (weights.abs() * size[: fitted.shape[1]]).sum(1)
    sums = weights[:, :count].sum(1).abs()
    exact = (rest <= allowed) & (sums > 0 if preconditioned else (sums - 1).abs() <= 1e-3)
    if not exact.any() or exact.all():
        return None
    kept = exact.nonzero().flatten()
    *chosen, stepped, target_kept = (
        t.index_select(axis, kept) for t in (*predictions, sample, mixed)
    )
    found = learn(chosen, target_kept, calls, sample=stepped if preconditioned else None)
    if found is None or found.reason or found.main is None:
        return None
    # What is given in part only follows the network's output in part.
    follows = weigh(flat)[:, found.main].abs()
    if bool((follows[~exact] > 0.25 * follows[exact].mean()).any()):
        return replace(found, reason="some of its frames are guided in part only")
    return replace(found, kept=(axis, tuple(kept.tolist())))


def norm_residual(cond: Tensor, uncond: Tensor, mixed: Tensor, norm: Norm) -> tuple[float, float]:
    """What is left of a combination whose tokens' norms were changed, and its scale w."""
    cond, uncond, mixed = (t.detach().double() for t in (cond, uncond, mixed))
    w = float(scale_of_normed(cond, uncond, mixed))
    if not math.isfinite(w):
        return math.inf, w
    # A factor that is not the norms' shows as what is left over.
    own = normed(uncond + w * (cond - uncond), cond, norm)
    return float((own - mixed).norm() / mixed.norm()), w


def scale_of_normed(cond: Tensor, uncond: Tensor, mixed: Tensor) -> Tensor:
    """w of a combination whose tokens were each rescaled by a factor of its own, a 0-d tensor."""
    difference = cond - uncond

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1)

    uu, ud, dd = dot(uncond, uncond), dot(uncond, difference), dot(difference, difference)
    um, dm = dot(uncond, mixed), dot(difference, mixed)
    # Of every token: mixed = factor * uncond + product * difference, product = factor * w.
    factor, product = dd * um - ud * dm, uu * dm - ud * um
    return (product * factor).sum() / (factor * factor).sum()


def normed(guided: Tensor, cond: Tensor, norm: Norm) -> Tensor:
    """A guided prediction, with shape (B, \\*), with its tokens' norms as the pipeline has them."""
    if not norm:
        return guided
    lengths = [torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (cond, guided)]
    ratio = lengths[0] / lengths[1]
    return guided * (ratio if norm == "match" else ratio.clamp(max=1))


def sample_of(tensor: Tensor) -> Tensor:
    """Some elements of a tensor, at most about `ENOUGH` of every sample, spread over all of it."""
    excess = tensor[0].numel() // ENOUGH
    if excess < 2:
        return tensor
    stride = math.isqrt(excess)
    if tensor.ndim > 2 and tensor.shape[-2] >= 2 * stride:
        return tensor[..., ::stride, ::stride]
    return tensor[..., ::excess] if tensor.shape[-1] >= 2 * excess else tensor[:, ::excess]


def scale_of(
    cond: Tensor, uncond: Tensor, mixed: Tensor, frames: int | None = None
) -> tuple[float | Tensor, Tensor | float]:
    """The guidance scale w that a pipeline really used, and what it does not explain.

    Args:
        cond, uncond: What the pipeline was given, each with shape (B, \\*).
        mixed: What it made of them, with shape (B, \\*).
        frames: Axis along which w varies.

    Returns:
        w, 1 where both predictions are equal: a number on the CPU, elsewhere a 0-d tensor on the
        device, or a tensor that varies along `frames`; and the norm of ``mixed - uncond - w * (cond
        - uncond)`` in units of rounding (of what every part of it has): more than a few is none.
    """
    eps = max(torch.finfo(t.dtype).eps for t in (cond, mixed))
    parts = (sample_of(t.detach()) for t in (cond, uncond, mixed))
    if frames is not None:
        cond, uncond, mixed = (accumulate(t.detach()) for t in (cond, uncond, mixed))
        axes = [axis for axis in range(mixed.ndim) if axis != frames]
        difference, rest = cond - uncond, mixed - uncond
        square = (difference * difference).sum(axes, keepdim=True)
        w = ((rest * difference).sum(axes, keepdim=True) / square).where(square > 0, 1)
        left = (rest - w * difference).norm()
        return w, left / (eps * (w.abs().max() + 1) * (cond.norm() + uncond.norm()))
    if cond.device.type == "cpu" and cond.dtype != torch.bfloat16:
        c, u, m = (t.numpy() for t in parts)
        d, r = (c - u).ravel().astype(float), (m - u).ravel().astype(float)
        square = float(d @ d)
        w = float(r @ d) / square if square else 1.0
        r -= w * d
        rounding = eps * (abs(w) + 1) * (2 * float(c.ravel() @ c.ravel()) ** 0.5 + 1e-300)
        return w, float(r @ r) ** 0.5 / rounding
    c, u, m = (accumulate(t) for t in parts)
    d, r = c - u, m - u
    square = (d * d).sum()
    w = ((r * d).sum() / square).where(square > 0, 1)
    left = torch.linalg.vector_norm(r - w * d)
    rounding = eps * (w.abs() + 1) * 2 * torch.linalg.vector_norm(c)
    return w, left / rounding.clamp(min=1e-30)


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
