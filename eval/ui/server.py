"""The page's server: what it serves to whom, and what pages may do."""

from __future__ import annotations

from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from .address import LOOPBACK
from .comparing import REPORTS
from .look import CSS, theme
from .page import build
from .studio import Studio

POLICY = (  # the page may load and send to nothing but where it came from
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)


def launch(studio: Studio, host: str, port: int) -> tuple[gr.Blocks, str]:
    """Start the page's server in a thread.

    Returns:
        The page, to be closed; its address.
    """
    reports = studio.folder / REPORTS
    reports.mkdir(exist_ok=True)
    local = host in LOOPBACK
    middleware: list[Any] = [Middleware(_Headers)]
    if local:  # pages elsewhere that give themselves this address's name get nothing
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    page = build(studio, local)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
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
