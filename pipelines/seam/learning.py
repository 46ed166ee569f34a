r"""Learning the pattern of a pipeline's steps from one of them; see `patterns`.

A fit holds only if, sample by sample, nothing but rounding is left over, and the weights sum to
:math:`\pm 1`: where a pipeline rescales each sample by a factor of its own, nothing is left over at
batch 1, and the sum alone tells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .layouts import Layout
from .patterns import NORM_AXES, PARTS, Norm, Pattern, branches_of, normed, scale_of_normed, view

FLOAT32 = torch.finfo(torch.float32).eps


def learn(
    predictions: Sequence[Tensor],
    stepped: Tensor,
    calls: tuple[int, ...],
    layout: Layout,
    sample: Tensor,
    network_input: Tensor | None,
) -> Pattern | None:
    """The pattern of a step whose branches were all evaluated.

    Args:
        predictions: Of every call of the network.
        stepped: What reached the scheduler as far as it may be guided, with shape (B, \\*).
        calls: How many branches every call holds.
        layout: What is known of the pipeline beforehand.
        sample: What the scheduler steps, likewise, scaled as for the network.
        network_input: What the network was given; None: a list.

    Returns:
        The pattern, with a reason if it is none of the known ones; None if this step does not tell.
    """
    if sum(calls) == 1:
        return Pattern(calls)
    first, alike = None, False
    added = sample if layout.preconditioned else None
    for part in PARTS:
        branches = branches_of(predictions, Pattern(calls, part=part), stepped)
        if branches is None:
            continue
        found = learn_sum(branches, stepped, calls, layout.main, layout.frames, added)
        if found is None:
            alike = True
            continue
        if found.reason and len(branches) == 2:
            found = learn_norm(branches, stepped, calls, layout.main) or found
        if found.reason and layout.given is not None:
            kept = learn_kept(branches, stepped, calls, layout.given, sample, layout.preconditioned)
            found = kept or found
        found = replace(found, part=part)
        if not found.reason:
            if layout.last is not None:
                place = stepped.shape[layout.last] - 1
                return replace(found, kept=(layout.last, (place,)))
            return found if found.kept else _without_unseen(found, layout, sample, network_input)
        first = first or found
    if alike:
        return None
    if first is None:
        shapes = tuple(predictions[0].shape), tuple(stepped.shape)
        reason = f"it makes {shapes[1]} of what its network returned as {shapes[0]}"
        return Pattern(calls, layout.main, reason=reason)
    return first


def _without_unseen(
    pattern: Pattern, layout: Layout, sample: Tensor, network_input: Tensor | None
) -> Pattern:
    """A pattern without places at which the network was given something else than is stepped.

    What it predicts there is thrown away (the first frame of image to video).
    """
    axis = layout.given
    if axis is None or network_input is None:
        return pattern
    seen = view(network_input[: len(sample)], sample)
    if seen is None:
        return pattern
    different = (seen - sample).abs() > 1e-4 * sample.abs().amax()
    same = ~different.movedim(axis, 0).flatten(1).any(1)
    if same.all() or not same.any():
        return pattern
    return replace(pattern, kept=(axis, tuple(same.nonzero().flatten().tolist())))


def by_token(pattern: Pattern, times: Tensor) -> Pattern:
    """A pattern of a step whose scheduler is told a time for every token.

    Args:
        pattern: As learned of all tokens.
        times: Of every token, with shape (B, N); 0: it is given.
    """
    free, given = (times == times.amax()).all(0), (times == 0).all(0)
    kept = None if free.all() else (1, tuple(free.nonzero().flatten().tolist()))
    in_part = "" if (free | given).all() else "some of its tokens are guided in part only"
    return replace(pattern, kept=kept, upward=True, reason=pattern.reason or in_part)


def learn_sum(
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
    target, count = mixed.detach().to(wide).flatten(1), len(predictions)
    fit = _weights(flat, target, count, eps)
    if fit is None:
        return None
    weights, spread = fit
    if bool((spread > 0.05 * (1 + weights.abs().max())).any()):
        return None
    rest = (target - torch.einsum("k,kbn->bn", weights.to(target), flat)).norm(dim=1).cpu()
    # Four operations lose less than that.
    allowed = max(eps, 4 * FLOAT32) * (weights.abs() @ flat.norm(dim=2).cpu())
    length = target.norm(dim=1).cpu()
    residual = float((rest / length.where(length > 0, 1)).max())
    exact = bool((rest <= allowed).all())
    weights = weights[:count]
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


def _weights(flat: Tensor, target: Tensor, count: int, eps: float) -> tuple[Tensor, Tensor] | None:
    """Least squares, and how far rounding may have led it astray; each with shape (n,), on the CPU.

    The unknowns are the weights of the differences from the first branch: near as branches may be
    to each other, these are exact, whatever the precision of the network.

    Args:
        flat: The branches and what else is added, with shape (n, B, N).
        target: What the pipeline made of them, with shape (B, N).
        count: Number of branches.
        eps: Precision of what they were made in.

    Returns:
        None if branches are equal, or no number.
    """
    change = torch.eye(len(flat), dtype=torch.float64)
    change[1:count, 0] = -1
    basis = torch.cat([flat[:1], flat[1:count] - flat[0], flat[count:]]).flatten(1)
    gram, seen = (basis @ basis.T).cpu().double(), (basis @ target.flatten()).cpu().double()
    lengths = gram.diagonal().sqrt()
    if not (torch.isfinite(gram).all() and torch.isfinite(seen).all()):
        return None  # the run itself says what is wrong with such predictions
    if not (lengths > 8 * FLOAT32 * lengths.max()).all():
        return None
    unit = gram / lengths / lengths[:, None]
    if torch.linalg.eigvalsh(unit)[0] < 1e-12:
        return None
    inverse = torch.linalg.inv(unit) / lengths / lengths[:, None]
    noise = eps * float(target.norm()) / math.sqrt(target.numel())
    return change.T @ (inverse @ seen), noise * inverse.diagonal().sqrt()


def _main(shares: Sequence[float]) -> int | None:
    """The branch that the others are guided away from: the only one with a positive share."""
    positive = [k for k, share in enumerate(shares) if share > 1e-3]
    return positive[0] if len(positive) == 1 else None


def learn_norm(
    predictions: Sequence[Tensor], mixed: Tensor, calls: tuple[int, ...], main: int | None
) -> Pattern | None:
    """The pattern of two branches where norms are changed afterwards, if they are.

    Arguments as of `learn_sum`.
    """
    eps = max(torch.finfo(t.dtype).eps for t in (*predictions, mixed))
    norms = [norm for norm, axis in NORM_AXES.items() if axis < mixed.ndim - 1]
    for norm in norms:
        for sign in (1, -1):
            for which in (0, 1) if main is None else (main,):
                pair = predictions[which], predictions[1 - which]
                left, w = norm_residual(*pair, sign * mixed, norm)
                if w > 1 and left <= max(eps, 64 * FLOAT32) * w:
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
        predictions, mixed, calls: See `learn_sum`.
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
    found = learn_sum(chosen, target_kept, calls, sample=stepped if preconditioned else None)
    if found is None or found.reason or found.main is None:
        return None
    # What is given in part only follows the network's output in part.
    follows = weigh(flat)[:, found.main].abs()
    if bool((follows[~exact] > 0.25 * follows[exact].mean()).any()):
        return replace(found, reason="some of its frames are guided in part only")
    return replace(found, kept=(axis, tuple(kept.tolist())))


def norm_residual(cond: Tensor, uncond: Tensor, mixed: Tensor, norm: Norm) -> tuple[float, float]:
    """What is left of a combination whose norms were changed, and its scale w."""
    cond, uncond, mixed = (t.detach().double() for t in (cond, uncond, mixed))
    w = float(scale_of_normed(cond, uncond, mixed, NORM_AXES[norm]))
    if not math.isfinite(w):
        return math.inf, w
    # A factor that is not the norms' shows as what is left over.
    own = normed(uncond + w * (cond - uncond), cond, norm)
    return float((own - mixed).norm() / mixed.norm()), w
