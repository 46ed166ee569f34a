"""Pictures of emoji with captions: the data the embedded text-to-image model is trained on.

Seven families of drawings (npm packages of SVG bodies) are rendered at 64x64 on white and named
with the CLDR labels and tags of ``emojibase-data``. The result is one zip archive in the layout
of Hugging Face's ``imagefolder`` (``metadata.jsonl`` beside the pictures), under 48 MB:

    python -m examples.emoji.data prepare            # cache/emoji.zip (fetches npm packages)
    python -m examples.emoji.data sheet --split pair # contact sheet of what is inside
    python -m examples.emoji.data splits             # writes down what is held out

Splits are fixed by a hash of the names (see `split_of`), never by chance or by order, and written
down in ``splits.json``:

* ``concept``: concepts held out entirely, in every style (subjects for personalization),
* ``pair``: (concept, style) pairs held out of concepts otherwise trained on (evaluation),
* ``train``: the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from pilotage.guidance.files import atomic, write_text

HERE = Path(__file__).resolve().parent
DEFAULT_ARCHIVE = Path("cache/emoji.zip")
RESOLUTION = 64

# npm package -> name of the style in captions.
STYLES = {
    "noto": "noto",
    "noto-v1": "blob",
    "fluent-emoji": "fluent",
    "fluent-emoji-flat": "flat",
    "fxemoji": "fxemoji",
    "twemoji": "twemoji",
    "emojione": "emojione",
}
# Groups of emojibase whose concepts make good subjects: animals, food, travel, activities, objects.
SUBJECT_GROUPS = (3, 4, 5, 6, 7)
SUBJECT_MIN_STYLES = 6
HELD_OUT_CONCEPTS_PER_MILLE = 80
HELD_OUT_PAIRS_PER_MILLE = 80


@dataclass(frozen=True)
class Drawing:
    """One picture of one concept in one style."""

    file_name: str
    style: str
    concept: str
    hexcode: str
    group: int | None
    split: str
    tags: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The plain caption, e.g. ``twemoji style red apple``."""
        return caption(self.style, self.concept)


def caption(style: str, concept: str, tags: list[str] | tuple[str, ...] = ()) -> str:
    """The prompt that describes a drawing; tags follow the name, separated by commas."""
    return ", ".join([f"{style} style {concept}", *tags])


def _per_mille(*names: str) -> int:
    digest = hashlib.sha256("\x1f".join(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000


def split_of(style: str, concept: str, subject: bool) -> str:
    """``concept``, ``pair`` or ``train``, from SHA-256 of the names alone.

    `subject` says whether the concept qualifies as a held-out subject: an animal, food, place,
    activity or object drawn in at least six styles.
    """
    if subject and _per_mille("concept", concept) < HELD_OUT_CONCEPTS_PER_MILLE:
        return "concept"
    if _per_mille("pair", concept, style) < HELD_OUT_PAIRS_PER_MILLE:
        return "pair"
    return "train"


def _plain(text: str) -> str:
    """Lower-case ASCII, as captions use it."""
    text = unicodedata.normalize("NFKD", text.replace("’", "'"))
    return text.encode("ascii", "ignore").decode().lower()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", _plain(text).replace("'", "")).strip("-")


def _hexcode(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def fetch_packages(folder: Path) -> Path:
    """Install the npm packages named in ``package.json`` below `folder`; returns node_modules."""
    modules = folder / "node_modules"
    if all((modules / "@iconify-json" / name / "icons.json").is_file() for name in STYLES):
        return modules
    if shutil.which("npm") is None:
        raise SystemExit("npm is needed to fetch the drawings: install Node.js, then run again")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "package.json", folder / "package.json")
    subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=folder, check=True)
    return modules


def _find_icons(modules: Path, package: str, emoji: list[dict]) -> dict[str, dict]:
    """hexcode -> icon of one package, matched by code point where known, else by name."""
    folder = modules / "@iconify-json" / package
    icons = json.loads((folder / "icons.json").read_text())
    chars_file = folder / "chars.json"
    chars = json.loads(chars_file.read_text()) if chars_file.is_file() else {}
    by_code = {_hexcode(code): name for code, name in chars.items()}
    squashed = {
        name.replace("-", ""): name for name in icons["icons"]
    }  # fxemoji runs words together
    found = {}
    for entry in emoji:
        code = _hexcode(entry["hexcode"])
        name = by_code.get(code) or _slug(entry["label"])
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = icons["icons"].get(name) or icons["icons"].get(squashed.get(name.replace("-", "")))
        if icon is None or icon.get("hidden"):
            continue
        found[code] = {
            "body": icon["body"],
            "width": icon.get("width", icons.get("width", 16)),
            "height": icon.get("height", icons.get("height", 16)),
        }
    return found


def render(icon: dict, size: int = RESOLUTION) -> Image.Image:
    """Draw an SVG body on white, its aspect ratio kept, as an RGB picture of size x size."""
    import resvg_py

    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="0 0 {icon["width"]} {icon["height"]}">'
        f"{icon['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white")
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def prepare(archive: Path, packages: Path) -> list[Drawing]:
    """Render every drawing into `archive`, which is there whole or not at all."""
    from tqdm import tqdm

    modules = fetch_packages(packages)
    emoji = json.loads((modules / "emojibase-data" / "en" / "data.json").read_text())
    icons = {package: _find_icons(modules, package, emoji) for package in STYLES}
    drawings = []
    with atomic(archive) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as out:
        for entry in tqdm(emoji, desc="rendering", unit="concept"):
            code = _hexcode(entry["hexcode"])
            packages_with = [package for package in STYLES if code in icons[package]]
            group = entry.get("group")
            subject = group in SUBJECT_GROUPS and len(packages_with) >= SUBJECT_MIN_STYLES
            concept = _plain(entry["label"])
            for package in packages_with:
                style = STYLES[package]
                drawing = Drawing(
                    file_name=f"{style}/{code}.webp",
                    style=style,
                    concept=concept,
                    hexcode=code,
                    group=group,
                    split=split_of(style, concept, subject),
                    tags=[_plain(tag) for tag in entry.get("tags", [])],
                )
                buffer = io.BytesIO()
                render(icons[package][code]).save(buffer, "WEBP", lossless=True, method=4)
                out.writestr(drawing.file_name, buffer.getvalue())
                drawings.append(drawing)
        lines = (json.dumps(asdict(d) | {"text": d.text}) for d in drawings)
        out.writestr("metadata.jsonl", "\n".join(lines) + "\n")
    return drawings


