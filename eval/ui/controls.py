"""What can be set of a rule or a policy, read from its dataclass: the controls of the page."""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from ...guidance import Fill, Pattern, Policy, Rule, available, load_guidance
from ...guidance.presets import maker
from ...guidance.registry import TYPES
from ...guidance.text import written
from ...pipelines.families import model_family
from ...pipelines.guided import guidance_folder

Kind = Literal["number", "whole", "switch", "choice", "list", "fill"]


@dataclass(frozen=True)
class Setting:
    """One setting, and how it is asked for.

    Args:
        name: Its name.
        kind: A number, a whole number, a switch, one of `choices`, a list of words or numbers
            separated by commas, or the name of a fill.
        default: Its value on this model, until it is changed.
        choices: What there is to choose from, and what the words of a list may be.
        help: What it is, from the docstring.
    """

    name: str
    kind: Kind
    default: Any
    choices: tuple[str, ...] = ()
    help: str = ""

    @property
    def shown(self) -> Any:
        """The default as a control holds it: None for no number, or no end."""
        if self.kind == "list":
            return ", ".join(str(item) for item in self.default)
        if self.kind == "fill":
            return self.default.name
        return None if self.default in (None, math.inf) else self.default

    def value(self, held: Any) -> Any:
        """The setting that a control holds.

        Raises:
            ValueError: it holds none.
        """
        if self.kind == "list":
            return _listed(self.name, str(held or ""), self.choices)
        if self.kind == "fill":
            return TYPES["fill"][held]()
        if held in (None, ""):
            if self.default not in (None, math.inf):
                raise ValueError(f"{self.name} is empty: give a number")
            return self.default
        if self.kind == "whole" and held != int(held):
            raise ValueError(f"{self.name} must be a whole number, got {held}")
        return {"whole": int, "number": float}.get(self.kind, lambda same: same)(held)


@dataclass(frozen=True)
class Method:
    """A rule or a policy by its name.

    Args:
        name: As ``guidance=`` knows it.
        kind: "rule", "policy", or "saved": rule and policy from the model's own folder.
        settings: What can be set.
        summary: The first line of its docstring, or what is saved.
    """

    name: str
    kind: Literal["rule", "policy", "saved"]
    settings: tuple[Setting, ...]
    summary: str

    def text(self, held: Sequence[Any]) -> str:
        """The name with the settings that are not its defaults.

        Args:
            held: What the control of each setting holds, in their order.

        Raises:
            ValueError: a control holds nothing usable.
        """
        values = {one.name: one.value(x) for one, x in zip(self.settings, held, strict=True)}
        changed = {
            one.name: values[one.name] for one in self.settings if values[one.name] != one.default
        }
        return written(self.name, changed)


def methods(pipe: Any) -> dict[str, Method]:
    """Every rule and policy by its name, with its settings on a pipeline's model; rules first.

    Names of a model's own folder come before others. A name that stands for the same as an earlier
    one is left out, and so is what needs a fit that the model does not bring.
    """
    family = model_family(pipe)
    folder = guidance_folder(pipe)
    saved = [_saved(file) for file in sorted(folder.glob("*.json"))] if folder else []
    own = {method.name: method for method in saved}
    found: dict[str, Method] = {}
    known: list[Any] = []
    for name in available():
        make = maker(name, family)
        if make is None or name in own:
            continue
        settings = tuple(settings_of(make))
        part = _made(make)
        if part in known if part else not any(one.kind == "list" for one in settings):
            continue
        known.append(part)
        found[name] = Method(name, _kind(make, part), settings, _summary(make))
    rules = {name: one for name, one in found.items() if one.kind == "rule"}
    return rules | {name: one for name, one in found.items() if one.kind == "policy"} | own


