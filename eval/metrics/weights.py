"""Published weights, brought to one safetensors file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@contextmanager
def weights_of(name: str, file: str | Path, made_by: str) -> Iterator[dict[str, Tensor]]:
    """The weights in a file, by name, to be taken inside the ``with``.

    Args:
        name: Of the metric, for errors.
        file: The safetensors file.
        made_by: The command that makes it, for errors.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no safetensors file, or a weight was missing or did not fit.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no {name} weights at {file}; to make the file: {made_by}")
    try:
        yield load_file(file)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{file} does not hold the weights of {name} as safetensors ({error}); to make the "
            f"file: {made_by}"
        ) from error
