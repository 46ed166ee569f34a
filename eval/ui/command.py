"""``pilotage ui``: a page in the browser."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from ..options import Device, Dtype, Model, Token, check_tokens
from .address import LOOPBACK


def ui(
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default this machine alone can reach it.")
    ] = LOOPBACK[0],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")
    ] = 7860,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = True,
    token: Token = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """A page in the browser: try settings side by side, compare, make a word, denoise.

    Nothing leaves this machine, and what the page was given is deleted when it ends (Ctrl-C).
    """
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError(
            "the page in the browser needs Gradio, which is not installed: "
            'pip install "pilotage[ui]"'
        )
    check_tokens(token)
    if host not in LOOPBACK:
        typer.secho(
            f"warning: with --host {host} everyone who can reach this machine can use the page, "
            "make it compute, and see what others make; there is no password",
            fg="yellow",
            err=True,
        )

    from .serve import serve

    serve(host, port, open_browser, model, device, dtype, token or ())
