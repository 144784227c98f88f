"""What a recipe is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config import Config


@dataclass(frozen=True)
class Recipe:
    """A named function that returns a complete configuration."""

    config: Callable[[], Config]
    about: str
    reported: str = ""  # the paper's own figure, with its source; empty where it has none
