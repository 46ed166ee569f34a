"""One call of a denoiser: its arguments by name, restricted to some rows of the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.device import row_index

# Inputs that hold no samples, whatever the size of their first dimension.
SHARED_INPUTS = {"image_rotary_emb", "img_ids", "txt_ids", "ip_adapter_masks", "return_dict"}


class Call:
    """A call ``network(*args, **kwargs)`` of a denoiser.

    If `listed`, samples come as items of lists, not as rows of tensors.
    """

    def __init__(
        self, network: Callable, args: tuple, kwargs: dict[str, Any], listed: bool = False
    ) -> None:
        self.network, self.args, self.kwargs, self.listed = network, args, kwargs, listed
        self.names = _parameter_names(network)

    def __getitem__(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[self.names.index(name)]

    @property
    def sample(self) -> Tensor:
        """The network's input (its first argument), with shape (rows, \\*)."""
        value = self[self.names[0]]
        return torch.stack(value) if self.listed else value

    @property
    def timestep(self) -> Tensor:
        """The timestep as the pipeline passes it (its second argument, or the one so named)."""
        return self["timestep" if "timestep" in self.names else self.names[1]]

    @property
    def rows(self) -> int:
        """Number of rows, of one or both branches."""
        return len(self[self.names[0]])

    def __call__(self, keep: list[int] | None = None) -> Any:
        """Call the network, on the rows `keep` of every per-sample input (None: on all)."""
        if keep is None:
            return self.network(*self.args, **self.kwargs)
        rows, listed = self.rows, self.listed
        indices: dict[torch.device, Tensor] = {}  # one for all inputs of the call

        def select(value: Any, name: str = "") -> Any:
            if name in SHARED_INPUTS:
                return value
            if isinstance(value, Tensor):
                if value.ndim == 0 or value.shape[0] != rows:
                    return value
                if value.device not in indices:
                    indices[value.device] = row_index(keep, value.device)
                return value.index_select(0, indices[value.device])
            if isinstance(value, dict):
                return {key: select(item, key) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                tensors = any(isinstance(item, Tensor) for item in value)
                if len(value) == rows and (listed or not tensors):
                    return type(value)(value[row] for row in keep)
                return type(value)(select(item) for item in value)
            return value

        args = [select(value, name) for name, value in zip(self.names, self.args, strict=False)]
        kwargs = {name: select(value, name) for name, value in self.kwargs.items()}
        return self.network(*args, **kwargs)


def _parameter_names(network: Any) -> list[str]:
    """Names of the forward's parameters, also behind torch.compile, PEFT and other wrappers.

    A forward that takes anything (``*args, **kwargs``) passes it on to what it replaced, that of
    its class, or to the only module inside.
    """
    while True:
        own = getattr(network, "forward", network)
        if names := _named(own) or _named(getattr(type(network), "forward", None)):
            return names
        inner = list(network.children()) if isinstance(network, nn.Module) else []
        if len(inner) != 1:
            raise TypeError(f"the forward of {type(network).__name__} names none of its inputs")
        network = inner[0]


def _named(forward: Any) -> list[str]:
    if forward is None:
        return []
    parameters = inspect.signature(inspect.unwrap(forward)).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.name != "self" and p.kind not in variadic]


def prediction_of(output: Any, listed: bool = False) -> Tensor:
    """The prediction within what a denoiser returned (tensor, tuple or output object)."""
    value = output if isinstance(output, Tensor) else output[0]
    return torch.stack(tuple(value)) if listed else value


def with_prediction(output: Any, prediction: Tensor, listed: bool = False) -> Any:
    """The same kind of output with another prediction."""
    value = list(prediction.unbind()) if listed else prediction
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple):
        return (value, *output[1:])
    return type(output)(**{**output, next(iter(output)): value})
