"""Small parts of the page that its tabs share: progress, tables, errors."""

from __future__ import annotations

import functools
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, Literal

import gradio as gr
from PIL import Image

SHOWN = 512  # pixels: smaller pictures are shown enlarged
EXPECTED = (ValueError, TypeError, OSError, ArithmeticError, ModuleNotFoundError)
LIMIT: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}  # one at a time


def told(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A handler whose errors are messages in the page; unexpected ones also in the terminal."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Iterator[Any]:
        try:
            yield from function(*arguments)
        except Exception as error:
            if not isinstance(error, EXPECTED):
                traceback.print_exc(file=sys.stderr)
            text = str(error) or type(error).__name__
            raise gr.Error(
                escape(text, quote=False), duration=None, print_exception=False
            ) from error

    return run


def progress(text: str, done: float | None = None, total: float = 1) -> str:
    """A line of text and a bar, as HTML; without a number the bar only moves."""
    value = "" if done is None else f' value="{done}" max="{total}"'
    return f'<div class="progress"><span>{escape(text)}</span><progress{value}></progress></div>'


def table(heads: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> str:
    """Figures as an HTML table; None is a dash."""

    def cell(value: float | None) -> str:
        return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"

    head = "".join(f"<th>{escape(text)}</th>" for text in ("", *heads))
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{cell(v)}</td>' for v in values)}</tr>"
        for name, values in rows.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def enlarged(image: Image.Image) -> Image.Image:
    """A picture for the page: small ones a whole number of times larger."""
    times = max(1, SHOWN // max(image.size))
    size = (image.width * times, image.height * times)
    return image if times == 1 else image.resize(size, Image.Resampling.LANCZOS)


def code(
    label: str,
    language: Literal["shell", "python"] = "shell",
    elem_id: str | None = None,
    visible: bool = False,
) -> gr.Code:
    """Lines to copy."""
    return gr.Code(
        language=language,
        label=label,
        lines=1,
        interactive=False,
        show_line_numbers=False,
        wrap_lines=True,
        elem_id=elem_id,
        visible=visible,
    )


def cleared() -> str:
    """No progress."""
    return ""
