"""Types and options that several commands of `reprise` have in common."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = click.Path(file_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)
QUIET = click.option("--quiet", is_flag=True, help="Warnings, errors and results only.")
