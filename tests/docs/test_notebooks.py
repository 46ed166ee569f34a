"""The notebooks: public names only, how to install first, and links that lead to them.

.ci/run executes every cell of them.
"""

import ast
import importlib
import re

import pytest

from .counts import ROOT

SOURCES = sorted((ROOT / "examples/notebooks").glob("*.py"))
NOTEBOOKS = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def nodes(path, kind):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind)]


@NOTEBOOKS
def test_names_are_public(path):
    names = [node.attr for node in nodes(path, ast.Attribute)]
    for node in nodes(path, ast.Import | ast.ImportFrom):
        names += [alias.name for alias in node.names]
    for node in nodes(path, ast.ImportFrom):
        names += node.module.split(".")
        if node.module.startswith("pilotage"):
            module = importlib.import_module(node.module)
            # What a package lists is what it promises.
            promised = getattr(module, "__all__", dir(module))
            assert {alias.name for alias in node.names} <= {*promised}, node.module
    assert not [n for n in names if n.startswith("_") and n != "__name__"]
    assert not [node.module for node in nodes(path, ast.ImportFrom) if "examples" in node.module]


@NOTEBOOKS
def test_first_cell_says_how_to_install_and_what_to_replace(path):
    first = path.read_text().split("\n# %%\n")[0]
    assert first.startswith("# %% [markdown]\n# # ")
    for said in ("pip install ", "embedded model", "[emoji", "**your own", "GPU"):
        assert said in first.replace("\n# ", " "), said


@NOTEBOOKS
def test_links_lead_somewhere(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(lines)):
        assert (path.parent / target).is_file(), target


@NOTEBOOKS
def test_files_are_written_below_the_current_folder(path):
    for text in [node.value for node in nodes(path, ast.Constant)]:
        assert not (isinstance(text, str) and re.match(r"(/|~|\.\.)", text)), text


@NOTEBOOKS
def test_it_is_found(path):
    assert f"({path.name})" in (path.parent / "README.md").read_text()
    assert f": notebooks/{path.stem}.md\n" in (ROOT / "mkdocs.yml").read_text()


def test_readme_and_site_link_them():
    assert len(SOURCES) == 6
    assert "](examples/notebooks)" in (ROOT / "README.md").read_text()
    assert "](notebooks/index.md)" in (ROOT / "docs/getting-started.md").read_text()
