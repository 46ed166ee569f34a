"""The page from beginning to end: a free port, a folder of its own, the model, Ctrl-C."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import typer

from .address import free_port


def serve(
    host: str,
    port: int,
    open_browser: bool,
    model: str | None,
    device: str,
    dtype: str = "auto",
    tokens: Sequence[Path] = (),
) -> None:
    """Load the model and serve the page until Ctrl-C.

    Args:
        host: Address to listen on.
        port: Port; 0: any that is free.
        open_browser: Open the page.
        model: Folder or hub name; None: the embedded model.
        device: What to compute on.
        dtype: Precision of the weights, see `load_on`.
        tokens: Files of learned words.

    Raises:
        OSError: the port is taken.
        ValueError: the model cannot be used here.
    """
    port = free_port(host, port)
    # A shell's script starts programs in the background deaf to Ctrl-C.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="pilotage-ui-", ignore_cleanup_errors=True) as folder:
        keep_private(Path(folder))
        from ..embedded import load_on
        from .server import launch
        from .studio import Studio

        try:
            studio = Studio(load_on(device, model, dtype), Path(folder), model, dtype, tokens)
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


def keep_private(folder: Path) -> None:
    """Let Gradio, which reads this when it is imported, write to a folder and tell nobody."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
