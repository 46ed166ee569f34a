r"""Linear and Conv2d layers whose weight is stored as int8, one scale per output channel.

.. math::
    s_o = \max_i |w_{oi}| / 127, \qquad q_{oi} = \mathrm{round}(w_{oi} / s_o), \qquad
    |y_o - \hat y_o| \le \tfrac{s_o}{2} \sum_i |x_i|

A weight becomes floating point for one call of its own layer, in the dtype of the activations, and
is dropped. The backward pass to the input keeps the int8 weight and makes it floating point anew;
the weight itself has no gradient.

To everything else such a layer is the layer it replaces: `weight` is the floating-point one, made
when it is asked for, and so are the tensors of a state dict. What is saved loads without Pilotage,
and a state dict of a stock network can be loaded. Scales are rounded up to 17 bits, so in float32
:math:`s_o q_{oi}` is exact, and saving and loading change no bit.
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
IN_PLACE = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
ORDER = "do so before quantize() (of LoRA: load_lora_weights, fuse_lora, then quantize)"


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, \\*) as int8 with float32 scales (out,); ValueError if it is not finite."""
    flat = weight.detach().float()
    if not flat.isfinite().all():
        raise ValueError("cannot quantize a weight with NaN or infinite entries")
    largest = flat.flatten(1).abs().amax(1)
    # An all-zero channel keeps the smallest scale: its weights stay exactly zero.
    scale = _rounded_up((largest / LEVELS).clamp(min=torch.finfo(torch.float32).tiny))
    rounded = (flat / _per_row(scale, flat)).round_().clamp_(-LEVELS, LEVELS)
    return rounded.to(torch.int8), scale


def _rounded_up(scale: Tensor) -> Tensor:
    """The next numbers of 17 bits: their products with seven bits are float32 numbers."""
    mantissa, exponent = torch.frexp(scale.double())
    return torch.ldexp((mantissa * 2**17).ceil() / 2**17, exponent).float()


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
        ctx.save_for_backward(layer.integers, layer.scale)
        return layer.apply_weight(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, scale = ctx.saved_tensors
        weight, rest = _unpacked(weight, scale, grad.dtype)
        grad = grad * ctx.layer.on_outputs(rest)
        return ctx.layer.input_gradient(ctx.shape, weight, grad).to(ctx.dtype), None


class Dequantized(Tensor):
    """A weight made for a reader: changing it would change nothing, so that is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func` on plain tensors; ValueError where it would write into the weight."""
        name = getattr(func, "__name__", "")
        written = [(kwargs or {}).get("out")]
        if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            written.append(args[0])
        if any(isinstance(tensor, cls) for tensor in written):
            raise ValueError(f"an int8 weight cannot be changed in place; {ORDER}")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


class Int8Layer(nn.Module):
    """A frozen layer with int8 `integers`, a float32 `scale` (out,) and a bias or None."""

    settings: ClassVar[tuple[str, ...]]
    plain: ClassVar[type[nn.Module]]
    integers: Tensor
    scale: Tensor
    bias: Any  # a parameter or None

    def __new__(cls, layer: Any = None, *args: Any, **options: Any) -> Any:
        """As usual; of sizes a plain layer, as peft makes adapters of the type of their layer."""
        if layer is None or isinstance(layer, nn.Module):
            return super().__new__(cls)
        return cls.plain(layer, *args, **options)

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        nn.Module.__init__(self)  # not that of the plain layer, which would make a weight
        for name in self.settings:
            setattr(self, name, getattr(layer, name))
        integers, scale = quantize_weight(layer.weight)
        self.dtype = layer.weight.dtype  # of `weight`
        self.register_buffer("integers", integers, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        # A parameter, because pipelines ask the first parameter of some layers for its dtype.
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight in the dtype of the network, for reading."""
        return self.dequantized().as_subclass(Dequantized)

    def dequantized(self) -> Tensor:
        """The weight as a new tensor in the dtype of the network."""
        return (self.integers * _per_row(self.scale, self.integers)).to(self.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.dequantized()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "weight"
        if key not in state_dict:
            missing_keys.append(key)
            return
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        weight = state_dict[key]
        if weight.shape != self.integers.shape or not weight.is_floating_point():
            error_msgs.append(
                f"{key}: expected floating-point numbers of shape {tuple(self.integers.shape)}, "
                f"got {weight.dtype}, {tuple(weight.shape)}"
            )
            return
        integers, scale = quantize_weight(weight)
        self.integers.copy_(integers)
        self.scale.copy_(scale)

    def apply_weight(self, x: Tensor) -> Tensor:
        """The layer's output for x, bias included."""
        weight, rest = _unpacked(self.integers, self.scale, x.dtype)
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

    def input_gradient(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        """The transpose of `product`: a gradient of shape `shape` of the input."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Layer:
        """Moves, but never casts the scale: `.to(torch.bfloat16)` would cost it 16 bits."""
        scale = self.scale
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Shape of the weight and the settings."""
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in self.settings)
        return f"{shown}, bias={self.bias is not None}, weight=int8"


class Int8Linear(Int8Layer, nn.Linear):  # type: ignore[override]
    """`torch.nn.Linear` with an int8 weight."""

    plain = nn.Linear
    settings = ("in_features", "out_features")

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Int8Layer`."""
        return F.linear(x, weight)

    def input_gradient(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        """See `Int8Layer`."""
        return grad @ weight


class Int8Conv2d(Int8Layer, nn.Conv2d):  # type: ignore[override]
    """`torch.nn.Conv2d` with an int8 weight."""

    plain = nn.Conv2d
    settings = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("groups", "padding_mode"),
    )

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.transposed, self.output_padding = layer.transposed, layer.output_padding
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

    def input_gradient(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        """See `Int8Layer`."""
        return conv2d_input(shape, weight, grad, *self.geometry)


INT8_LAYERS: dict[type[nn.Module], type[Int8Layer]] = {
    nn.Linear: Int8Linear,
    nn.Conv2d: Int8Conv2d,
}