def settings_of(make: Any) -> Iterable[Setting]:
    """The settings of a dataclass, or of a function that makes one, as far as a control can be."""
    whole = make.func if isinstance(make, functools.partial) else make
    hints = get_type_hints(whole)
    helps = argument_help(Pattern) | argument_help(whole)
    for name, parameter in inspect.signature(make).parameters.items():
        kind, choices = _control(hints.get(name))
        if kind is not None and parameter.default is not parameter.empty:
            default = parameter.default
            if repr(default) == "<factory>":  # of a dataclass: made anew for every object
                factory = next(
                    f.default_factory for f in fields(cast(Any, whole)) if f.name == name
                )
                default = None if factory is MISSING else factory()
            yield Setting(name, kind, default, choices, helps.get(name, ""))


def argument_help(documented: Any) -> dict[str, str]:
    """The first sentence on every argument in a docstring, by its name; not "See ..."."""
    _, _, after = (inspect.getdoc(documented) or "").partition("Args:\n")
    block = re.split(r"\n\S", after)[0]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): ((?:.*\n?(?:     .*\n?)*))", block, re.M):
        sentence = re.split(r"(?<=[.;])\s", " ".join(text.split()).replace("`", ""))[0]
        if not sentence.startswith("See "):
            found |= dict.fromkeys(names.split(", "), sentence.rstrip(";"))
    return found


def guidance_text(
    known: Mapping[str, Method], rule: str, policy: str, held: Mapping[str, Sequence[Any]]
) -> str:
    """Rule and policy, with their settings, as ``guidance=`` takes them.

    Args:
        known: See `methods`.
        rule: Name of a rule.
        policy: Name of a policy, or of what is saved with the model.
        held: Name of a method -> what its controls hold.

    Raises:
        ValueError: a control holds nothing usable, or both name a rule.
    """
    if known[policy].kind == "saved":
        if rule != "cfg":
            raise ValueError(
                f"{policy!r} is saved with the model, with a rule of its own: choose cfg beside it"
            )
        return policy
    parts = [known[rule].text(held[rule])]
    if policy != "always":
        parts.append(known[policy].text(held[policy]))
    return "+".join(part for part in parts if part != "cfg" or len(parts) == 1)


def _saved(file: Path) -> Method:
    return Method(file.stem, "saved", (), str(load_guidance(file)))


def _made(make: Any) -> Rule | Policy | None:
    try:
        return cast("Rule | Policy", make())
    except ValueError:  # it needs coefficients, or choices
        return None


def _kind(make: Any, part: Any) -> Literal["rule", "policy"]:
    is_rule = isinstance(part, Rule) or (isinstance(make, type) and issubclass(make, Rule))
    return "rule" if is_rule else "policy"


def _summary(make: Any) -> str:
    whole = make.func if isinstance(make, functools.partial) else make
    return (inspect.getdoc(whole) or "").partition("\n")[0].replace("`", "")


def _control(hint: Any) -> tuple[Kind | None, tuple[str, ...]]:
    """The kind of control for a type, and its choices; None: there is no control for it."""
    if get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            found = _control(option)
            if found[0] is not None:
                return found
        return None, ()
    if get_origin(hint) is Literal:
        return "choice", tuple(get_args(hint))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return "list", tuple(get_args(item)) if get_origin(item) is Literal else ()
    plain: dict[Any, Kind] = {bool: "switch", int: "whole", float: "number"}
    if hint in plain:
        return plain[hint], ()
    if hint is Fill:
        return "fill", tuple(name for name, fill in TYPES["fill"].items() if _needs_nothing(fill))
    return None, ()


def _needs_nothing(fill: type) -> bool:
    return all(
        parameter.default is not parameter.empty
        for parameter in inspect.signature(fill).parameters.values()
    )


def _listed(name: str, text: str, choices: Sequence[str]) -> tuple[Any, ...]:
    """The items of a list separated by commas: words of `choices`, or numbers."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    if choices:
        return tuple(items)
    try:
        return tuple(float(item) for item in items)
    except ValueError:
        raise ValueError(f"{name} must be numbers separated by commas, got {text!r}") from None