def load(archive: Path = DEFAULT_ARCHIVE, everyday: bool = False) -> list[Drawing]:
    """The drawings listed in an archive; `everyday` keeps the concepts of ``everyday.txt``.

    Raises:
        FileNotFoundError: the archive has not been prepared yet.
        ValueError: the archive is damaged.
    """
    if not archive.is_file():
        raise FileNotFoundError(
            f"{archive} does not exist: make it with 'python -m examples.emoji.data prepare'"
        )
    try:
        with zipfile.ZipFile(archive) as source:
            records = [json.loads(line) for line in source.read("metadata.jsonl").splitlines()]
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{archive} is damaged ({error}): prepare it again") from error
    drawings = [Drawing(**{k: v for k, v in record.items() if k != "text"}) for record in records]
    if everyday:
        names = {_plain(line) for line in (HERE / "everyday.txt").read_text().splitlines()}
        drawings = [drawing for drawing in drawings if drawing.concept in names]
    return drawings


def pictures(archive: Path, drawings: list[Drawing]) -> Iterator[Image.Image]:
    """Yield the RGB picture of each drawing, in order."""
    with zipfile.ZipFile(archive) as source:
        for drawing in drawings:
            data = source.read(drawing.file_name)
            yield Image.open(io.BytesIO(data)).convert("RGB")


def contact_sheet(images: list[Image.Image], columns: int, labels: list[str] | None = None):
    """Pictures in a grid, row by row, each with an optional label below it."""
    size = images[0].width
    foot = 11 if labels else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + 2), rows * (size + foot + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = (i % columns) * (size + 2), (i // columns) * (size + foot + 2)
        sheet.paste(image, (x, y))
        if labels:
            draw.text((x, y + size), labels[i][: size // 6 + 1], fill="black")
    return sheet


def held_out(drawings: list[Drawing]) -> dict[str, list]:
    """Names of the held-out concepts and of the held-out (concept, style) pairs, sorted."""
    return {
        "concepts": sorted({d.concept for d in drawings if d.split == "concept"}),
        "pairs": sorted([d.concept, d.style] for d in drawings if d.split == "pair"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare", help="fetch the drawings and render them")
    make.add_argument("--packages", type=Path, default=Path("cache/npm"))
    show = commands.add_parser("sheet", help="contact sheet of the archive")
    show.add_argument("--split", choices=["train", "pair", "concept"], default="train")
    show.add_argument("--everyday", action="store_true", help="only the everyday concepts")
    show.add_argument("--count", type=int, default=196)
    show.add_argument("-o", "--output", type=Path, default=Path("cache/sheet.png"))
    write = commands.add_parser("splits", help="write down what is held out")
    write.add_argument("-o", "--output", type=Path, default=HERE / "splits.json")
    for command in (make, show, write):
        command.add_argument("--archive", type=Path, default=DEFAULT_ARCHIVE)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line of this file; see the module's docstring."""
    args = _parser().parse_args(argv)
    if args.command == "prepare":
        drawings = prepare(args.archive, args.packages)
        size = args.archive.stat().st_size / 1e6
        print(f"{len(drawings)} drawings, {size:.1f} MB: {args.archive}")
        for split in ("train", "pair", "concept"):
            chosen = [d for d in drawings if d.split == split]
            print(f"  {split}: {len(chosen)} drawings, {len({d.concept for d in chosen})} concepts")
        return
    if args.command == "splits":
        write_text(args.output, json.dumps(held_out(load(args.archive)), indent=0) + "\n")
        print(args.output)
        return
    drawings = [d for d in load(args.archive, args.everyday) if d.split == args.split]
    step = max(1, len(drawings) // args.count)
    drawings = drawings[::step][: args.count]
    images = list(pictures(args.archive, drawings))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, 14, [d.concept for d in drawings]).save(args.output)
    print(args.output)


if __name__ == "__main__":
    sys.exit(main())
