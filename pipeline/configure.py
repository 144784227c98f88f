"""A configuration from a file or from nested values, with overrides; in words, what is wrong."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.config import Config, ConfigError

NEAR = 0.7  # of 1, how alike an unknown key and the one that is meant are


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
    return "; ".join(map(_in_words, error.errors()))


def _in_words(problem: ErrorDetails) -> str:
    kind, location = problem["type"], tuple(p for p in problem["loc"] if p != "[key]")
    key = ".".join(map(str, location))
    place = _Place.of(location)
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{_nearest(location)}"
    if kind == "missing" and isinstance(location[-1], int):
        return f"{key.rpartition('.')[0]}: {place.as_many_entries(place.entries[:-1])}"
    if kind == "missing":
        return f"{key} is missing: give {key}=VALUE"
    if kind == "too_long":
        return f"{key}: {place.as_many_entries(place.entries)}"
    value = problem["input"]
    of = f"{key}={_shown(value)}: " if _is_plain(value) else f"{key}: "
    if kind == "model_type" and place.section:
        keys = place.section.model_fields
        first = min(keys, key=lambda name: not keys[name].is_required())
        return f"{of}a section, give its keys: such as {key}.{first}=VALUE, of {', '.join(keys)}"
    if kind in ("tuple_type", "dict_type") and place.example and not place.entries:
        return f"{of}give {'a list ' if kind == 'tuple_type' else ''}such as {_flow(place.example)}"
    said = problem["msg"].removeprefix("Value error, ")
    if kind == "float_parsing" and place.field and place.field.description:
        said += f" ({place.field.description})"
    return (of if key else "") + said  # a problem of several sections names them itself


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)


def _shown(value: Any) -> str:
    """A plain value, with YAML's words for what has other ones in Python."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).strip()


@dataclass(frozen=True)
class _Place:
    """Where a location leads: to a section, or to a field and to entries within its value."""

    section: type[BaseModel] | None
    field: FieldInfo | None = None
    entries: tuple[int | str, ...] = ()

    @classmethod
    def of(cls, location: tuple[int | str, ...]) -> _Place:
        place = cls(Config)
        for part in location:
            fields = place.section.model_fields if place.section else {}
            field = fields.get(str(part))
            if field is None:  # an entry of a list or a dictionary, whose entries may be sections
                place = replace(place, entries=(*place.entries, part))
                continue
            kinds = (field.annotation, *get_args(field.annotation))
            sections = (k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
            place = cls(next(sections, None), field)
        return place

    @property
    def example(self) -> Any:
        """A value of the field, None where none is known."""
        if self.field is None:
            return None
        return self.field.examples[0] if self.field.examples else self.field.default

    def as_many_entries(self, entries: tuple[int | str, ...]) -> str:
        """What to give where the list at these entries of the field is too long or too short."""
        example = self.example
        for _ in entries:
            example = example[0]
        return f"give {len(example)} entries: such as {_flow(example)}"


def _nearest(location: tuple[int | str, ...]) -> str:
    section = _Place.of(location[:-1]).section
    if section is None:
        return ""
    valid = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=NEAR)
    prefix = "".join(f"{part}." for part in location[:-1])
    if close:
        return f": did you mean {prefix + close[0]!r}?"
    return f"; valid here: {', '.join(prefix + name for name in valid)}"
