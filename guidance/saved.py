"""Guidance settings as plain dictionaries, and as JSON files that can be named as ``guidance=``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from .base import Fill, Guidance, Policy, Rule
from .files import write_json
from .names import unknown
from .policies.adaptive import AdaptiveGuidance
from .policies.schedule import Pattern, extrapolate, forecast, hold, linear_ag
from .presets import resolve
from .registry import TYPES, load_installed, part_name

FORMAT = "pilotage-guidance-2"
FIRST_FORMAT = "pilotage-guidance-1"  # of version 0.1


def to_dict(guidance: Guidance) -> dict[str, Any]:
    """A rule and a policy as dictionaries ready for JSON.

    Raises:
        ValueError: a part is not registered, or has settings that could not be loaded again.
    """
    plain = {"rule": _plain(guidance.rule), "policy": _plain(guidance.policy)}
    try:
        loaded = from_dict(json.loads(json.dumps(plain, allow_nan=False)))
    except TypeError as error:
        raise ValueError(f"'{guidance}' has settings that JSON does not know: {error}") from error
    again = {"rule": _plain(loaded.rule), "policy": _plain(loaded.policy)}
    if again != plain:
        raise ValueError(f"'{guidance}' has settings that would not be the same when loaded")
    return plain


def from_dict(config: Mapping[str, Any]) -> Guidance:
    """Inverse of `to_dict`; also of what version 0.1 wrote.

    Raises:
        ValueError: unknown names or settings.
        TypeError: settings that a part does not have.
    """
    if "name" in config["rule"] and "rule" not in config["rule"]:
        return _from_first(config)
    return Guidance(_part("rule", config["rule"]), _part("policy", config["policy"]))


def save_guidance(
    path: Path | str,
    guidance: str | Rule | Policy | Guidance,
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Write settings to a JSON file, whole or not at all.

    Args:
        path: File to write. In the folder ``guidance`` of a saved pipeline its stem is a name that
            ``pipe(..., guidance=name)`` knows.
        guidance: What to save, as `resolve` takes it.
        measured: Figures to keep beside the settings; not read back.

    Raises:
        ValueError: an unknown name, or the settings could not be loaded again.
        TypeError: neither a name nor a guidance object.
    """
    settings = to_dict(resolve(guidance))
    write_json(path, {"format": FORMAT, "guidance": settings, "measured": measured or {}})


def load_guidance(path: str | Path) -> Guidance:
    """Settings from a file that `save_guidance` wrote, also that of version 0.1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or names something unknown.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content.get("format") not in (FORMAT, FIRST_FORMAT):
            raise ValueError(f"its format is {content.get('format')!r}, expected {FORMAT!r}")
        return from_dict(content["guidance"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of guidance settings: {error}") from error


def _plain(value: Any) -> Any:
    """A setting as JSON knows it; a part as its name and settings, a number without end as text."""
    if isinstance(value, Pattern):
        return {"pattern": {f.name: getattr(value, f.name) for f in fields(value)}}
    if isinstance(value, (Rule, Policy, Fill)):
        kind, name = part_name(value)
        settings = fields(cast(Any, value))
        return {kind: name, "settings": {f.name: _plain(getattr(value, f.name)) for f in settings}}
    if getattr(value, "ndim", None) == 0:  # a number of numpy's or torch's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _value(value: Any) -> Any:
    """Inverse of `_plain`."""
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"pattern"}:
            return Pattern(**value["pattern"])
        if value.keys() == {"number"}:
            return float(value["number"])
        for kind in TYPES:
            if value.keys() == {kind, "settings"}:
                return _part(kind, value)
    return value


def _part(kind: str, config: Mapping[str, Any]) -> Any:
    name, known = config[kind], TYPES[kind]
    if name not in known:
        load_installed()
    if name not in known:
        raise unknown(kind, name, known)
    return known[name](**{key: _value(value) for key, value in config["settings"].items()})


def _from_first(config: Mapping[str, Any]) -> Guidance:
    """Settings as version 0.1 wrote them: parts by their "name", with other words."""
    rule = _first_part("rule", config["rule"])
    settings = dict(config["policy"])
    name = settings.pop("name")
    for old, new in (("stand_in", "fill"), ("head", "first"), ("tail", "then")):
        if old in settings:
            settings[new] = settings.pop(old)
    if name in ("hold", "extrapolate", "linear-ag"):
        settings.setdefault("then", "cond")  # what version 0.1 did
    for key in ("fill", "coefficients"):
        if key in settings:
            settings[key] = _part("fill", _first_part("fill", settings[key]))
    if settings.get("then") in ("hold", "extrapolate", "linear"):
        settings["then"] = "estimate"
    make: Any = {
        "hold": hold,
        "extrapolate": extrapolate,
        "linear-ag": linear_ag,
        "forecast": forecast,
        "ag": AdaptiveGuidance,
    }.get(name) or TYPES["policy"].get(name)
    if make is None:
        raise ValueError(f"unknown policy {name!r}")
    return Guidance(_part("rule", rule), make(**settings))


def _first_part(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(config)
    if any(settings.pop("intercept", ())):
        raise ValueError("its coefficients have an intercept, which is no more: fit them again")
    return {kind: settings.pop("name"), "settings": settings}
