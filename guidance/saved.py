"""Guidance settings as plain dictionaries, and as JSON files that can be named as ``guidance=``."""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from .base import Guidance, Policy, Rule
from .policies.fill import ExtrapolateDifference, HoldDifference, StandIn
from .policies.linear_ag import Coefficients
from .presets import POLICIES, RULES

FORMAT = "pilotage-guidance-1"
STAND_INS: dict[str, type[StandIn]] = {
    stand_in.name: stand_in for stand_in in (HoldDifference, ExtrapolateDifference, Coefficients)
}
KINDS = {"rule": RULES, "policy": POLICIES, "stand-in": STAND_INS}


def to_dict(guidance: Guidance) -> dict[str, Any]:
    """A rule and a policy as dictionaries ready for JSON."""
    return {"rule": _settings(guidance.rule), "policy": _settings(guidance.policy)}


def from_dict(config: dict[str, Any]) -> Guidance:
    """Inverse of `to_dict`.

    Raises:
        ValueError: unknown names or settings.
    """
    return Guidance(*(_part(kind, config[kind]) for kind in ("rule", "policy")))


def save_guidance(path: Path, guidance: Guidance, measured: dict[str, Any] | None = None) -> None:
    """Write settings to a JSON file, under a temporary name first.

    Args:
        path: File to write. In the folder ``guidance`` of a saved pipeline its stem is a name that
            ``pipe(..., guidance=name)`` knows.
        guidance: What to save.
        measured: Figures to keep beside the settings; not read back.
    """
    content = {"format": FORMAT, "guidance": to_dict(guidance), "measured": measured or {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def load_guidance(path: str | Path) -> Guidance:
    """Settings from a file that `save_guidance` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or names something unknown.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')!r}, expected {FORMAT!r}")
        return from_dict(content["guidance"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of guidance settings: {error}") from error


def _settings(part: Rule | Policy | StandIn) -> dict[str, Any]:
    settings: dict[str, Any] = {"name": part.name}
    for field in fields(part):
        value = getattr(part, field.name)
        if field.default == math.inf and value == math.inf:
            continue  # An open end (a default) stays out: JSON knows no infinity.
        settings[field.name] = _settings(value) if is_dataclass(value) else _plain(value)
    return settings


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _part(kind: str, config: dict[str, Any]) -> Any:
    settings, known = dict(config), KINDS[kind]
    name = settings.pop("name")
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}: known are {', '.join(known)}")
    for key in ("stand_in", "coefficients"):
        if isinstance(settings.get(key), dict):
            settings[key] = _part("stand-in", settings[key])
    return known[name](**settings)
