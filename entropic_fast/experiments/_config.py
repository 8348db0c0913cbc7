"""Presets: readable TOML files, checked against the sections, with overrides."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path as FilePath
from typing import Any

from .._utils import checks
from ..dynamics.projected_sgd import OPTIMIZERS
from ._sections import Config, LMCSection

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
    """A checked configuration from TOML's or JSON's values."""
    config: Config = _build(Config, document, "")
    _check(config)
    return config


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


def _build(cls: Any, document: Mapping[str, Any], where: str) -> Any:
    kinds = typing.get_type_hints(cls)
    if not isinstance(document, Mapping):
        raise checks.invalid(where or "configuration", "sections and keys", checks.shown(document))
    if cls is Config and not isinstance(document.get("preset"), str):
        raise checks.invalid("preset", "the preset's name", checks.shown(document.get("preset")))
    unknown = document.keys() - kinds.keys()
    if unknown:
        raise checks.invalid(
            f"{where}{sorted(unknown)[0]}", "one of " + ", ".join(kinds), "an unknown key"
        )
    return cls(**{k: _value(kinds[k], v, f"{where}{k}") for k, v in document.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise checks.invalid(where, "a section", checks.shown(value))
        return _build(kind, value, f"{where}.")
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            raise checks.invalid(where, "a list", checks.shown(value))
        if items[-1] is Ellipsis:
            return tuple(_value(items[0], v, where) for v in value)
        if len(items) != len(value):
            raise checks.invalid(where, f"a list of {len(items)}", checks.shown(value))
        return tuple(_value(k, v, where) for k, v in zip(items, value, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        name = kind.__name__ if not isinstance(kind, types.GenericAlias) else str(kind)
        raise checks.invalid(where, f"a value of type {name}", checks.shown(value))
    return value


# The least value of each number, where it is not 0.
_LEAST: dict[str, float] = {
    **dict.fromkeys(
        (
            "train.epochs",
            "train.batch_size",
            "path.steps",
            "path.batch_size",
            "curvature.probes",
            "curvature.spectrum_examples",
            "relax.batch_size",
            "relax.project_every",
            "relax.steps",
            "relax.replicas",
            "relax.start_every",
            "relax.batch_sizes",
            "relax.cycles",
            "relax.records",
            "force.batch_size",
            "force.cycles",
            "force.directions",
            "langevin.steps",
            "straight_line.batch_sizes",
            "straight_line.steps",
            "straight_line.replicas",
            "bad_minimum.epochs",
            "bad_minimum.batch_size",
            "bad_minimum.relax_batch_size",
            "bad_minimum.steps",
            "bad_minimum.replicas",
        ),
        1,
    ),
    "straight_line.epoch": -1,
    "path.dense_points": 2,
    "force.positions": 2,
    "force.replicas": 2,
    "langevin.particles": 2,
    "path.pivots": 3,
    "curvature.spectrum_points": 3,
    **dict.fromkeys(("lmc.points", "fig6.points", "fig7.points"), 3),
}
_POSITIVE = (
    "train.lr",
    "path.lrs",
    "curvature.tol",
    "relax.lrs",
    "relax.adam_lr_factor",
    "force.lr",
    "force.step",
    "straight_line.lr",
    "bad_minimum.lr",
    "bad_minimum.relax_lr",
    "langevin.temperature",
    "langevin.ridge_temperature",
    "langevin.dt",
)
_SETS = (  # lists of which every entry names a task or a curve, so none may come twice
    "path.pairs",
    "path.seeds",
    "relax.batch_sizes",
    "relax.lrs",
    "relax.optimizers",
    "force.cycles",
    "lmc.branch_epochs",
    "lmc.seeds",
    "fig6.branch_epochs",
    "fig6.seeds",
    "fig7.branch_epochs",
    "fig7.seeds",
    "straight_line.batch_sizes",
    "straight_line.starts",
    "bad_minimum.starts",
)
_MAY_BE_EMPTY = ("fig6.seeds", "fig7.seeds", "straight_line.batch_sizes")  # then there is no figure


def _check(config: Config) -> None:
    seeds = config.train.seeds
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise checks.invalid("train.seeds", "at least two different seeds", checks.shown(seeds))
    for pair in config.path.pairs:
        if pair[0] == pair[1] or not set(pair) <= set(seeds):
            raise checks.invalid(
                "path.pairs", f"two different seeds of {seeds}", checks.shown(pair)
            )
    if len(config.path.steps) != len(config.path.lrs) or not config.path.steps:
        raise checks.invalid(
            "path.steps",
            "as many cycles as path.lrs, at least one",
            f"{len(config.path.steps)} and {len(config.path.lrs)}",
        )
    flat = _flatten(config.to_dict())
    for key in _SETS:
        entries = [repr(entry) for entry in flat[key]]
        if not (entries or key in _MAY_BE_EMPTY) or len(set(entries)) < len(entries):
            raise checks.invalid(key, "at least one entry, and none twice", checks.shown(flat[key]))
    for key, value in flat.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                checks.at_least(key, number, _LEAST.get(key, 0))
                if key in _POSITIVE:
                    checks.positive(key, number)
    for key, starts in (
        ("relax.starts", config.relax.starts),
        ("relax.start", (config.relax.start,)),
        ("straight_line.starts", config.straight_line.starts),
        ("bad_minimum.starts", config.bad_minimum.starts),
    ):
        if any(start > 1 for start in starts):
            raise checks.invalid(key, "positions in [0, 1]", checks.shown(starts))
    checks.one_of("train.precision", config.train.precision, ("float32", "bfloat16"))
    for name in config.relax.optimizers:
        checks.one_of("relax.optimizers", name, OPTIMIZERS)
    for key in ("train.momentum", "path.momentum"):
        if flat[key] >= 1:
            raise checks.invalid(key, "a number in [0, 1)", checks.shown(flat[key]))
    for name in ("lmc", "fig6", "fig7"):
        section: LMCSection = getattr(config, name)
        epochs = section.epochs or config.train.epochs
        if section.seeds and max(section.branch_epochs) > epochs:
            raise checks.invalid(
                f"{name}.branch_epochs",
                f"at most {epochs} epochs",
                checks.shown([*section.branch_epochs]),
            )
    segments = config.path.pivots - 1
    for key in ("force.positions", "relax.start_every"):
        if flat[key] > segments:
            expected = f"at most the {segments} segments of a path of path.pivots"
            raise checks.invalid(key, expected, str(flat[key]))
    if config.path.max_pivots < config.path.pivots:
        raise checks.invalid(
            "path.max_pivots",
            f"at least path.pivots ({config.path.pivots})",
            str(config.path.max_pivots),
        )


def _flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
