"""A user's own model and data, by their names on the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

from .._utils import checks
from ..training.data import NAMES, ImageData, load
from ._weight_files import read_tensors

T = TypeVar("T")


def model_from(reference: str, argument: str = "model") -> nn.Module:
    """The model that a factory returns.

    Args:
        reference: "MODULE:FACTORY", a module by name (installed, or in the current folder) or the
            path of a .py file, and in it a callable without arguments.
        argument: what messages call it.

    Raises:
        ValueError: another form; a module that is not there or fails to import; a factory that
            is not there, cannot be called without arguments, fails, or returns no `nn.Module`.

    >>> model_from("torch.nn:Identity")
    Identity()
    """
    model = _made(reference, argument)
    if not isinstance(model, nn.Module):
        raise checks.invalid(
            argument,
            f"an nn.Module from {reference}",
            checks.describe(model),
            "return the model itself",
        )
    return model


def data_from(source: str, data_dir: str | Path | None = None, argument: str = "data") -> Any:
    """Data as `Objective` takes them.

    Args:
        source: "digits", "cifar10" or "cifar100" (the training set); a folder of
            train/<class>/* and test/<class>/*; a .safetensors, .pt or .pth file with tensors
            `inputs` and `targets`; or "MODULE:FACTORY", which returns (inputs, targets), a
            Dataset, batches, or an `ImageData`.
        data_dir: of images, as for `data.load`.
        argument: what messages call it.

    Raises:
        ValueError: none of these; as `model_from` for a factory.

    >>> inputs, targets = data_from("digits")
    >>> tuple(inputs.shape), tuple(targets.shape)
    ((1437, 1, 8, 8), (1437,))
    """
    if data_dir is not None or source in NAMES:
        return load(source, data_dir)[0].tensors()
    if source.endswith((".safetensors", ".pt", ".pth")):
        return _inputs_and_targets(source, argument)
    if Path(source).is_dir():
        return load(Path(source).resolve().name, source)[0].tensors()
    if ":" not in source:
        raise checks.invalid(
            argument,
            "one of " + ", ".join(map(repr, NAMES)) + ", a folder of train/<class>/* and "
            "test/<class>/*, a .safetensors, .pt or .pth file, or MODULE:FACTORY",
            checks.shown(source),
            "check the name",
        )
    data = _made(source, argument)
    return data.tensors() if isinstance(data, ImageData) else data


def _inputs_and_targets(file: str, argument: str) -> tuple[Tensor, Tensor]:
    tensors = read_tensors(file, f"{argument} {file}")
    if not {"inputs", "targets"} <= tensors.keys():
        raise checks.invalid(
            f"{argument} {file}",
            "tensors `inputs` and `targets`",
            ", ".join(sorted(tensors)) or "none",
        )
    return tensors["inputs"], tensors["targets"]


# -- what a factory returns -----------------------------------------------------------------


def _made(reference: str, argument: str) -> Any:
    """Call the factory at MODULE:FACTORY."""
    place, colon, name = reference.rpartition(":")
    if not (colon and place and name):
        raise checks.invalid(
            argument,
            "MODULE:FACTORY, as mynet:build or path/to/mynet.py:build",
            checks.shown(reference),
        )
    module = _file(Path(place), argument) if place.endswith(".py") else _named(place, argument)
    factory = _attribute(module, place, name, argument)
    return _run(argument, f"{reference} to return", factory)


def _named(name: str, argument: str) -> ModuleType:
    _make_findable(Path.cwd())

    def imported() -> ModuleType | None:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:  # of this one, or of one that it imports?
            if error.name and f"{name}.".startswith(f"{error.name}."):
                return None
            raise

    module = _run(argument, f"{name} to import", imported)
    if module is None:
        raise checks.invalid(
            argument,
            "a module that can be imported",
            f"{name!r}, which is neither installed nor in {Path.cwd()}",
            "check the name, or give the path of a .py file",
        )
    return module


def _file(file: Path, argument: str) -> ModuleType:
    """Import a file once, even if both a model and its data are in it."""
    file = file.expanduser().resolve()
    if not file.is_file():
        raise checks.invalid(argument, "a .py file", f"{file}, which is none", "check the path")
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # as it ends in .py
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    _make_findable(file.parent)
    sys.modules[name] = module  # dataclasses look up their module
    try:
        _run(argument, f"{file} to import", lambda: loader.exec_module(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_findable(folder: Path) -> None:
    """Let a script import its neighbors, as if Python itself ran it."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def _attribute(module: ModuleType, place: str, name: str, argument: str) -> Callable[[], Any]:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise checks.invalid(
                argument,
                f"a name in {place}",
                f"{name!r}, which is not there",
                "callable there: " + (", ".join(there[:12]) or "nothing"),
            )
        found = getattr(found, part)
    what = "a callable without arguments"
    if isinstance(found, nn.Module) or not callable(found):
        raise checks.invalid(
            argument, what, checks.describe(found), "name a function that returns it"
        )
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise checks.invalid(
            argument,
            what,
            f"{name}{inspect.signature(found)} ({error})",
            "name a function of your own that passes them",
        ) from error
    except ValueError:  # built in, without a signature
        pass
    return found  # type: ignore[no-any-return]


def _run(argument: str, what: str, code: Callable[[], T]) -> T:
    """Run the user's own code; report its errors with their line."""
    try:
        return code()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise checks.invalid(
            argument, what, f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        ) from error
