"""Small versions of a comparison's pictures, so that its page stays light."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ...guidance.files import atomic

FOLDER = "thumbnails"
LARGEST = 384  # pixels
QUALITY = 70
LIGHT = 20_000  # bytes; a picture that has no more is shown itself


def thumbnail(path: Path, output: Path) -> Path:
    """A picture to show in the place of a larger one, which itself stays as it is.

    It is made once: pictures of a comparison do not change.

    Args:
        path: The picture, in the folder of its setting.
        output: Folder of the comparison; thumbnails lie in ``thumbnails/SETTING/NAME.webp``.
    """
    if path.stat().st_size <= LIGHT:
        return path
    small = output / FOLDER / path.parent.name / f"{path.stem}.webp"
    if not small.is_file() or small.stat().st_mtime_ns < path.stat().st_mtime_ns:
        with Image.open(path) as image:
            picture = image.convert("RGB")
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        with atomic(small) as partial:
            picture.save(partial, "WEBP", quality=QUALITY)
    return small
