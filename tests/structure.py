"""What the source tree looks like: packages, lines, and which file imports which.

The layering tests read it, and so does the study that records the state of the house
(``examples/studies/house.py``). Nothing is imported: files are parsed.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pilotage.guidance.files import fingerprint

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"guidance": 0, "pipelines": 1, "eval": 2}  # imports go from higher to lower numbers only
# Where each part of the installed package lies in the tree, as in pyproject.toml.
FOLDERS = {
    "pilotage": "src/pilotage",
    **{f"pilotage.{layer}": layer for layer in LAYERS},
}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the installed package by its dotted name, packages by their __init__.py."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


CODE = (".py", ".c", ".css", ".js")


def packages(root: Path = ROOT) -> set[str]:
    """Dotted names of every folder that holds Python files of the installed package."""
    found = set()
    for package, folder in FOLDERS.items():
        for path in (root / folder).rglob("*.py"):
            found.add(".".join([package, *path.parent.relative_to(root / folder).parts]))
    return found


def sources(root: Path = ROOT) -> list[Path]:
    """Every source file of the installed package: Python, C, CSS, JavaScript, page templates."""
    kinds = (*CODE, ".html")
    files = (path for folder in FOLDERS.values() for path in (root / folder).rglob("*"))
    return sorted(path for path in files if path.suffix in kinds and path.is_file())


def lines(root: Path = ROOT, kinds: tuple[str, ...] = CODE) -> int:
    """Lines of the installed package, empty ones and comments too; by default of its code."""
    files = (path for path in sources(root) if path.suffix in kinds)
    return sum(len(path.read_text().splitlines()) for path in files)


def type_ignores(root: Path = ROOT) -> int:
    """Number of ``# type: ignore`` comments in the installed package."""
    pattern = re.compile(r"#\s*type:\s*ignore")
    return sum(len(pattern.findall(path.read_text())) for path in modules(root).values())


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, read once a process."""
    return ast.parse(path.read_text())


def imports(name: str, path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, wherever in it.

    Imports inside functions and under TYPE_CHECKING count. ``from a import b`` gives ``a.b``,
    whether b is a module or a name in a.

    Args:
        name: Dotted name of the module.
        path: Its file.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Which module of the package names which other modules of it.

    Python also runs the ``__init__.py`` of every package above a module; only what a file names
    itself is counted, else every package with a filled ``__init__.py`` were a circle.
    """
    known = modules(root)
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for target in imports(name, path):
            while target and target not in known:  # a name in a module: the module
                target = target.rpartition(".")[0]
            if target:
                graph[name].add(target)
    return graph


def circles(root: Path = ROOT) -> list[list[str]]:
    """Groups of modules that import each other in a circle (strongly connected components).

    A module that imports itself is one too.
    """
    graph = import_graph(root)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        pending = [start]
        while pending:
            for target in graph[pending.pop()] - found:
                found.add(target)
                pending.append(target)
        return found

    reach = {name: reached(name) for name in graph}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def _essence(node: object) -> object:
    """What a piece of code does, as something that JSON can hold: without docstrings."""
    if isinstance(node, list):
        return [_essence(item) for item in node if not _is_text(item)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return [type(node).__name__, *([name, _essence(value)] for name, value in fields)]


def _is_text(node: object) -> bool:
    """Whether a statement is a string alone."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return False
    return isinstance(node.value.value, str)


def code_of(paths: Iterable[Path], root: Path = ROOT) -> dict[str, str]:
    """A fingerprint of what each file does, by its path; comments and docstrings do not count."""
    return {
        path.relative_to(root).as_posix(): fingerprint(_essence(parsed(path)))[:16]
        for path in sorted(paths)
    }
