"""What commands say beside their results, what they ask, and how they end.

Results go to stdout, everything else to stderr. A command ends with 0; with 2, if what was asked
for is refused (an unknown name, a wrong value, a file that is missing or damaged); with 1, if it
failed at work (a full disk, too little memory, a missing package, the network), or was not to go
on; with 130, if it was interrupted. Each error is one line; a traceback is a bug of Pilotage.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

LONG = 300.0  # seconds that a run may take without a question
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def is_quiet() -> bool:
    """Whether --quiet was given to the command that runs."""
    return _quiet.get()


def note(text: str) -> None:
    """Print a message on stderr, unless --quiet was given."""
    if not is_quiet():
        typer.echo(text, err=True)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress bars, whoever shows them, no notes, no warnings, no log."""
    from tqdm.std import tqdm

    name = "__init__"
    shown = getattr(tqdm, name)

    # Most bars, also those of libraries, are shown whatever the environment says.
    def hidden(bar: Any, *args: Any, **options: Any) -> None:
        shown(bar, *args, **options | {"disable": True})

    was, level = _quiet.set(True), logging.root.manager.disable
    logging.disable(logging.WARNING)
    setattr(tqdm, name, hidden)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        setattr(tqdm, name, shown)
        logging.disable(level)
        _quiet.reset(was)


def _hush(context: typer.Context, quiet: bool) -> bool:
    if quiet:
        context.with_resource(quietly())  # from here to the end of the command
    return quiet


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print results and errors only, no progress.",
        callback=_hush,
        is_eager=True,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a long run.")]


def with_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option --quiet."""

    @functools.wraps(command)
    def run(*, quiet: bool, **options: Any) -> None:
        command(**options)  # what the option does has been done

    # Typer reads these.
    signature = inspect.signature(command, eval_str=True)
    last = inspect.Parameter(
        "quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet
    )
    run.__dict__["__signature__"] = signature.replace(
        parameters=[*signature.parameters.values(), last]
    )
    run.__annotations__ = get_type_hints(command, include_extras=True) | {"quiet": Quiet}
    return run


def go_on(seconds: float, yes: bool) -> None:
    """Ask on a terminal whether a run shall begin, if it will be long.

    Args:
        seconds: The estimate.
        yes: Do not ask.

    Raises:
        typer.Exit: it shall not.
    """
    if yes or seconds < LONG or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    question = f"This will take about {seconds / 60:.0f} minutes. Go on?"
    if not typer.confirm(question, default=True, err=True):
        typer.echo("nothing was done", err=True)
        raise typer.Exit(1)


def finish(app: Callable[..., Any]) -> NoReturn:
    """Run the commands of an app, to the end of the program; see the module for the exit codes."""
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):  # the latter: at a question
        code = 130
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        typer.secho(f"error: {one_line(error)}", fg="red", err=True)
    if code == 130:
        typer.echo("interrupted", err=True)
    sys.exit(code or 0)


def exit_code(error: Exception) -> int | None:
    """The exit code of an error that is no bug; None for one that is."""
    if hasattr(error, "format_message"):  # of the command line's parser
        return int(getattr(error, "exit_code", 2))
    missing = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    if isinstance(error, (ValueError, TypeError, *missing)):
        return 2
    if isinstance(error, (OSError, ModuleNotFoundError, MemoryError, FloatingPointError)):
        return 1
    if isinstance(error, RuntimeError):
        import torch

        from ..pipelines.seam.layouts import LayoutError

        if isinstance(error, LayoutError):
            return 2
        return 1 if isinstance(error, torch.OutOfMemoryError) else None
    return None


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    say = getattr(error, "format_message", None)
    text = str(error) if say is None else say()
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    context = getattr(error, "ctx", None)
    more = f" ('{context.command_path} --help' tells more)" if context is not None else ""
    return " ".join((text or type(error).__name__).split()) + more
