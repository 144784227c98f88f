"""Types and options that several commands of `reprise` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class _Run(click.ParamType):
    """A run directory, by its path or by its name below `runs/`."""

    name = "run"

    def convert(self, value: Any, parameter: Any, context: Any) -> Path:
        from jobs import runs

        return runs.find(str(value), Path("runs"))


RUN = _Run()
FOLDER = click.Path(file_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)
QUIET = click.option("--quiet", is_flag=True, help="Warnings, errors and results only.")
