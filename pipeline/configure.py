"""A configuration from a file or from nested values, with overrides; in words, what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config, ConfigError


def build(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """A configuration from nested values and `key.path=value` overrides.

    Raises:
        ConfigError: an unknown key (the nearest is suggested), a wrong type or value.
    """
    merged = _copy(values)
    for override in overrides:
        _apply(merged, override)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def read(path: Path, overrides: Iterable[str] = ()) -> Config:
    """A configuration from a YAML file."""
    try:
        values = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no configuration: give `key: value` lines")
    try:
        return build(values, overrides)
    except ConfigError as error:
        if overrides:
            raise  # the key that it names may be one of theirs
        raise ConfigError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice: keep one", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    *parents, last = key.split(".")
    node = values
    for number, parent in enumerate(parents):
        if node.get(parent) is None:  # absent, or a section that is left out
            node[parent] = {}
        child = node[parent]
        if isinstance(child, list) and all(isinstance(entry, dict) for entry in child):
            _apply_to_entry(child, ".".join([*parents[number + 1 :], last]), text, override)
            return
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None


def _apply_to_entry(entries: list[dict[str, Any]], key: str, text: str, override: str) -> None:
    """`phases.1.steps=10`: the entries of a list of sections are named by their numbers, from 0."""
    number, _, rest = key.partition(".")
    if not number.isdecimal() or int(number) >= len(entries) or not rest:
        raise ConfigError(
            f"override {override!r}: {number!r} is not one of the {len(entries)} entries, which "
            "are numbered from 0"
        )
    _apply(entries[int(number)], f"{rest}={text}")


def _explain(error: ValidationError) -> str:
    """All problems on one line, each with the key and the cure."""
    parts = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r}{_nearest(problem['loc'])}")
        elif problem["type"] == "missing":
            parts.append(f"{key} is missing: give {key}=VALUE")
        else:
            where = f"{key}={problem['input']!r}: " if _is_plain(problem["input"]) else f"{key}: "
            of = where if key else ""  # a problem of several sections names them itself
            parts.append(of + problem["msg"].removeprefix("Value error, "))
    return "; ".join(parts)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)


def _nearest(location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = Config
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        if field is None:  # an entry of a list or a dictionary of sections
            continue
        kinds = (field.annotation, *get_args(field.annotation))
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is None:
            return ""
        section = inner
    valid = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), valid, n=1)
    prefix = "".join(f"{part}." for part in location[:-1])
    if close:
        return f": did you mean {prefix + close[0]!r}?"
    return f"; valid here: {', '.join(prefix + name for name in valid)}"
