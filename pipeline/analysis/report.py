"""The report of a run: one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from data_prep.manifest import write_atomically
from pipeline import evaluate
from pipeline.run_directory import RunDirectory


def write(directory: RunDirectory) -> Path:
    """Write the page of a run into its directory.

    Raises:
        ConfigError: this is not a run directory.
    """
    from jinja2 import Environment, PackageLoader

    config = directory.read_config()
    folders = sorted(path.parent for path in directory.evaluation.glob(f"*/{evaluate.SUMMARY}"))
    environment = Environment(loader=PackageLoader("pipeline", "analysis"), autoescape=True)
    page = environment.get_template("report.html").render(
        run=directory.path.resolve().name,
        config=config,
        evaluations={folder.name: evaluate.load(folder)[0] for folder in folders},
    )
    write_atomically(directory.report, page.encode())
    return directory.report
