"""`reprise` as launchers start it: several ranks that know of each other by their environment."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.jobs.command import PATIENCE

BIN = Path(sys.executable).parent
REPRISE = str(BIN / "reprise")
TORCHRUN = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python", "--")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(command: Sequence[object], folder: Path) -> "subprocess.Popen[str]":
    """A command in a folder, as from a shell in which nobody has started ranks."""
    kept = {k: v for k, v in os.environ.items() if k not in (*LAUNCHERS, "MLFLOW_TRACKING_URI")}
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: "subprocess.Popen[str]", status: int) -> None:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, output
