"""The package: what is installed, in every way of installing it, and what may import what."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import pilotage
from pilotage.eval import embedded

from .structure import FOLDERS, LAYERS, ROOT, circles, imports, modules, packages, parsed, sources

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TEXTS = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md")
EMOJI = Path("examples/emoji")
EMOJI_TEXTS = ("pyproject.toml", "README.md", "LICENSE", "NOTICE.md")
# Parts of guidance that know nothing of rules, policies and runs, and what of it they may use.
APART = ("pilotage.guidance.analytic", "pilotage.guidance.zeroth_order")
SHARED = tuple(f"pilotage.guidance.{name}" for name in ("device", "files", "images", "prediction"))

# Run from the root of a checkout by a fresh interpreter, with pytest and without.
PROBE = """
from importlib.util import find_spec
from pathlib import Path

import pilotage

def test_where_things_come_from():
    place = Path({place!r})
    for name in {packages!r}:
        # Found without being imported, which would take torch and diffusers with it.
        top, *folders = name.split(".")[1:] or [""]
        spec = find_spec("pilotage." + top if top else "pilotage")
        found = Path(spec.origin).absolute().parent.joinpath(*folders, "__init__.py")
        assert found.is_file() and found.is_relative_to(place), (name, found, place)
    assert pilotage.__version__ == {version!r}
    assert Path(pilotage.__file__).with_name("py.typed").is_file()

if __name__ == "__main__":
    test_where_things_come_from()
