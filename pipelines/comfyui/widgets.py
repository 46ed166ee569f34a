"""Rules and policies as ComfyUI nodes show them: one input for every setting.

The inputs are made from the arguments of the dataclass, or of the function, that a method is
registered with; their explanations from its docstring.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ...guidance import Policy, Rule, available
from ...guidance.registry import NAMES

Kind = Literal["rule", "policy"]
Widget = tuple[Any, dict[str, Any]]

NONE = "none"


def methods(kind: Kind) -> dict[str, Callable[..., Any]]:
    """Name -> what makes the rule or policy of that name, for all whose settings inputs can hold.

    Fitted settings come from files. Other names of the same method are left out.
    """
    return {name: maker for name in available() if (maker := _maker(name, kind)) is not None}


def widgets(make: Callable[..., Any]) -> dict[str, Widget]:
    """Setting -> type and options of its input, as ComfyUI's ``INPUT_TYPES`` lists them.

    Settings that may be None or infinite are text: a number, "none" or "inf".
    """
    texts = _explanations(make)
    return {
        name: _widget(parameter.annotation, parameter.default, texts.get(name, ""))
        for name, parameter in _settings(make).items()
    }


def make(maker: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """The rule or policy with the values of its inputs.

    Raises:
        ValueError: a value does not fit; for text, the message says what is expected.
    """
    settings = _settings(maker)
    return maker(**{n: _value(n, settings[n].annotation, value) for n, value in values.items()})


def _maker(name: str, kind: Kind) -> Callable[..., Any] | None:
    maker = NAMES[name]
    if isinstance(maker, type):
        fits = issubclass(maker, Rule if kind == "rule" else Policy)
    else:
        named = isinstance(maker, functools.partial) or maker.__name__ == "<lambda>"
        fits = kind == "policy" and not named
    if not fits:
        return None
    try:
        widgets(maker)
    except TypeError:  # a setting that no input can hold
        return None
    return maker


def _settings(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make, eval_str=True).parameters


def _widget(hint: Any, default: Any, text: str) -> Widget:
    options: dict[str, Any] = {"tooltip": text} if text else {}
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    if choices:
        return list(choices), options | {"default": default}
    if hint is bool:
        return "BOOLEAN", options | {"default": default}
    number = _number(hint)
    if number is None:
        raise TypeError(f"no input of ComfyUI holds {hint}")
    if number is not hint or not math.isfinite(default):
        return "STRING", options | {"default": NONE if default is None else f"{default:g}"}
    if number is int:
        return "INT", options | {"default": default, "min": -(2**31), "max": 2**31}
    limits = {"min": -1e6, "max": 1e6, "step": 0.001, "round": False}
    return "FLOAT", options | limits | {"default": default}


def _number(hint: Any) -> type | None:
    """float or int, of a hint that also allows None."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float) else None


def _value(name: str, hint: Any, value: Any) -> Any:
    number = _number(hint)
    if not isinstance(value, str) or number is None:
        return value
    if value.strip().lower() == NONE and number is not hint:
        return None
    try:
        return number(value)
    except ValueError as error:
        allowed = "" if number is hint else f", or {NONE}"
        kind = "a whole number" if number is int else "a number"
        raise ValueError(f"{name}: expected {kind}{allowed}, got {value!r}") from error


def _explanations(make: Callable[..., Any]) -> dict[str, str]:
    """Argument -> what the docstring says of it."""
    _, _, after = (inspect.getdoc(make) or "").partition("Args:\n")
    section = re.split(r"\n(?=\S)", after)[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", section):
        names, colon, text = entry.strip().partition(":")
        if colon:
            plain = re.sub(r"`+", "", " ".join(text.split()))
            found |= {name.strip(): plain for name in names.split(",")}
    return found
