"""Guidance written as text: names joined by a plus, each with changed settings in brackets.

    apg                                         a name
    apg+ag                                      a rule and a policy
    apg(eta=0.5, space=native)+ag(threshold=0.99)

Values are numbers, True, False, None, inf, words, lists in brackets, ``(both, both, cond)``, or a
fill with its settings, ``hold(space=x0)``.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from .base import Fill
from .registry import TYPES, part_name


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The names in a text, lower case, each with its settings.

    Raises:
        ValueError: a bracket is not closed, or what is in it is not as above.
    """
    found = []
    for part in _parts(text):
        name, bracket, rest = part.partition("(")
        settings: dict[str, Any] = {}
        if bracket:
            try:
                call = ast.parse(f"f({rest.strip()}", mode="eval").body
                if not isinstance(call, ast.Call) or call.args:
                    raise ValueError("not settings")
                settings = {word.arg or "**": _value(word.value) for word in call.keywords}
            except (SyntaxError, ValueError, TypeError) as error:
                raise ValueError(
                    f"{part.strip()!r} is not a name with settings, such as "
                    "'apg(eta=0.5, space=native)'"
                ) from error
        found.append((name.strip().lower(), settings))
    return found


def written(name: str, settings: Mapping[str, Any]) -> str:
    """Inverse of `parse`, for one name."""
    if not settings:
        return name
    return f"{name}({', '.join(f'{key}={_written(value)}' for key, value in settings.items())})"


def _parts(text: str) -> list[str]:
    """The text cut at every plus outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "+" and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(node: ast.expr) -> Any:
    """A setting; ValueError for what is none."""
    if isinstance(node, ast.Name):
        return math.inf if node.id == "inf" else node.id
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        known = TYPES["fill"]
        if node.func.id not in known:
            raise ValueError(f"no fill {node.func.id!r}")
        return known[node.func.id](
            **{word.arg or "**": _value(word.value) for word in node.keywords}
        )
    return ast.literal_eval(node)


def _written(value: Any) -> str:
    if isinstance(value, Fill):
        own = {field.name: getattr(value, field.name) for field in fields(cast(Any, value))}
        _, name = part_name(value)
        return f"{name}({', '.join(f'{key}={_written(item)}' for key, item in own.items())})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_written, value))}{',' * (len(value) == 1)})"
    if isinstance(value, str):
        return value if value.isidentifier() and value != "inf" else repr(value)
    return repr(value)