"""


def copy_of_sources(folder):
    """What a build needs, without leftovers of earlier builds."""
    for source in FOLDERS.values():
        ignored = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
        shutil.copytree(ROOT / source, folder / source, ignore=ignored)
    for name in TEXTS:
        shutil.copy(ROOT / name, folder / name)
    return folder


def copy_of_emoji(folder):
    """The package of the embedded model, its weights cut to nothing: they are not built from."""
    for path in (ROOT / EMOJI).rglob("*"):
        name = path.relative_to(ROOT / EMOJI)
        if "__pycache__" in name.parts or path.is_dir():
            continue
        if name.parts[0] == "model" or path.name in EMOJI_TEXTS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            empty = path.suffix == ".safetensors"
            (folder / name).write_bytes(b"" if empty else path.read_bytes())
    return folder


def build(source, folder):
    """Build an sdist and a wheel from it, offline, with the setuptools that is installed."""
    code = f"from setuptools import build_meta as b; b.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", folder, sdist], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    return build(copy_of_sources(folder / "source"), folder)


@pytest.fixture(scope="module")
def wheel(distributions):
    return distributions[1]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    return build(copy_of_emoji(folder / "source"), folder)


def files_of(sdist):
    """What an sdist holds, without what setuptools adds."""
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if member.isfile()]
    return {n for n in names if n not in ("PKG-INFO", "setup.cfg") and ".egg-info/" not in n}


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode()), set(archive.namelist())


def test_sdists_hold_what_is_built_and_no_more(distributions, emoji):
    code = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert files_of(distributions[0]) == {*code, "src/pilotage/py.typed", *TEXTS}
    model = (path for path in (ROOT / EMOJI / "model").rglob("*") if path.is_file())
    names = {path.relative_to(ROOT / EMOJI).as_posix() for path in model}
    assert files_of(emoji[0]) == {n for n in names if "__pycache__" not in n} | {*EMOJI_TEXTS}


def test_metadata(distributions, emoji):
    needed = []
    for (_, wheel), name, licences in (
        (distributions, "pilotage", {"LICENSE"}),
        (emoji, "pilotage-emoji", {"LICENSE", "NOTICE.md"}),
    ):
        metadata, files = metadata_of(wheel)
        assert metadata["Name"] == name and metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Description-Content-Type"] == "text/markdown"
        assert metadata.get_payload().startswith("# ")
        assert set(metadata.get_all("License-File")) == licences
        info = next(n for n in files if n.endswith("METADATA")).removesuffix("METADATA")
        assert {f"{info}licenses/{licence}" for licence in licences} <= files
        assert f"{name.replace('-', '_')}/py.typed" in files
        needed += metadata.get_all("Requires-Dist") or []
    assert 'pilotage-emoji>=1; extra == "emoji"' in needed
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / EMOJI / "LICENSE").read_bytes()


def test_a_release_has_the_addresses_of_its_repository(tmp_path):
    """PyPI shows the README without the files beside it."""
    for name in (".ci/addresses", "README.md", "pyproject.toml", "examples/emoji/pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    repository = "https://example.org/someone/pilotage"
    subprocess.run([sys.executable, tmp_path / ".ci/addresses", repository, "v9"], check=True)
    text = (tmp_path / "README.md").read_text()
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    assert len(links) == len(re.findall(r"\]\(", text))
    for picture, link in links:
        assert link.startswith("https://")
        if link.startswith(repository):
            way, _, name = link.removeprefix(f"{repository}/").partition("/v9/")
            assert way == ("raw" if picture else "blob") and (ROOT / name.split("#")[0]).exists()
    for folder in (tmp_path, tmp_path / EMOJI):
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["urls"]["Repository"] == repository


def test_wheel_holds_only_pilotage(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"pilotage"}
    assert {f"{name.replace('.', '/')}/__init__.py" for name in packages()} <= set(names)
    shipped = {name for name in names if Path(name).suffix in (".py", ".c", ".css", ".html", ".js")}
    assert len(shipped) == len(sources()) and "pilotage/py.typed" in names


def test_the_embedded_model_is_that_of_the_checkout_or_the_package(monkeypatch, tmp_path, emoji):
    assert embedded.embedded_folder() == ROOT / EMOJI / "model"
    monkeypatch.setattr(embedded, "CHECKOUT", tmp_path)
    monkeypatch.setitem(sys.modules, "pilotage_emoji", None)  # as if it were not installed
    with pytest.raises(FileNotFoundError, match="pip install pilotage-emoji"):
        embedded.embedded_folder()
    with zipfile.ZipFile(emoji[1]) as archive:
        archive.extractall(tmp_path)
    monkeypatch.delitem(sys.modules, "pilotage_emoji")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = embedded.embedded_folder()
    assert folder == tmp_path / "pilotage_emoji"
    shipped, kept = (
        {p.relative_to(root) for p in root.rglob("*") if p.is_file() and p.suffix != ".pyc"}
        for root in (folder, ROOT / EMOJI / "model")
    )
    assert shipped == kept


@pytest.mark.parametrize("way", ["wheel", "lenient", "strict"])
def test_every_way_of_installing_finds_every_package(tmp_path, wheel, way):
    """By import, by ``python -m`` and by pytest, all from the root of a checkout."""
    source = copy_of_sources(tmp_path / "source")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "venv" / "lib" / f"python{version}" / "site-packages"
    # What is installed here, without the .pth files of editable installs.
    (site / "surroundings.pth").write_text(sysconfig.get_paths()["purelib"])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}

    def run(*command):
        done = subprocess.run(
            [python, *command], cwd=source, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    if way == "wheel":
        run(*install, wheel)
        place = site
    else:
        run(*install, "--config-settings", f"editable_mode={way}", "-e", ".")
        place = source
    probe = PROBE.format(
        place=str(place), packages=sorted(packages()), version=pilotage.__version__
    )
    (source / "tests").mkdir()
    (source / "tests" / "test_probe.py").write_text(probe)
    run("tests/test_probe.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider")
    as_module = (
        "pilotage.eval" if (ROOT / "eval" / "__main__.py").is_file() else "pilotage.eval.cli"
    )
    assert "compare" in run("-m", as_module, "--help")


def test_pyproject_lists_every_package_and_no_other():
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages()
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == FOLDERS


def test_other_files_of_the_package_are_listed():
    """C, CSS and JavaScript are shipped because a pattern in pyproject.toml names them."""
    listed = PYPROJECT["tool"]["setuptools"]["package-data"]
    for path in sources():
        if path.suffix == ".py":
            continue
        folder = path.parent.relative_to(ROOT).as_posix()
        patterns = listed.get(f"pilotage.{folder.replace('/', '.')}", [])
        assert any(path.match(pattern) for pattern in patterns), f"{path} would not be installed"


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_downwards_only(layer):
    known = modules()
    for name, path in known.items():
        if not f"{name}.".startswith(f"pilotage.{layer}."):
            continue
        for target in imports(name, path):
            parts = target.split(".")
            assert not (layer == "guidance" and parts[0] == "diffusers"), f"{path}: {target}"
            if parts[0] == "pilotage":
                assert parts[1] in LAYERS, f"{path}: imports {target}, which stands above it"
                assert LAYERS[parts[1]] <= LAYERS[layer], f"{path}: imports {target}"


def test_imports_within_the_package_are_relative():
    for path in modules().values():
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(n.split(".")[0] == "pilotage" for n in names), f"{path}: {names}"


@pytest.mark.parametrize("part", APART)
def test_parts_of_guidance_that_stand_apart(part):
    for name, path in modules().items():
        if f"{name}.".startswith(f"{part}."):
            for target in imports(name, path):
                inside = not target.startswith("pilotage.") or f"{target}.".startswith(f"{part}.")
                assert inside or target.startswith(SHARED), f"{path}: imports {target}"


def test_no_two_files_import_each_other_in_a_circle():
    assert circles() == []


def test_the_version_stands_once():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {pilotage.__version__}\n" in citation
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert re.search(r"^## (Unreleased|\d)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
