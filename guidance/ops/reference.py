"""The guidance step in eager PyTorch, on any device; it defines what the fused one computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prediction import accumulate, per_sample
from . import formulas
from .inputs import GuideStep, Request
from .solver import network_step

Weight = float | Tensor


def guide_step(r: Request) -> GuideStep:
    """See `pilotage.guidance.ops.guide_step`."""
    views = _Views(r)
    c, b, u = coefficients(r, views)
    state, moving = (views.update if r.momentum != 0 else None), None
    if r.kind == "cfg-zero*":
        steps = r.state
        if steps is None:
            steps = torch.zeros(len(r.pred_cond), 1, dtype=torch.int32, device=r.pred_cond.device)
        state, moving = steps + 1, steps[:, 0] >= r.settings[0]
        if r.want_norms:
            c, b, u = (_expanded(value, moving).where(moving, 0) for value in (c, b, u))
            c = c.where(moving, -1)
    result = GuideStep(state=state, **measured(r, views, c, b, u))
    if not r.writes:
        return result
    prediction = combined(r, views, c, b, u)
    if moving is not None:
        prediction = prediction.where(per_sample(moving, prediction), 0)
    if r.want_prediction:
        result = result._replace(prediction=_as(prediction, r.pred_cond))
    return result if r.solver is None else _advanced(r, prediction, result)


class _Views:
    """The tensors of a step and their inner products, each computed at most once."""

    def __init__(self, r: Request) -> None:
        self.r = r
        self.tensors = {"p": accumulate(r.pred_cond), "q": accumulate(r.pred_uncond)}
        update = self.tensors["p"] - self.tensors["q"]
        if r.in_x0:
            update.mul_(r.a_p)
        if r.momentum != 0 and r.state is not None:
            update.add_(r.state, alpha=r.momentum)
        self.tensors["m"] = self.update = update
        self.names = {"c": "x", "u": "y"} if r.in_x0 else {"c": "p", "u": "q"}
        self.flats: dict[str, Tensor] = {}
        self.products: dict[tuple[str, str], Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """m; the two predictions in the rule's space (c, u), as images (x, y), raw (p, q)."""
        if name in "cu":
            name = self.names[name]
        if name not in self.tensors:
            raw = self["p" if name == "x" else "q"]
            self.tensors[name] = _add(raw * self.r.a_p, accumulate(self.r.x_t), self.r.a_x)
        return self.tensors[name]

    def flat(self, name: str) -> Tensor:
        """The same with shape (B, n)."""
        if name not in self.flats:
            self.flats[name] = self[name].flatten(1)
        return self.flats[name]

    def dot(self, names: str) -> Tensor:
        """Inner product of two tensors by their names, with shape (B,)."""
        a, b = (self.names.get(name, name) for name in names)
        if (a, b) not in self.products:
            self.products[a, b] = torch.linalg.vecdot(self.flat(a), self.flat(b))
        return self.products[a, b]


def coefficients(r: Request, views: _Views) -> tuple[Weight, Weight, Weight]:
    """(c, b, u) of `formulas`, of shape (B,) or numbers."""
    scale, (first, second, _) = r.guidance_scale - 1, r.settings
    if not r.needs_sums:
        return 0.0, scale, 0.0
    match r.kind:
        case "apg":
            mm = views.dot("mm") if second > 0 else None
            return *formulas.apg(scale, r.settings, mm, views.dot("mc"), views.dot("cc")), 0.0
        case "rescale":
            guided = _add(views.update * scale, views["c"], 1.0).flatten(1)
            norm = torch.linalg.vecdot(guided, guided).sqrt()
            spreads = _deviation(views["c"].flatten(1)), _deviation(guided)
            return *formulas.rescale(scale, first, *spreads, norm), 0.0
        case "cfg-zero*" if second:
            c, u = formulas.zero_star(scale, views.dot("cu"), views.dot("uu"))
            return c, 0.0, u
        case "tcfg":
            excess = -torch.linalg.vecdot(
                views.update.flatten(1), (views["c"] + views["u"]).flatten(1)
            )
            return *formulas.tcfg(scale, views.dot("cu"), excess), 0.0
        case "magnitude":
            b = formulas.magnitude_aware(scale, first, views.dot("mm"), views.dot("uu"))
            return 0.0, b, 0.0
    return 0.0, scale, 0.0


