"""The page's server: on one address, with a folder of its own that is deleted in the end."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
import typer
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from ..embedded import load_on
from .command import LOOPBACK
from .look import CSS, theme
from .page import build
from .studio import Studio
from .tasks import REPORTS

POLICY = (  # the page may load and send to nothing but where it came from
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)


def serve(
    host: str,
    port: int,
    open_browser: bool,
    model: str | None,
    device: str,
    tokens: Sequence[Path] = (),
) -> None:
    """Load the model and serve the page until Ctrl-C.

    Args:
        host: Address to listen on.
        port: Port; 0: any that is free.
        open_browser: Open the page.
        model: Folder or hub name; None: the embedded model.
        device: What to compute on.
        tokens: Files of learned words.

    Raises:
        OSError: the port is taken.
        ValueError: the model cannot be used here.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="pilotage-ui-") as folder:
        try:
            studio = Studio(load_on(device, model), Path(folder), model, tokens)
            page, address = launch(studio, host, port)
            try:
                typer.echo(f"{address}  (Ctrl-C ends it)")
                if open_browser:
                    webbrowser.open(address)
                threading.Event().wait()
            finally:
                page.close(verbose=False)
        except KeyboardInterrupt:
            typer.echo("ended")


def launch(studio: Studio, host: str = LOOPBACK[0], port: int = 0) -> tuple[gr.Blocks, str]:
    """Start the page's server in a thread.

    Returns:
        The page, to be closed; its address.

    Raises:
        OSError: the port is taken.
    """
    uploads, reports = studio.folder / "uploads", studio.folder / REPORTS
    for folder in (uploads, reports):
        folder.mkdir(exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    local = host in LOOPBACK
    middleware: list[Any] = [Middleware(_Headers)]
    if local:  # pages elsewhere that give themselves this address's name get nothing
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    page = build(studio, local)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or _free_port(host),
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        theme=theme(),
        css=CSS,
        app_kwargs={
            "middleware": middleware,
            "routes": [Mount(f"/{REPORTS}", StaticFiles(directory=reports))],
        },
    )
    return page, address


class _Headers:
    """Adds the headers that keep the page to itself."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {b"content-security-policy": POLICY, b"referrer-policy": "no-referrer"}
                message["headers"] = [
                    *message.get("headers", []),
                    *((name, value.encode()) for name, value in own.items()),
                ]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]
