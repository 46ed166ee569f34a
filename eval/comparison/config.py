"""Options of a command in a TOML file, by their long names: ``scale = [3, 7.5]``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer


def _name(parameter: Any) -> str:
    """What an option or argument is called in a file."""
    return str(parameter.name).replace("_", "-")


def _plain(path: Path, name: str, value: Any, flag: bool) -> Any:
    """A value as it would stand on the command line; True or False for a flag."""
    if isinstance(value, bool) and flag:
        return value
    if isinstance(value, (str, int, float)) and not isinstance(value, bool) and not flag:
        return str(value)
    wanted = "true or false" if flag else "a text or a number"
    raise ValueError(f"{path}: {name} = {value!r}, expected {wanted}")


def read(path: Path, parameters: list[Any]) -> dict[str, Any]:
    """The values of a file, for the parameters of a command, by their names in Python.

    Raises:
        ValueError: the file is not TOML, names something unknown, or has a value of another kind.
        FileNotFoundError: there is no such file.
    """
    from ...guidance.names import unknown

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a TOML file ({error})") from error
    own = {"config", "help"}
    known = {_name(one): one for one in parameters if one.name not in own}
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in known:
            raise ValueError(f"{path}: {unknown('option', name, known)}")
        parameter = known[name]
        flag = bool(getattr(parameter, "is_flag", False))
        if getattr(parameter, "multiple", False):
            several = value if isinstance(value, list) else [value]
            values[parameter.name] = [_plain(path, name, one, flag) for one in several]
        else:
            values[parameter.name] = _plain(path, name, value, flag)
    return values


def _options(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        context.default_map = read(path, context.command.params)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of options, by their long names; the command line counts more.",
        callback=_options,
        is_eager=True,
    ),
]
