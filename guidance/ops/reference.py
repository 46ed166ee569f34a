"""The guidance step in eager PyTorch, on any device; it defines what the fused one computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..prediction import accumulate, per_sample
from . import formulas
from .inputs import GuideStep, Request
from .scalars import Number, at_least, at_most, sqrt, where
from .solver import network_step


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
    results = measured(r, views, c, b, u, moving) if r.measures else {}
    if r.writes:
        prediction = combined(r, views, c, b, u)
        if moving is not None:
            prediction = prediction.where(per_sample(moving, prediction), 0)
        if r.want_prediction:
            results["prediction"] = _as(prediction, r.pred_cond)
        if r.solver is not None:
            results |= _advanced(r, prediction)
    return GuideStep(state=state, **results)


class _Views:
    """The tensors of a step and their inner products, each computed at most once."""

    def __init__(self, r: Request) -> None:
        self.r = r
        p, q = accumulate(r.pred_cond), accumulate(r.pred_uncond)
        update = p - q
        if r.in_x0:
            update.mul_(r.a_p)
        if r.momentum != 0 and r.state is not None:
            update.add_(r.state, alpha=r.momentum)
        self.update, self.on_host = update, _sums_on_host(r, update)
        self.tensors = {"p": p, "q": q, "m": update}
        self.names = {"c": "x", "u": "y"} if r.in_x0 else {"c": "p", "u": "q"}
        self.flats: dict[str, Tensor] = {}
        self.products: dict[tuple[str, str], Number] = {}

    def __getitem__(self, name: str) -> Tensor:
        """m; the two predictions in the rule's space (c, u), as images (x, y), raw (p, q)."""
        name = self.names.get(name, name)
        if name not in self.tensors:
            raw = self.tensors["p" if name == "x" else "q"]
            self.tensors[name] = _add(raw * self.r.a_p, accumulate(self.r.x_t), self.r.a_x)
        return self.tensors[name]

    def flatten(self, tensor: Tensor) -> Tensor:
        """With shape (B, n); (n,) where the sums are numbers."""
        return tensor.flatten() if self.on_host else tensor.flatten(1)

    def flat(self, name: str) -> Tensor:
        """A tensor by its name, flattened."""
        if name not in self.flats:
            self.flats[name] = self.flatten(self[name])
        return self.flats[name]

    def dot(self, names: str) -> Number:
        """Inner product of two tensors by their names."""
        a, b = names
        key = self.names.get(a, a), self.names.get(b, b)
        if key not in self.products:
            self.products[key] = self.inner(self.flat(key[0]), self.flat(key[1]))
        return self.products[key]

    def inner(self, a: Tensor, b: Tensor) -> Number:
        """Inner product of flattened tensors: of shape (B,), or a float of the only sample."""
        return torch.dot(a, b).item() if self.on_host else torch.linalg.vecdot(a, b)

    def deviation(self, flat: Tensor) -> Number:
        """sqrt(n) times the standard deviation of a flattened tensor."""
        centred = flat - flat.mean(-1, keepdim=True)
        return sqrt(self.inner(centred, centred))


def _sums_on_host(r: Request, update: Tensor) -> bool:
    """Whether sums are floats: of one sample on the CPU, where nothing waits for them.

    That saves the fixed cost of a dozen operations on tensors of one element. Not where gradients,
    transforms, modes or graphs look at the operations. Few checks, as they are paid at every step:
    what holds for an operand shows in `update`.
    """
    return not (
        torch.compiler.is_compiling()
        or not update.is_cpu
        or update.shape[0] != 1
        or type(update) is not Tensor
        or update.requires_grad
        or (r.x_t is not None and r.x_t.requires_grad)
        or isinstance(r.guidance_scale, Tensor)
        or isinstance(r.a_x, Tensor)
        or isinstance(r.a_p, Tensor)
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
    )


