"""Cluster profiles: what a site's SLURM must be told, in a YAML file for each cluster."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import ConfigError

OURS = Path(__file__).resolve().parent.parent / "slurm" / "clusters"
LOCAL = "local"  # no SLURM: submitit's local executor, on this machine


class Profile(BaseModel):
    """One cluster. What is None is left to the site's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = Field(default=0, ge=0, description="0: without GPUs, one rank a node")
    cpus_per_gpu: int = Field(default=1, gt=0)
    environment: dict[str, str] = {}
    setup: tuple[str, ...] = Field(default=(), description="shell lines before the ranks start")
    signal_delay_s: int = Field(
        default=120, gt=0, description="before the time limit, when the ranks are told to save"
    )
    shared: Path | None = Field(default=None, description="folder that all nodes see")
    sbatch: dict[str, str | int] = Field(default={}, description="further options of sbatch")

    @property
    def is_local(self) -> bool:
        return self.name == LOCAL


def own_folder() -> Path:
    """Where a user's profiles lie; one of the same name goes before ours."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "reprise" / "clusters"


def load(name: str | None) -> Profile:
    """The profile of this name; without one, this machine, if it has no SLURM.

    Raises:
        ConfigError: there is none, or what it says cannot be used.
    """
    slurm = shutil.which("sbatch") is not None
    if name is None and slurm:
        raise ConfigError(f"which cluster? give --cluster with one of {_listed()}")
    if name in (None, LOCAL):
        return Profile(name=LOCAL)
    for file in _files():
        if file.stem == name:
            return _read(file)
    close = difflib.get_close_matches(str(name), _names(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(
        f"there is no cluster {name!r}: {hint}give one of {_listed()}, or write "
        f"{own_folder() / f'{name}.yaml'}"
    )


def _read(file: Path) -> Profile:
    try:
        values = yaml.safe_load(file.read_text()) or {}
        return Profile(**{"name": file.stem} | values)
    except ValidationError as error:
        raise ConfigError(f"{file}: {'; '.join(_problems(error))}") from None
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"cannot read {file}: {' '.join(str(error).split())}") from None


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key, Profile.model_fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else ", ".join(Profile.model_fields)
            yield f"unknown key {key!r}: {hint}"
        else:
            yield f"{key}={problem['input']!r}: {problem['msg']}"


def _files() -> list[Path]:
    return [*sorted(own_folder().glob("*.yaml")), *sorted(OURS.glob("*.yaml"))]


def _names() -> list[str]:
    return [LOCAL, *dict.fromkeys(file.stem for file in _files())]


def _listed() -> str:
    return ", ".join(_names())


def minutes(text: str) -> int:
    """`90m`, `24h` or `2d` as minutes.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"([1-9]\d*)([mhd])", text)
    if found is None:
        raise ConfigError(f"--time {text!r} is no time: give such as 90m, 24h or 2d")
    return int(found[1]) * {"m": 1, "h": 60, "d": 24 * 60}[found[2]]
