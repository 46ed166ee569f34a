"""What pages name exists: imports of their code, commands and options, files of the checkout."""

import ast
import importlib
import re

import pytest
import typer

from pilotage.eval.cli import app

from .counts import ROOT
from .test_readme import PAGES_WITH_LINKS, SITE

CURRENT = [page for page in (*PAGES_WITH_LINKS, *SITE) if page != "CHANGELOG.md"]
COMMANDS = typer.main.get_command(app).commands
FOLDERS = ("guidance", "pipelines", "eval", "examples", "tests", "docs")


def text(page):
    return (ROOT / page).read_text()


@pytest.mark.parametrize("page", CURRENT)
def test_python_parses_and_its_imports_work(page):
    for code in re.findall(r"```python\n(.*?)```", text(page), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"


@pytest.mark.parametrize("page", CURRENT)
def test_commands_have_the_options_they_are_given(page):
    for line in re.findall(r"\bpilotage ([^`#|\n]*(?:\\\n[^`#|\n]*)*)", text(page)):
        name, *words = line.split()
        if name in COMMANDS:
            known = {opt for p in COMMANDS[name].params for opt in (*p.opts, *p.secondary_opts)}
            options = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
            assert options <= known | {"--help", "-h"}, f"{page}: pilotage {name}"


@pytest.mark.parametrize("page", CURRENT)
def test_files_exist(page):
    for name in re.findall(r"`([\w./-]+)`", text(page)):
        if name.split("/")[0] in FOLDERS and "/" in name and "NAME" not in name:
            made = name.startswith("guidance/") and name.endswith(".json")  # in a model's folder
            assert made or (ROOT / name).exists(), f"{page}: {name}"