def coefficients(r: Request, views: _Views) -> tuple[Number, Number, Number]:
    """(c, b, u) of `formulas`."""
    scale, (first, second, _) = r.guidance_scale - 1, r.settings
    if not r.needs_sums:
        return 0.0, scale, 0.0
    match r.kind:
        case "apg":
            mm = views.dot("mm") if second > 0 else None
            return *formulas.apg(scale, r.settings, mm, views.dot("mc"), views.dot("cc")), 0.0
        case "rescale":
            guided = views.flatten(_add(views.update * scale, views["c"], 1.0))
            norm = sqrt(views.inner(guided, guided))
            spreads = views.deviation(views.flat("c")), views.deviation(guided)
            eps = torch.finfo(guided.dtype).eps
            return *formulas.rescale(scale, first, *spreads, norm, eps), 0.0
        case "cfg-zero*" if second:
            c, u = formulas.zero_star(scale, views.dot("cu"), views.dot("uu"))
            return c, 0.0, u
        case "tcfg":
            total = views.flatten(views["c"] + views["u"])
            excess = -views.inner(views.flat("m"), total)
            return *formulas.tcfg(scale, views.dot("cu"), excess), 0.0
        case "magnitude":
            b = formulas.magnitude_aware(scale, first, views.dot("mm"), views.dot("uu"))
            return 0.0, b, 0.0
    return 0.0, scale, 0.0


def measured(
    r: Request, views: _Views, c: Number, b: Number, u: Number, moving: Tensor | None
) -> dict[str, Tensor]:
    """The scalars asked for, each with shape (B,); samples not `moving` get a zero prediction."""
    values: dict[str, Number] = {}
    if r.gamma_space is not None:
        a, z = "xy" if r.gamma_space == "x0" else "pq"
        aa, zz, az = views.dot(a + a), views.dot(z + z), views.dot(a + z)
        length = sqrt(aa) * sqrt(zz)
        equal = where(aa == zz, 1.0, 0.0)
        values["gamma"] = where(length > 0, az / where(length > 0, length, 1.0), equal)
    if r.want_norms:
        mm, mc, cc = views.dot("mm"), views.dot("mc"), views.dot("cc")
        values["cond_norm"] = sqrt(cc)
        square = c * c * cc + b * b * mm + 2 * c * b * mc
        if r.kind == "cfg-zero*":
            square = square + u * u * views.dot("uu") + 2 * c * u * views.dot("cu")
            square = where(moving.item() if views.on_host else moving, square, cc)
        values["update_norm"] = sqrt(at_least(square, 0.0))
        lengths = sqrt(mm) * sqrt(cc)
        cosine = mc / where(lengths > 0, lengths, 1.0)
        values["parallel_share"] = at_most(cosine * cosine, 1.0)
    like = views.update
    values = {
        name: value if isinstance(value, Tensor) else like.new_tensor([value])
        for name, value in values.items()
    }
    if r.want_finite:
        finite = torch.isfinite(views["p"]) & torch.isfinite(views["q"])
        values["finite"] = finite.flatten(1).all(1).float()
    return values


def combined(r: Request, views: _Views, c: Number, b: Number, u: Number) -> Tensor:
    """The guided prediction in the network's own space."""
    cond = views["p"]
    if r.in_x0:
        inverse = r.inverse()
        c, b = c * inverse, b * inverse
    total = _sum(cond, views.update, _shaped(b, cond))
    for name, weight in (("c", c), ("u", u)):
        if isinstance(weight, Tensor) or weight != 0:
            total = _add(total, views[name], _shaped(weight, cond))
    return total


def _advanced(r: Request, prediction: Tensor) -> dict[str, Tensor | None]:
    """What the solver step gives."""
    x_next, denoised = network_step(
        r.x_t, prediction, r.previous, r.solver, want_denoised=r.want_denoised, impl="reference"
    )
    next_input = None
    if r.copies:
        next_input = (x_next * r.solver.input_scale).to(r.pred_cond.dtype)
        next_input = torch.cat([next_input] * r.copies)
    return {"x_next": x_next.to(r.x_t.dtype), "denoised": denoised, "next_input": next_input}


def _add(total: Tensor, tensor: Tensor, weight: Number) -> Tensor:
    """total + weight * tensor, in place; total is never an argument of the step."""
    if isinstance(weight, Tensor):
        return total.addcmul_(tensor, _as(weight, total))
    return total.add_(tensor, alpha=weight)


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _sum(first: Tensor, tensor: Tensor, weight: Number) -> Tensor:
    """first + weight * tensor."""
    if isinstance(weight, Tensor):
        return torch.addcmul(first, tensor, _as(weight, first))
    return torch.add(first, tensor, alpha=weight)


def _shaped(weight: Number, like: Tensor) -> Number:
    return per_sample(weight, like) if isinstance(weight, Tensor) and weight.ndim else weight
