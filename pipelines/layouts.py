"""Where a pipeline keeps its branches: one layout per way of calling the denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .seam import Seam

# Inputs whose first dimension is never the batch, whatever its size.
SHARED_INPUTS = {"image_rotary_emb", "img_ids", "txt_ids", "cross_attention_kwargs", "return_dict"}


class LayoutError(RuntimeError):
    """A pipeline calls its denoiser in a way its layout does not describe."""


class Call:
    """One call of a denoiser, its arguments by name.

    Args:
        network: The denoiser.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """

    def __init__(self, network: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        self.network, self.args, self.kwargs = network, args, kwargs
        self.names = _parameter_names(network)

    def __getitem__(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[self.names.index(name)]

    @property
    def sample(self) -> Tensor:
        """The network's input, the first argument of its forward."""
        return self[self.names[0]]

    @property
    def timestep(self) -> Tensor:
        """The timestep as the pipeline passes it."""
        return self["timestep"]

    def __call__(self, keep: list[int] | None = None) -> Any:
        """Call the network, on the rows `keep` of every per-sample input (None: on all)."""
        if keep is None:
            return self.network(*self.args, **self.kwargs)
        batch = self.sample.shape[0]
        index = torch.tensor(keep, device=self.sample.device)
        args = [
            _gather(value, batch, index, name)
            for name, value in zip(self.names, self.args, strict=False)
        ]
        kwargs = {name: _gather(value, batch, index, name) for name, value in self.kwargs.items()}
        return self.network(*args, **kwargs)


def _parameter_names(network: Any) -> list[str]:
    """Names of the forward's parameters, also behind torch.compile and wrappers."""
    network = getattr(network, "_orig_mod", network)
    forward = inspect.unwrap(getattr(network, "forward", network))
    return [name for name in inspect.signature(forward).parameters if name != "self"]


def _gather(value: Any, batch: int, index: Tensor, name: str = "") -> Any:
    """Rows `index` of every tensor in `value` whose first dimension is the batch."""
    if name in SHARED_INPUTS:
        return value
    if isinstance(value, Tensor):
        per_sample = value.ndim > 0 and value.shape[0] == batch
        return value.index_select(0, index.to(value.device)) if per_sample else value
    if isinstance(value, dict):
        return {key: _gather(item, batch, index, key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_gather(item, batch, index) for item in value)
    return value


def output_tensor(output: Any) -> Tensor:
    """The prediction within what a denoiser returned (tensor, tuple or output object)."""
    if isinstance(output, Tensor):
        return output
    return output[0]


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """The same kind of output with another prediction."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    return type(output)(**{**output, next(iter(output)): tensor})


@dataclass(frozen=True)
class Batched:
    """Both branches in one batch: [uncond, cond], or [cond, uncond] if `cond_first`."""

    cond_first: bool = False

    def batch_of(self, call: Call) -> int:
        """Number of samples in a call.

        Raises:
            LayoutError: the batch does not hold every latent twice.
        """
        rows = call.sample.shape[0]
        first, second = call.sample.chunk(2) if rows % 2 == 0 else (call.sample, None)
        if second is None or not torch.equal(first, second):
            raise LayoutError(
                f"expected every latent twice in one batch (unconditional and conditional), "
                f"got an input of shape {tuple(call.sample.shape)} that is not so"
            )
        return rows // 2

    def run(self, seam: Seam, call: Call) -> Any:
        """Evaluate what the policy wants and return what the pipeline expects."""
        batch = call.sample.shape[0] // 2
        cond_start, uncond_start = (0, batch) if self.cond_first else (batch, 0)
        level = seam.noise_level(call.timestep)
        rows = seam.plan(level)
        uncond_rows = [uncond_start + row for row in rows]
        cond_rows = list(range(cond_start, cond_start + batch))
        every = len(rows) == batch
        order = cond_rows + uncond_rows if self.cond_first else uncond_rows + cond_rows
        output = call(None if every else order)
        prediction = output_tensor(output)
        if self.cond_first:
            cond, uncond = prediction[:batch], prediction[batch:]
        else:
            uncond, cond = prediction[: len(rows)], prediction[len(rows) :]
        x_t = call.sample[cond_start : cond_start + batch]
        pair = seam.combine(rows, cond, uncond if rows else None, x_t, level)
        if every and pair[0] is cond and pair[1] is uncond:
            return output
        halves = pair if self.cond_first else pair[::-1]
        return with_tensor(output, torch.cat(halves))


UNCOND_COND = Batched()

# Pipeline class -> layout. A family is added here, never by copying its loop.
LAYOUTS: dict[str, Batched] = {
    "StableDiffusionPipeline": UNCOND_COND,
    "StableDiffusionImg2ImgPipeline": UNCOND_COND,
    "StableDiffusionInpaintPipeline": UNCOND_COND,
    "StableDiffusionControlNetPipeline": UNCOND_COND,
    "StableDiffusionXLPipeline": UNCOND_COND,
    "StableDiffusionXLImg2ImgPipeline": UNCOND_COND,
    "StableDiffusionXLInpaintPipeline": UNCOND_COND,
    "StableDiffusionXLControlNetPipeline": UNCOND_COND,
}


def layout_of(pipeline_class: type) -> Batched:
    """The layout of a pipeline class, or of the closest base that has one.

    Raises:
        LayoutError: none is known; the message lists the families that are.
    """
    for base in pipeline_class.__mro__:
        if base.__name__ in LAYOUTS:
            return LAYOUTS[base.__name__]
    raise LayoutError(
        f"{pipeline_class.__name__} is not a pipeline whose guidance branches are known; "
        f"known are: {', '.join(sorted(LAYOUTS))}"
    )
