"""The state of the house in figures: ``eval/results/house.json``.

    python -m examples.studies.house                    # needs git and mypy
    python -m examples.studies.house --before 09285cd   # the commit that settings are compared with

Size and order of the installed package (lines, import circles, type errors, public names without a
docstring), size of README and docs; and for a dozen guidance settings on the embedded model the
largest absolute difference between the latents of this tree and those of an earlier commit.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pilotage.eval.record import write_figures
from tests import structure

ROOT = structure.ROOT
OUTPUT = Path("eval/results/house.json")
BEFORE = "09285cd"
SETTINGS = (
    "cfg",
    "apg",
    "ag",
    "apg+ag",
    "rescale",
    "tcfg",
    "magnitude",
    "fdg",
    "forecast",
    "linear-ag",
    "hold",
    "searched",
)
PROMPTS = ("noto style fox", "twemoji style red apple", "flat style key")
SCALE = 7.5
STEPS = 20  # what the model's own settings were fitted for
# Run in either tree, by the package of that tree: settings, output and call come as JSON.
SAMPLE = """
import json, sys, torch
from safetensors.torch import save_file
from pilotage import guidance
from pilotage.eval.embedded import load_embedded

task = json.loads(sys.argv[1])
torch.set_num_threads(1)
pipe = load_embedded()
pipe.set_progress_bar_config(disable=True)
latents = {}
# What follows in the second half has changed since: both trees do what was done then.
meant = {"hold": guidance.hold(then="cond")} if hasattr(guidance, "hold") else {}
for name in task["settings"]:
    generator = [torch.Generator().manual_seed(i) for i in range(len(task["call"]["prompt"]))]
    call = {"guidance": meant.get(name, name), "generator": generator} | task["call"]
    call["output_type"] = "latent"
    latents[name] = pipe(**call).images.contiguous()
    print(name, file=sys.stderr, flush=True)
save_file(latents, task["output"])
"""


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, for as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


@contextlib.contextmanager
def as_installed(tree: Path) -> Iterator[Path]:
    """A folder in which a tree's parts lie as in the installed package: for PYTHONPATH."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pilotage"
        package.mkdir()
        for part in (
            *(tree / "src" / "pilotage").glob("*.*"),
            *map(tree.joinpath, structure.LAYERS),
        ):
            (package / part.name).symlink_to(part)
        # Fitted settings ask for the version that they were fitted by.
        told = [tree / "src" / "pilotage" / "__init__.py", tree / "pyproject.toml"]
        text = "\n".join(place.read_text() for place in told if place.is_file())
        found = re.search(r'^(?:__version__|version) = "([^"]+)"', text, re.MULTILINE)
        metadata = Path(folder) / "pilotage.dist-info" / "METADATA"
        metadata.parent.mkdir()
        version = found[1] if found else "0"
        metadata.write_text(f"Metadata-Version: 2.1\nName: pilotage\nVersion: {version}\n")
        yield Path(folder)


def latents(tree: Path) -> dict[str, Any]:
    """Latents (3, 4, 16, 16) of every setting, made by a tree's own package and model."""
    with as_installed(tree) as path, tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "latents.safetensors"
        call = {
            "prompt": list(PROMPTS),
            "guidance_scale": SCALE,
            "num_inference_steps": STEPS,
        }
        task = {"settings": SETTINGS, "output": str(output), "call": call}
        environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SAMPLE, json.dumps(task)]
        subprocess.run(command, cwd=tree, env=environment, check=True)
        return load_file(output)


def settings(before: str) -> dict[str, Any]:
    """Largest absolute difference of the latents of each setting, before and now."""
    with checkout(before) as tree:
        commit = subprocess.run(
            ["git", "-C", tree, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        old = latents(tree)
    new = latents(ROOT)
    return {
        "before": commit,
        "prompts": list(PROMPTS),
        "steps": STEPS,
        "guidance_scale": SCALE,
        "largest_latent": max(float(value.abs().max()) for value in old.values()),
        "max_abs_difference": {
            name: float((new[name] - old[name]).abs().max()) for name in SETTINGS
        },
    }


def type_errors() -> int:
    """Errors that mypy finds in the package as it is installed.

    Raises:
        RuntimeError: mypy is not installed, or did not get as far as checking.
    """
    with as_installed(ROOT) as path, tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml"]
        command += ["--cache-dir", cache, "--no-error-summary", "-p", "pilotage"]
        environment = {**os.environ, "MYPYPATH": str(path)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not done.stdout):
        raise RuntimeError(f"mypy: {done.stdout}{done.stderr}")
    return len(re.findall(r"^.*: error:", done.stdout, re.MULTILINE))


def lines_by_folder() -> dict[str, int]:
    """Lines of Python, C, CSS and JavaScript, by top folder; empty ones and comments count."""
    found = dict.fromkeys(structure.FOLDERS.values(), 0)
    for path in structure.sources():
        folder = next(name for name in found if path.is_relative_to(ROOT / name))
        found[folder] += len(path.read_text().splitlines()) if path.suffix != ".html" else 0
    return found


def undocumented(tree: ast.Module, module: str) -> list[str]:
    """Dotted names of what is public in a module and has no docstring, itself included.

    Methods and properties of public classes count. Left out is what its definition elsewhere
    documents: setters, overloads, and what is marked as an override.
    """
    found = [] if ast.get_docstring(tree) else [module]

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
            if node.name.startswith("_") or marks & {"setter", "overload", "override"}:
                continue
            name = f"{prefix}.{node.name}"
            if not ast.get_docstring(node):
                found.append(name)
            if isinstance(node, ast.ClassDef):
                walk(node.body, name)

    walk(tree.body, module)
    return found


def public_names_without_docstring() -> list[str]:
    """`undocumented` names of every public module."""
    found = []
    for name, path in structure.modules().items():
        if not any(part.startswith("_") for part in name.split(".")):
            found += undocumented(ast.parse(path.read_text()), name)
    return found


def counted() -> dict[str, Any]:
    """All figures that are read off the files."""
    readme = (ROOT / "README.md").read_bytes()
    return {
        "lines": structure.lines(),
        "lines_of_templates": structure.lines(kinds=(".html",)),
        "lines_by_folder": lines_by_folder(),
        "circles": len(structure.circles()),
        "type_ignores": structure.type_ignores(),
        "readme_lines": len(readme.splitlines()),
        "readme_bytes": len(readme),
        "docs_pages": len(list((ROOT / "docs").rglob("*.md"))),
        "public_names_without_docstring": len(public_names_without_docstring()),
    }


def main() -> None:
    """Count, check, sample and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="compare latents with")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args()
    for name in public_names_without_docstring():
        print(f"no docstring: {name}", file=sys.stderr)
    for group in structure.circles():
        print(f"import each other: {', '.join(group)}", file=sys.stderr)
    figures = counted() | {"type_errors": type_errors(), "settings": settings(args.before)}
    write_figures(args.output, figures)
    print(args.output.read_text())


if __name__ == "__main__":
    main()
