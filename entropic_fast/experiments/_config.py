"""Presets: TOML files, checked against the sections, with overrides."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .._utils import checks
from ._sections import Config, Section, as_tuples, schema

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib


def presets() -> tuple[str, ...]:
    """Names of the presets that ship with the package.

    >>> presets()
    ('demo', 'paper', 'small')
    """
    folder = resources.files(__package__) / "presets"
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml")))


def load_preset(name: str, overrides: Iterable[str] = ()) -> Config:
    """A preset with `section.key=value` overrides (values in TOML's syntax).

    Args:
        name: of a preset that comes with the package, or the path of a file `<name>.toml`.
        overrides: of its values.

    Raises:
        ValueError: an unknown preset, section or key, or a value of another type.
        OSError: a file that cannot be read.

    >>> load_preset("demo", ["train.epochs=3"]).train.epochs
    3
    """
    file = FilePath(name)
    if file.suffix == ".toml":
        text, name = file.read_text(encoding="utf-8"), file.stem
    else:
        if name not in presets():
            known = ", ".join(map(repr, presets()))
            raise checks.invalid("preset", f"one of {known}, or a .toml file", checks.shown(name))
        source = resources.files(__package__) / "presets" / f"{name}.toml"
        text = source.read_text(encoding="utf-8")
    try:
        document = {**tomllib.loads(text), "preset": name}
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise checks.invalid(f"--preset {file}", "TOML", f"another text ({error})") from error
    return _overridden(document, overrides)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A configuration with overrides, as `load_preset` takes them."""
    return _overridden(config.to_dict(), overrides)


def _overridden(document: dict[str, Any], overrides: Iterable[str]) -> Config:
    for override in overrides:
        _apply(document, override)
    return from_dict(document)


def from_dict(document: Mapping[str, Any]) -> Config:
    """A checked configuration from the values of a TOML or JSON document."""
    if not isinstance(document, Mapping):
        raise checks.invalid("configuration", "sections and keys", checks.shown(document))
    if not isinstance(document.get("preset"), str):
        raise checks.invalid("preset", "the preset's name", checks.shown(document.get("preset")))
    try:
        config = schema().model_validate(as_tuples(document))
    except ValidationError as error:
        raise _readable(error.errors()[0], document) from None
    for section in config.sections():
        section.check(config)
    return config


_TYPES = {"string_type": "str", "int_type": "int", "float_type": "float", "bool_type": "bool"}


def _readable(error: ErrorDetails, document: Mapping[str, Any]) -> ValueError:
    """The first error of pydantic in the form of all others: option, expected, got, what to do."""
    kind, facts, place = error["type"], error.get("ctx", {}), error["loc"]
    keys = [str(key) for key in place if not isinstance(key, int)]
    name = ".".join(keys)
    if kind == "extra_forbidden":
        section = Section.registered[keys[0]] if len(keys) > 1 else schema()
        return checks.invalid(name, "one of " + ", ".join(section.model_fields), "an unknown key")
    if kind == "rejected":
        return checks.invalid(name, facts["expected"], facts["got"], facts["do"])
    if kind == "missing":  # an entry of a pair
        place = place[:-1]
    expected = {
        "model_type": "a section",
        "tuple_type": "a list",
        "missing": "a list of 2",
        "too_long": f"a list of {facts.get('max_length')}",
        "greater_than_equal": f"a finite number of at least {facts.get('ge', 0):g}",
        "greater_than": f"a finite number above {facts.get('gt', 0):g}",
        "less_than": f"a number in [0, {facts.get('lt', 0):g})",
        "finite_number": "a finite number",
        "literal_error": "one of " + str(facts.get("expected")).replace(" or ", ", "),
    }.get(kind, f"a value of type {_TYPES.get(kind, kind)}")
    value: Any = document
    for key in place:
        value = value[key]
    return checks.invalid(name, expected, checks.shown(value))


def differences(stored: Config, asked: Config) -> list[str]:
    """Lines `section.key: stored -> asked` for all that differs."""
    return changed_values(stored.to_dict(), asked.to_dict())


def changed_values(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Lines `section.key: stored -> asked` for all that differs between two documents.

    >>> changed_values({"path": {"pivots": 5}, "seed": 0}, {"path": {"pivots": 9}, "seed": 0})
    ['path.pivots: 5 -> 9']
    """
    before, after = _flatten(stored), _flatten(asked)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _apply(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise checks.invalid("--set", "section.key=value", checks.shown(override))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
    *sections, last = key.strip().split(".")
    if not last or key.strip() == "preset":
        raise checks.invalid(
            "--set", "section.key=value", checks.shown(override), "use --preset for presets"
        )
    target = document
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise checks.invalid("--set", "section.key=value", checks.shown(override))
    target[last] = value


def _flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
