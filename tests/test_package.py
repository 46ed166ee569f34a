"""The package: what a wheel contains, what may import what."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"guidance": 0, "pipelines": 1, "eval": 2}


def build_wheel(folder):
    """Build offline, from a copy (no leftovers), with the setuptools that is installed."""
    source = folder / "source"
    for layer in LAYERS:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / layer, source / layer, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", folder, source], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_only_pilotage_and_works_without_the_checkout(tmp_path):
    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"pilotage"}
    sources = {
        f"pilotage/{p.relative_to(ROOT)}" for layer in LAYERS for p in (ROOT / layer).rglob("*.py")
    }
    assert sources <= set(names)
    script = (
        "import pathlib, pilotage.guidance, pilotage.eval.cli, pilotage.eval.embedded\n"
        "print(pathlib.Path(pilotage.guidance.__file__).parent)\n"
        "try: pilotage.eval.embedded.embedded_folder()\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = result.stdout.splitlines()
    assert Path(first) == tmp_path / "site" / "pilotage" / "guidance"
    assert "checkout" in second


def imports(path):
    """(level, module) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_downwards_only(layer):
    for path in (ROOT / layer).rglob("*.py"):
        depth = len(path.relative_to(ROOT / layer).parts)  # 1 for files directly in the layer
        for level, module in imports(path):
            top = module.split(".")[0]
            if level > depth:
                assert LAYERS[top] < LAYERS[layer], f"{path}: from {'.' * level}{module}"
            assert top != "pilotage" or level, f"{path}: imports pilotage absolutely"
            assert not (layer == "guidance" and top == "diffusers"), f"{path}: imports diffusers"
