"""Files of the site that live elsewhere in the tree, so that they stand once.

Figures and pictures keep the place where the command that made them writes them.
"""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "pictures/quickstart.png": "examples/quickstart.png",
    "pictures/comfyui.png": "examples/comfyui/workflows/fewer-evaluations.png",
    "support.md": "pipelines/SUPPORT.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
FIGURES = "eval/results"


def on_files(files: Files, config) -> Files:
    """Add what lies outside docs/."""
    found = {target: ROOT / source for target, source in ELSEWHERE.items()}
    for path in sorted((ROOT / FIGURES).rglob("*")):
        if path.suffix in (".json", ".csv", ".png"):
            found[f"figures/{path.relative_to(ROOT / FIGURES).as_posix()}"] = path
    for target, path in found.items():
        files.append(File.generated(config, target, abs_src_path=str(path)))
    return files
