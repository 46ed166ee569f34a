"""``python -m examples.studies.analytic``: see `study`."""

import typer

from examples.studies.analytic.study import command

typer.run(command)
