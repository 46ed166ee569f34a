"""How a picture was made, in the metadata of its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..guidance.files import atomic

TAG = "pilotage"  # the name of the text in a PNG that holds its settings


def save_picture(path: Path, image: Image.Image, made: dict[str, Any]) -> None:
    """Write a PNG, whole or not at all, with how it was made (ready for JSON) in its metadata."""
    info = PngInfo()
    info.add_text(TAG, json.dumps(made))
    with atomic(path) as partial:
        image.save(partial, "PNG", pnginfo=info)


def prompt_of(path: Path) -> str:
    """The prompt that `save_picture` kept in a PNG.

    Raises:
        ValueError: there is none.
    """
    try:
        with Image.open(path) as image:
            return json.loads(image.info[TAG])["prompt"]
    except (KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not carry its prompt: name a file of prompts") from error
