"""One call of a denoiser: its arguments by name, restricted to some rows of the batch."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.device import row_index

# Inputs that hold no samples, whatever the size of their first dimension: by their whole names,
# and by parts of them.
SHARED_INPUTS = {
    "chunk_partition",
    "img_ids",
    "ip_adapter_masks",
    "num_frames",
    "scale_factor",
    "sparse_params",
    "spatio_temporal_guidance_blocks",
    "txt_ids",
}
SHARED_PARTS = ("rotary", "rope_pos", "freqs_cis")
# Inputs with samples along their second dimension.
LAYERS_FIRST = {"encoder_hidden_states_llama3"}
# Lists of plain values, one for each sample.
SAMPLES = {"fps", "img_shapes", "shape_list", "txt_seq_lens"}


class RowsError(RuntimeError):
    """A network did not give back as many rows as it was asked for."""


class Call:
    """A call ``network(*args, **kwargs)`` of a denoiser.

    Attributes:
        first: The network's first input, what it denoises.
        listed: Samples come as items of lists, not as rows of tensors.
        rows: Number of rows, of one or more branches.
    """

    def __init__(self, network: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        self.network, self.args, self.kwargs = network, args, kwargs
        self.first = args[0] if args else self[self.names[0]]
        self.listed = isinstance(self.first, (list, tuple))
        self.rows = len(self.first) if self.listed else self.first.shape[0]

    @property
    def names(self) -> list[str]:
        """Names of the inputs of the network's forward, in order."""
        return _parameter_names(self.network)

    def __getitem__(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[self.names.index(name)]

    @property
    def timestep(self) -> Tensor:
        """The timestep as the pipeline passes it (its second argument, or the one so named)."""
        for name in ("timestep", "t", "timesteps"):
            if name in self.kwargs:
                return self.kwargs[name]
        names = self.names
        return self["timestep" if "timestep" in names else names[1]]

    def __call__(self, keep: list[int] | None = None) -> Any:
        """Call the network, on the rows `keep` of every per-sample input (None: on all).

        What is per sample is told by an input's name and kind: tensors by their first dimension
        (or a multiple of it, where a network is given its text once a frame), lists of tensors
        likewise, other lists by their own length; what lies deeper in lists is never cut. A mapping
        from rows to places tells how many items of a list belong to each of them.

        Raises:
            RowsError: other rows came back than were asked for.
        """
        if keep is None:
            return self.network(*self.args, **self.kwargs)
        select = _Selection(keep, self.rows, self.listed)
        for value in self.kwargs.values():
            if is_by_row(value):
                select.owners = [row for row, places in value.items() for _ in places]
        named = zip(self.names, self.args, strict=False)
        args = [select(value, name) for name, value in named]
        kwargs = {name: select(value, name) for name, value in self.kwargs.items()}
        output = self.network(*args, **kwargs)
        found = len(output if isinstance(output, Tensor) else output[0])
        if found != len(keep):
            raise RowsError(f"{found} rows came back where {len(keep)} of {self.rows} were asked")
        return output


class _Selection:
    """Picks rows of the inputs of one call."""

    def __init__(self, keep: list[int], rows: int, listed: bool) -> None:
        self.keep, self.rows, self.listed = keep, rows, listed
        first, last = keep[0], keep[-1] + 1
        together = keep == list(range(first, last))
        self.slice = slice(first, last) if together else None
        self.indices: dict[tuple[torch.device, int], Tensor] = {}  # one for all inputs of a call
        self.owners: list[int] = []  # rows that the items of a list belong to

    def __call__(self, value: Any, name: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if is_shared(name):
            return value
        if isinstance(value, Tensor):
            if name in LAYERS_FIRST:
                return self._of_tensor(value.transpose(0, 1)).transpose(0, 1)
            return self._of_tensor(value)
        if is_by_row(value):
            return {new: value[row] for new, row in enumerate(self.keep) if row in value}
        if isinstance(value, dict):
            return {key: self(item, key) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            whole = len(value) == self.rows
            if not any(isinstance(item, Tensor) for item in value):
                if not whole or isinstance(value, tuple):  # a tuple holds sizes or factors
                    return value
                if not self.listed and name not in SAMPLES:
                    raise RowsError(f"whether the list {name!r} has an item a sample is not known")
                return [value[row] for row in self.keep]
            if self.owners and len(value) == len(self.owners):
                owned = list(zip(value, self.owners, strict=True))
                return [item for row in self.keep for item, owner in owned if owner == row]
            if self.listed and whole:
                return type(value)(value[row] for row in self.keep)
            return type(value)(
                self._of_tensor(item) if isinstance(item, Tensor) else item for item in value
            )
        return value

    def _of_tensor(self, value: Tensor) -> Tensor:
        if value.ndim == 0 or len(value) < self.rows or len(value) % self.rows:
            return value
        each = len(value) // self.rows
        if each > 1 and value.ndim < 3:  # a table or a list of tokens, not text once a frame
            return value
        if self.slice is not None:
            return value[self.slice.start * each : self.slice.stop * each]
        key = value.device, each
        if key not in self.indices:
            rows = [row * each + i for row in self.keep for i in range(each)]
            self.indices[key] = row_index(rows, value.device)
        return value.index_select(0, self.indices[key])


def is_by_row(value: Any) -> bool:
    """Whether something is a mapping from rows to lists, of places in their text for instance."""
    if not (isinstance(value, Mapping) and value):
        return False
    return all(isinstance(k, int) and isinstance(v, (list, tuple)) for k, v in value.items())


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


@functools.cache
def is_shared(name: Any) -> bool:
    """Whether an input of that name holds no samples."""
    return name in SHARED_INPUTS or any(part in str(name) for part in SHARED_PARTS)


# A forward -> names of its parameters, asked for at every call of a network.
_NAMES: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()


def _named(forward: Any) -> list[str]:
    if forward is None:
        return []
    function = getattr(forward, "__func__", forward)  # a method is a new object every time
    names = _NAMES.get(function)
    if names is None:
        parameters = inspect.signature(inspect.unwrap(forward)).parameters.values()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [p.name for p in parameters if p.name != "self" and p.kind not in variadic]
        _NAMES[function] = names
    return names


def prediction_of(output: Any) -> Tensor:
    """The prediction within what a denoiser returned (tensor, tuple or output object)."""
    value = output if isinstance(output, Tensor) else output[0]
    return torch.stack(tuple(value)) if isinstance(value, (list, tuple)) else value


def with_rows(outputs: list[Any], make: Callable[[list[Tensor]], Tensor], rows: list[int]) -> Any:
    """An output like the first of `outputs`, its tensors made from theirs by `make`.

    Args:
        outputs: Outputs of one network; of each, every tensor with as many rows as `rows` says
            (or list of so many tensors) takes part, anything else is the first one's.
        make: Tensors at the same place of all `outputs` -> the new tensor.
        rows: Number of rows of each.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        whole = all(o.ndim and len(o) == n for o, n in zip(outputs, rows, strict=True))
        return make(outputs) if whole else first
    if isinstance(first, Mapping):  # an output object of diffusers
        names = [name for name, value in first.items() if value is not None]
        return type(first)(
            **{name: with_rows([o[name] for o in outputs], make, rows) for name in names}
        )
    if isinstance(first, (list, tuple)):
        listed = first and all(isinstance(item, Tensor) and item.ndim for item in first)
        if listed and [len(o) for o in outputs] == rows and isinstance(first, list):
            return list(make([torch.stack(o) for o in outputs]).unbind())
        parts = [with_rows(list(items), make, rows) for items in zip(*outputs, strict=True)]
        return type(first)(parts)
    return first