def measured(r: Request, views: _Views, c: Weight, b: Weight, u: Weight) -> dict[str, Tensor]:
    """The scalars asked for, each with shape (B,)."""
    values = {}
    if r.gamma_space is not None:
        a, z = "xy" if r.gamma_space == "x0" else "pq"
        aa, zz, az = views.dot(a + a), views.dot(z + z), views.dot(a + z)
        length = aa.sqrt() * zz.sqrt()
        equal = (aa == zz).to(az)
        values["gamma"] = torch.where(length > 0, az / length.where(length > 0, 1), equal)
    if r.want_norms:
        mm, mc, cc = views.dot("mm"), views.dot("mc"), views.dot("cc")
        values["cond_norm"] = cc.sqrt()
        square = c * c * cc + b * b * mm + 2 * c * b * mc
        if r.kind == "cfg-zero*":
            square = square + u * u * views.dot("uu") + 2 * c * u * views.dot("cu")
        values["update_norm"] = square.clamp(min=0).sqrt()
        lengths = mm.sqrt() * cc.sqrt()
        cosine = (mc / lengths.where(lengths > 0, 1)).clamp(-1, 1)
        values["parallel_share"] = cosine * cosine
    if r.want_finite:
        finite = torch.isfinite(views["p"]) & torch.isfinite(views["q"])
        values["finite"] = finite.flatten(1).all(1).float()
    return values


def combined(r: Request, views: _Views, c: Weight, b: Weight, u: Weight) -> Tensor:
    """The guided prediction in the network's own space."""
    cond = views["p"]
    if not r.in_x0:
        total = _sum(cond, views.update, _shaped(b, cond))
        if isinstance(c, Tensor) or c != 0:
            total = _add(total, cond, _shaped(c, cond))
        return _add(total, views["q"], _shaped(u, cond)) if isinstance(u, Tensor) else total
    inverse = r.inverse()
    total = _sum(cond, views.update, _shaped(b * inverse, cond))
    return _add(total, views["c"], _shaped(c * inverse, cond)) if isinstance(c, Tensor) else total


def _advanced(r: Request, prediction: Tensor, result: GuideStep) -> GuideStep:
    """With the solver step taken."""
    x_next, denoised = network_step(
        r.x_t, prediction, r.previous, r.solver, want_denoised=r.want_denoised, impl="reference"
    )
    next_input = None
    if r.copies:
        next_input = (x_next * r.solver.input_scale).to(r.pred_cond.dtype)
        next_input = torch.cat([next_input] * r.copies)
    return result._replace(x_next=x_next.to(r.x_t.dtype), denoised=denoised, next_input=next_input)


def _add(total: Tensor, tensor: Tensor, weight: Weight) -> Tensor:
    """total + weight * tensor, in place; total is never an argument of the step."""
    if isinstance(weight, Tensor):
        return total.addcmul_(tensor, _as(weight, total))
    return total.add_(tensor, alpha=weight)


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _sum(first: Tensor, tensor: Tensor, weight: Weight) -> Tensor:
    """first + weight * tensor."""
    if isinstance(weight, Tensor):
        return torch.addcmul(first, tensor, _as(weight, first))
    return torch.add(first, tensor, alpha=weight)


def _deviation(flat: Tensor) -> Tensor:
    """sqrt(n) times the standard deviation, with shape (B,)."""
    centred = flat - flat.mean(1, keepdim=True)
    return torch.linalg.vecdot(centred, centred).sqrt()


def _shaped(weight: Weight, like: Tensor) -> Weight:
    return per_sample(weight, like) if isinstance(weight, Tensor) and weight.ndim else weight


def _expanded(value: Weight, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full(like.shape, value, device=like.device)
