r"""Linear and Conv2d layers whose weight is stored as int8, one scale per output channel.

.. math::
    s_o = \max_i |w_{oi}| / 127, \qquad q_{oi} = \mathrm{round}(w_{oi} / s_o), \qquad
    |y_o - \hat y_o| \le \tfrac{s_o}{2} \sum_i |x_i|

A weight becomes floating point for one call of its own layer, in the dtype of the activations, and
is dropped. The backward pass to the input keeps the int8 weight and makes it floating point anew;
the weight itself has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

LEVELS = 127


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, \\*) as int8 with float32 scales (out,); ValueError if it is not finite."""
    flat = weight.detach().float()
    if not flat.isfinite().all():
        raise ValueError("cannot quantize a weight with NaN or infinite entries")
    largest = flat.flatten(1).abs().amax(1)
    # An all-zero channel keeps the smallest scale: its weights stay exactly zero.
    scale = (largest / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (flat / _per_row(scale, flat)).round_().clamp_(-LEVELS, LEVELS)
    return rounded.to(torch.int8), scale


def _per_row(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (like.ndim - 1))


def _unpacked(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int8 weight times the power of two in its scale, and the rest of the scale in [0.5, 1).

    The product is exact in float16, bfloat16 and float32, and sums stay in float16's range.
    """
    rest = torch.frexp(scale).mantissa
    powers = (scale / rest).to(dtype)
    return weight.to(dtype).mul_(_per_row(powers, weight)), rest.to(dtype)


class _Frozen(torch.autograd.Function):
    """A layer that is linear in its input; saves nothing but the int8 weight and its scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Layer) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        ctx.save_for_backward(layer.weight, layer.scale)
        return layer.apply_weight(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, scale = ctx.saved_tensors
        weight, rest = _unpacked(weight, scale, grad.dtype)
        grad = grad * ctx.layer.on_outputs(rest)
        return ctx.layer.transposed(ctx.shape, weight, grad).to(ctx.dtype), None


class Int8Layer(nn.Module):
    """A frozen layer with an int8 `weight`, a float32 `scale` (out,) and a bias or None."""

    settings: ClassVar[tuple[str, ...]]
    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        for name in self.settings:
            setattr(self, name, getattr(layer, name))
        weight, scale = quantize_weight(layer.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        # A parameter, because pipelines ask the first parameter of some layers for its dtype.
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.train(layer.training)

    def apply_weight(self, x: Tensor) -> Tensor:
        """The layer's output for x, bias included."""
        weight, rest = _unpacked(self.weight, self.scale, x.dtype)
        out = self.product(x, weight)
        out.mul_(self.on_outputs(rest))
        return out if self.bias is None else out.add_(self.on_outputs(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Like the layer it replaces, in the dtype of `x`."""
        x = self.padded(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Frozen.apply(x, self)
        return self.apply_weight(x)

    def padded(self, x: Tensor) -> Tensor:
        """The input after padding that the convolution itself does not do."""
        return x

    def on_outputs(self, vector: Tensor) -> Tensor:
        """A vector (out,) in the shape that multiplies outputs."""
        return vector

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer without scale and bias."""
        raise NotImplementedError

    def transposed(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        """The transpose of `product`: a gradient of shape `shape` of the input."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Layer:
        """Moves, but never casts the scale: `.to(torch.bfloat16)` would cost it 16 bits."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Shape of the weight and the settings."""
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in self.settings)
        return f"{shown}, bias={self.bias is not None}, weight=int8"


class Int8Linear(Int8Layer):
    """`torch.nn.Linear` with an int8 weight."""

    settings = ("in_features", "out_features")

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Int8Layer`."""
        return F.linear(x, weight)

    def transposed(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        """See `Int8Layer`."""
        return grad @ weight


class Int8Conv2d(Int8Layer):
    """`torch.nn.Conv2d` with an int8 weight."""

    settings = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("groups", "padding_mode"),
    )

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.outside = self.mode != "constant" or layer.padding == "same"
        self.border = list(layer._reversed_padding_repeated_twice)
        inside = (0, 0) if self.outside or isinstance(layer.padding, str) else layer.padding
        self.geometry = (layer.stride, inside, layer.dilation, layer.groups)

    def padded(self, x: Tensor) -> Tensor:
        """Padding with something else than zeros, or on unequal sides."""
        return F.pad(x, self.border, mode=self.mode) if self.outside else x

    def on_outputs(self, vector: Tensor) -> Tensor:
        """See `Int8Layer`."""
        return vector[:, None, None]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Int8Layer`."""
        return F.conv2d(x, weight, None, *self.geometry)

    def transposed(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        """See `Int8Layer`."""
        return conv2d_input(shape, weight, grad, *self.geometry)


INT8_LAYERS: dict[type[nn.Module], type[Int8Layer]] = {
    nn.Linear: Int8Linear,
    nn.Conv2d: Int8Conv2d,
}
