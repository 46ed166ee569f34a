"""Notebooks as pages of the site, with what their cells showed where .ci/run has executed them."""

import re
from pathlib import Path

import jupytext
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "examples/notebooks"
EXECUTED = ROOT / "outputs/notebooks"
KERNEL = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}
HEAD = """
[Download as a notebook]({name}.ipynb), for Jupyter, Colab or an editor; its text is
`examples/notebooks/{name}.py`. {state}
"""
STATE = {
    True: "What stands below the cells is what they showed when this site was made.",
    False: "It was not executed when this site was made: `.ci/run notebooks docs` does both.",
}


def notebook_of(source: Path):
    """The notebook of a source, and whether its code has been executed as it is now."""
    notebook = jupytext.read(source)
    notebook.metadata |= KERNEL
    executed = EXECUTED / f"{source.stem}.ipynb"
    if not executed.is_file():
        return notebook, False
    cells, ran = (
        [cell for cell in one.cells if cell.cell_type == "code"]
        for one in (notebook, jupytext.read(executed))
    )
    if [cell.source for cell in cells] != [cell.source for cell in ran]:
        return notebook, False
    for cell, done in zip(cells, ran, strict=True):
        # Without what libraries say while they load.
        cell.outputs = [one for one in done.outputs if one.get("name") != "stderr"]
    return notebook, True


def on_files(files: Files, config) -> Files:
    """Add the list of notebooks, and of each a page, its pictures and the file to download."""
    made = {"index.md": re.sub(r"\.py\)", ".md)", (SOURCES / "README.md").read_text())}
    for source in sorted(SOURCES.glob("*.py")):
        name = source.stem
        notebook, executed = notebook_of(source)
        # Unique names for pictures, beside the page.
        keys = {"unique_key": name, "output_files_dir": "."}
        page, resources = MarkdownExporter().from_notebook_node(notebook, keys)
        page = page.replace("../../docs/", "../").replace("![png](./", "![What the cell draws](")
        title, rest = page.strip().split("\n", 1)
        head = HEAD.format(name=name, state=STATE[executed])
        made |= {f"{name}.md": f"{title}\n{head}{rest}"}
        made |= {f"{name}.ipynb": jupytext.writes(notebook, fmt="ipynb")}
        for path, data in resources.get("outputs", {}).items():
            if path.endswith(".png"):  # pictures come as JPEG as well
                made[Path(path).name] = data
    for name, content in made.items():
        files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files
