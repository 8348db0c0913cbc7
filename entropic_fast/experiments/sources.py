"""A user's own model, weights and data, from what a command line names."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .. import checks
from ..data import NAMES, ImageData, load

T = TypeVar("T")
_SHOWN = 3  # names listed in a message


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
        raise checks.fail(
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
            train/<class>/* and test/<class>/*; a .safetensors file with tensors `inputs` and
            `targets`; or "MODULE:FACTORY", which returns (inputs, targets), a Dataset, batches,
            or an `ImageData`.
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
    if source.endswith(".safetensors"):
        return _inputs_and_targets(source, argument)
    if Path(source).is_dir():
        return load(Path(source).resolve().name, source)[0].tensors()
    if ":" not in source:
        raise checks.fail(
            argument,
            "one of " + ", ".join(map(repr, NAMES)) + ", a folder of train/<class>/* and "
            "test/<class>/*, a .safetensors file, or MODULE:FACTORY",
            repr(source),
            "check the name",
        )
    data = _made(source, argument)
    return data.tensors() if isinstance(data, ImageData) else data


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Copy parameters and buffers from a safetensors file into a model of that architecture.

    Names are those of `model.state_dict()` or, as in the minima of a run, parameter/<name> and
    buffer/<name>. Of tied tensors the file may hold one. Floating-point values are converted to
    the model's dtype.

    Raises:
        ValueError: another kind of file (pickles are never read); names or shapes that are not
            the model's; values that are NaN or infinite. The model is then unchanged.
        OSError: a file that cannot be read.

    >>> import tempfile
    >>> import torch
    >>> net, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors.torch.save_file(net.state_dict(), f"{folder}/a.safetensors")
    ...     load_weights(other, f"{folder}/a.safetensors")
    >>> torch.equal(net.weight, other.weight)
    True
    """
    stored = _plain_names(_read(file, f"weights {file}"))
    state = model.state_dict(keep_vars=True)
    own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    problems = [*_misnamed(stored, own), *_misshapen(stored, own)]
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise checks.fail(
            f"weights {file}",
            f"those of this model ({type(model).__name__}, {len(own)} tensors)",
            f"{len(stored)} tensors of another: {'; '.join(problems[:_SHOWN])}{more}",
            _advice(stored, own),
        )
    for name, value in stored.items():
        if value.is_floating_point():
            checks.finite(f"weights {file}, {name}", value)
    model.load_state_dict(stored, strict=False)


# -- weights and data in files --------------------------------------------------------------


def _read(file: str | Path, argument: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(Path(file).read_bytes())
    except safetensors.SafetensorError as error:
        raise checks.fail(
            argument,
            "a safetensors file",
            f"another kind of file ({error})",
            "write one with safetensors.torch.save_file; pickles (.pt, .pth, .ckpt) are not read, "
            "because reading one runs what is in it",
        ) from error
    return tensors


def _plain_names(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the kind that the minima of a run put before them."""
    if stored and all(name.split("/")[0] in ("parameter", "buffer") for name in stored):
        return {name.partition("/")[2]: value for name, value in stored.items()}
    return dict(stored)


def _misnamed(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    given = {_storage(own[name]) for name in stored if name in own}
    missing = [n for n, v in own.items() if n not in stored and _storage(v) not in given]
    unknown = [name for name in stored if name not in own]
    return [f"{n} is missing" for n in missing] + [f"{n} is unknown" for n in unknown]


def _storage(value: Tensor) -> tuple[object, ...]:
    """The same for tied tensors; tensors without content are never tied."""
    return (value.data_ptr(), value.shape) if value.numel() else (id(value),)


def _misshapen(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} is {checks.describe(stored[name])}, not {checks.describe(own[name])}"
        for name in own
        if name in stored
        and (
            stored[name].shape != own[name].shape
            or stored[name].is_floating_point() != own[name].is_floating_point()
        )
    ]


def _advice(stored: Iterable[str], own: Iterable[str]) -> str:
    for prefix in ("module.", "_orig_mod.", "model."):
        if {name.removeprefix(prefix) for name in stored} == set(own):
            return f"the names begin with {prefix!r}: save the state_dict of the module inside"
    return "save model.state_dict() of the model that the factory builds"


def _inputs_and_targets(file: str, argument: str) -> tuple[Tensor, Tensor]:
    tensors = _read(file, f"{argument} {file}")
    if not {"inputs", "targets"} <= tensors.keys():
        raise checks.fail(
            f"{argument} {file}",
            "tensors `inputs` and `targets`",
            ", ".join(sorted(tensors)) or "none",
        )
    return tensors["inputs"], tensors["targets"]


# -- what a factory returns -----------------------------------------------------------------


def _made(reference: str, argument: str) -> Any:
    """What the factory at MODULE:FACTORY returns."""
    place, colon, name = reference.rpartition(":")
    if not (colon and place and name):
        raise checks.fail(
            argument, "MODULE:FACTORY, as mynet:build or path/to/mynet.py:build", repr(reference)
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
        raise checks.fail(
            argument,
            "a module that can be imported",
            f"{name!r}, which is neither installed nor in {Path.cwd()}",
            "check the name, or give the path of a .py file",
        )
    return module


def _file(file: Path, argument: str) -> ModuleType:
    """The module of a file; run once, though a model and its data may both be in it."""
    file = file.expanduser().resolve()
    if not file.is_file():
        raise checks.fail(argument, "a .py file", f"{file}, which is none", "check the path")
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # as it ends in .py
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    _make_findable(file.parent)
    sys.modules[name] = module  # dataclasses, for one, look their module up
    try:
        _run(argument, f"{file} to import", lambda: loader.exec_module(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_findable(folder: Path) -> None:
    """What lies beside a script can be imported, as if Python itself ran it."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def _attribute(module: ModuleType, place: str, name: str, argument: str) -> Callable[[], Any]:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise checks.fail(
                argument,
                f"a name in {place}",
                f"{name!r}, which is not there",
                "callable there: " + (", ".join(there[:12]) or "nothing"),
            )
        found = getattr(found, part)
    what = "a callable without arguments"
    if isinstance(found, nn.Module) or not callable(found):
        raise checks.fail(argument, what, checks.describe(found), "name a function that returns it")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise checks.fail(
            argument,
            what,
            f"{name}{inspect.signature(found)} ({error})",
            "name a function of your own that passes them",
        ) from error
    except ValueError:  # built in, without a signature
        pass
    return found  # type: ignore[no-any-return]


def _run(argument: str, what: str, code: Callable[[], T]) -> T:
    """What the user's own code returns; its errors with the line they come from."""
    try:
        return code()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise checks.fail(
            argument,
            what,
            f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})",
        ) from error
