"""Names: what ``guidance="..."``, saved files, the command line and reports know.

Built-in methods come in by the same door as one's own:

    @register
    @dataclass(frozen=True)
    class Mine(Rule):
        name: ClassVar[str] = "mine"
        strength: float = 1.0

        def combine(self, predictions, step, w, state): ...
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, cast

from .base import Fill, Policy, Rule

Part = Rule | Policy | Fill

KINDS: dict[str, type] = {"rule": Rule, "policy": Policy, "fill": Fill}
"""What settings are made of."""

TYPES: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}
"""Kind -> name -> class, for saved settings."""

NAMES: dict[str, Callable[[], Any]] = {}
"""Name -> what makes the rule or policy that ``guidance=`` takes it for."""

_NAME = re.compile(r"[a-z0-9][a-z0-9.*_-]*")


def register(thing: Any, *, name: str | None = None) -> Any:
    """Make a rule, policy or fill known by its name; also as a decorator.

    Args:
        thing: A frozen dataclass derived from `Rule`, `Policy` or `Fill`, known by its ``name``;
            or, with `name`, a function without required arguments that makes a configured rule or
            policy (settings with a name).
        name: Name of such a function.

    Returns:
        `thing` itself.

    Raises:
        TypeError: it is none of these, or settings of it could not be saved.
        ValueError: a name is taken, or has other characters than a-z, 0-9 and ``. * _ -``.
    """
    if isinstance(thing, type):
        if name is not None:
            raise TypeError(f"{thing.__name__} is known by its attribute `name`, not by name=")
        _register_class(thing)
    elif callable(thing) and name is not None:
        _check_free(_checked(name), thing)
        NAMES[name] = thing
    else:
        raise TypeError(f"register takes a class, or a function with name=..., got {thing!r}")
    return thing


def _register_class(thing: type) -> None:
    kind = next((kind for kind, base in KINDS.items() if issubclass(thing, base)), None)
    params = getattr(thing, "__dataclass_params__", None)
    if kind is None or params is None or not params.frozen:
        raise TypeError(
            f"{thing.__name__} cannot be registered: expected a frozen dataclass derived from "
            "Rule, Policy or Fill"
        )
    settings = fields(cast(Any, thing))
    if "name" not in vars(thing) or any(field.name == "name" for field in settings):
        raise TypeError(f"{thing.__name__} has no name of its own: name: ClassVar[str] = ...")
    required = [f.name for f in settings if f.default is f.default_factory is MISSING]
    if kind != "fill" and required:
        raise TypeError(f"{thing.__name__}: give {', '.join(required)} a default, for its name")
    name = _checked(vars(thing)["name"])
    known = TYPES[kind].get(name)
    if known is not None and _place(known) != _place(thing):
        raise ValueError(f"the {kind} {name!r} is {known.__module__}.{known.__name__} already")
    if kind != "fill":
        _check_free(name, thing)
        NAMES[name] = thing
    TYPES[kind][name] = thing


def part_name(part: Part) -> tuple[str, str]:
    """(kind, name) under which a part's class is registered.

    Raises:
        ValueError: it is not; what is saved could not be loaded again.
    """
    for kind, types in TYPES.items():
        for name, known in types.items():
            if type(part) is known:
                return kind, name
    raise ValueError(
        f"{type(part).__name__} has no name, so that settings of it could not be loaded again: "
        "pilotage.guidance.register(...) gives it one"
    )


def _check_free(name: str, thing: Any) -> None:
    """Raise if a name means something else than `thing` already."""
    taken = NAMES.get(name)
    if taken is not None and _place(taken) != _place(thing):
        raise ValueError(f"the guidance {name!r} exists already: choose another name")


def _place(thing: Any) -> Any:
    """Where something is defined: a module that is run again may register its classes again."""
    return getattr(thing, "__module__", None), getattr(thing, "__qualname__", thing)


def _checked(name: Any) -> str:
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"a name consists of a-z, 0-9 and . * _ - and does not begin with a sign, got {name!r}"
        )
    return name


@functools.cache
def load_installed() -> None:
    """Import what installed packages register, so that the command line knows their names too.

    A package announces the module that registers in its ``pyproject.toml``:

        [project.entry-points."pilotage.guidance"]
        mine = "my_package.rules"
    """
    for entry in importlib.metadata.entry_points(group="pilotage.guidance"):
        try:
            entry.load()
        except Exception as error:  # whatever is wrong there, the other names hold
            package = entry.dist.name if entry.dist else "a package"
            warnings.warn(
                f"{package} announces guidance ({entry.value}) that cannot be imported: {error}",
                stacklevel=2,
            )
