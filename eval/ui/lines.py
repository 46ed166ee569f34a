"""The same picture by a command or in Python: lines to copy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any


def command(name: str, argument: str, options: Mapping[str, Any]) -> str:
    """A command line of ``pilotage``.

    Args:
        name: Of the command.
        argument: Its argument.
        options: Option -> value, or values of one that is repeated; None leaves it out.
    """
    words = ["pilotage", name, *([] if argument.startswith("-") else [argument])]
    for option, given in options.items():
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is not None:
                words += [option, number(value) if isinstance(value, float) else str(value)]
    words += ["--", argument] if argument.startswith("-") else []
    return shlex.join(words)


def python(
    arguments: Mapping[str, Any], seed: int, loading: Sequence[str | None], words: Sequence[str]
) -> str:
    """Lines of Python that make a picture.

    Args:
        arguments: Of the pipeline's call.
        seed: Of the picture.
        loading: Arguments of `load_on`: device; folder or hub name; precision.
        words: Files of learned words.
    """
    lines = ["import torch", "from pilotage.eval.embedded import load_on"]
    if words:
        lines.append("from pilotage.pipelines import add_token")
    lines += ["", f"pipe = load_on({', '.join(map(repr, loading))})"]
    lines += [f"add_token(pipe, {file!r})" for file in words]
    lines += ["image = pipe("]
    lines += [f"    {name}={value!r}," for name, value in arguments.items()]
    lines += [f"    generator=[torch.Generator().manual_seed({seed})],", ").images[0]"]
    return "\n".join([*lines, 'image.save("picture.png")'])


def number(value: float) -> str:
    """A number as short as it can be without another value."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
