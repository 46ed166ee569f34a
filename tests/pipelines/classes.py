"""The pipeline classes of diffusers that take a guidance scale, as its source has them.

Files are parsed, so that what a class needs to be imported plays no part.
"""

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import diffusers

from ..structure import parsed

FOLDER = Path(diffusers.__file__).parent / "pipelines"
# Arguments of a call that are scales of guidance: guidance_scale, true_cfg_scale,
# max_guidance_scale, decoder_guidance_scale, guidance_scale_2, ...
SCALE = re.compile(r"(guidance|cfg)_scale(_\d+)?$")


@dataclass(frozen=True)
class Written:
    """A class as it stands in a file.

    Args:
        bases: Names of the classes it derives from.
        arguments: Names of the arguments of its own ``__call__`` and ``__init__``, by method.
    """

    bases: tuple[str, ...]
    arguments: dict[str, tuple[str, ...]]


def _written(node: ast.ClassDef) -> Written:
    arguments = {}
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name in ("__call__", "__init__"):
            given = method.args
            every = (*given.posonlyargs, *given.args, *given.kwonlyargs)
            arguments[method.name] = tuple(argument.arg for argument in every)
    return Written(tuple(ast.unparse(b).rpartition(".")[2] for b in node.bases), arguments)


@functools.cache
def written() -> dict[str, Written]:
    """Every class in the files of diffusers' pipelines that are not deprecated, by name."""
    paths = (path for path in sorted(FOLDER.rglob("*.py")) if "deprecated" not in path.parts)
    return {
        node.name: _written(node)
        for path in paths
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    }


def lineage(name: str) -> list[str]:
    """A class and those that it derives from, the closest first, as far as they are known."""
    found = written().get(name)
    return [name, *(base for b in found.bases for base in lineage(b))] if found else []


def definer(name: str, method: str) -> str | None:
    """Which of a class's `lineage` a method comes from."""
    return next((n for n in lineage(name) if method in written()[n].arguments), None)


@functools.cache
def with_scale() -> list[str]:
    """Names of the pipeline classes that diffusers exports whose call takes a scale of guidance.

    Or which have a guider as a component, which holds the scale.
    """

    def arguments(name, method):
        found = definer(name, method)
        return written()[found].arguments[method] if found else ()

    exported = set(dir(diffusers)) - {"DiffusionPipeline"}
    return [
        name
        for name in sorted(exported & set(written()))
        if "DiffusionPipeline" in lineage(name)
        and (
            any(SCALE.search(argument) for argument in arguments(name, "__call__"))
            or "guider" in arguments(name, "__init__")
        )
    ]
