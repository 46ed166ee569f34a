"""Prompts from text files, one a line."""

from __future__ import annotations

from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ValueError: there is none, or the file is not UTF-8 text.
    """
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from error
    if not any(prompts):
        raise ValueError(f"{path} has no prompts: one a line is expected")
    return [prompt for prompt in prompts if prompt]
