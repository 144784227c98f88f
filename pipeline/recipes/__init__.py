"""Recipes: a name is enough to reproduce a run. One module per paper."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from pipeline import configure
from pipeline.config import Config, ConfigError
from pipeline.recipes import drnn, rc, rc_denoising, relaxed, reset
from pipeline.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    **drnn.RECIPES,
    **rc.RECIPES,
    **rc_denoising.RECIPES,
    **reset.RECIPES,
    **relaxed.RECIPES,
}


def list_recipes(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern such as `rc/*-short`, or hold a text such as `cifar10`.

    Those of a paper's table are in its order.
    """
    return fnmatch.filter(RECIPES, pattern) or [name for name in RECIPES if pattern in name]


def load(name_or_file: str, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a recipe, named or in a YAML file, with `key.path=value` overrides.

    Raises:
        ConfigError: neither a recipe nor a file, or a configuration that does not validate.
    """
    if name_or_file in RECIPES:
        base = RECIPES[name_or_file].config().model_dump(mode="json")
        return configure.build(base, overrides)
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        return configure.read(path, overrides)
    from pipeline.models.names import nearest  # with torch, which the list of recipes can spare

    close = nearest(name_or_file, RECIPES, cutoff=0.4)
    hint = f"did you mean {close!r}? " if close else ""
    raise ConfigError(
        f"{name_or_file!r} is neither a recipe, a YAML file nor a run: {hint}"
        "`reprise recipes` lists the recipes"
    )
