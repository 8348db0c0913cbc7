"""Weights and data in files: safetensors, and what `torch.save` wrote without pickled objects."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .._utils import checks
from ..objective import as_real, plain_name, wrapped_name

_SHOWN = 3  # names of each kind listed in a message
_HOLDERS = ("state_dict", "model_state_dict", "model", "net")  # of checkpoints
_PREFIXES = ("module.", "_orig_mod.", "model.")
# Begins a file of `torch.save` from before torch 1.6: a pickled magic number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Copy parameters and buffers from a file into a model of that architecture.

    The file is safetensors, or a state dict as `torch.save` writes it (.pt, .pth), which is read
    with `weights_only=True`: no code in it runs. The state dict may be inside a checkpoint, under
    "state_dict", "model_state_dict", "model" or "net".

    Names are those of `model.state_dict()` or, as in the minima of a run, parameter/<name> and
    buffer/<name>. The prefixes of wrappers ("module.", "_orig_mod.", "model.", and combinations)
    do not matter. The file may hold one of several tied tensors, and need not hold
    `num_batches_tracked`. Floating-point values are converted to the model's dtype.

    Raises:
        ValueError: another kind of file, or one with pickled objects; names or shapes that are
            not the model's; values that are NaN or infinite. The model is then unchanged.
        OSError: a file that cannot be read.

    >>> import tempfile
    >>> net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model": nn.ModuleDict({"module": net}).state_dict()}, f"{folder}/a.pt")
    ...     load_weights(other, f"{folder}/a.pt")
    >>> torch.equal(net.weight, other.weight)
    True
    """
    argument = f"weights {file}"
    stored = _plain_names(_state_dict(_read(file, argument), argument))
    while (inside := wrapped_name(model)) is not None:
        model = getattr(model, inside)
    state = model.state_dict(keep_vars=True)
    full = {plain_name(model, name): name for name, v in state.items() if isinstance(v, Tensor)}
    own = {name: state[there] for name, there in full.items()}
    renamed = _renamed(stored, own)
    problems = [*_misnamed(renamed, own), *_misshapen(renamed, own)]
    if problems:
        raise checks.invalid(
            argument,
            f"those of this model ({type(model).__name__}, {len(own)} tensors)",
            f"{len(stored)} tensors of another: {'; '.join(problems)}",
            "save model.state_dict() of the model that the factory builds",
        )
    for name, value in renamed.items():
        if value.is_floating_point() or value.is_complex():
            checks.finite(f"{argument}, {name}", as_real(value))
    model.load_state_dict({full[name]: value for name, value in renamed.items()}, strict=False)


def read_tensors(file: str | Path, argument: str) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU.

    Raises:
        ValueError: a file of another kind, or with anything but tensors in it.
        OSError: a file that cannot be read.
    """
    return _tensors(_read(file, argument), argument)


def _read(file: str | Path, argument: str) -> Any:
    """The content of a file: tensors and plain containers only."""
    with Path(file).open("rb") as opened:
        legacy = opened.read(len(_LEGACY)) == _LEGACY
    if legacy or zipfile.is_zipfile(file):
        return _read_torch(file, argument)
    try:
        return safetensors.torch.load(Path(file).read_bytes())
    except safetensors.SafetensorError as error:
        raise checks.invalid(
            argument,
            "a safetensors file, or a state dict written by torch.save",
            f"another kind of file ({error})",
            "write one with safetensors.torch.save_file or torch.save(model.state_dict(), file)",
        ) from error


def _read_torch(file: str | Path, argument: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types; only OSError is more specific
        if isinstance(error, OSError):
            raise
        said = next((line for line in str(error).splitlines() if line.strip()), "")[:160]
        if type(error).__name__ == "UnpicklingError":  # torch would advise to run them
            said = "it holds pickled objects"
        raise checks.invalid(
            argument,
            "tensors that torch.load(weights_only=True) reads",
            f"a file that it does not: {type(error).__name__}: {said}",
            "save the tensors alone, torch.save(model.state_dict(), file): reading pickled objects "
            "or TorchScript would run the code in them",
        ) from error


def _state_dict(found: Any, argument: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint."""
    holders: list[str] = []
    while isinstance(found, Mapping):
        inside = [key for key in _HOLDERS if isinstance(found.get(key), Mapping)]
        if len(inside) > 1:
            raise checks.invalid(
                argument,
                "one state dict",
                f"several, under {', '.join(map(repr, inside))}",
                "save the one to use by itself",
            )
        if not inside:
            break
        holders += inside
        found = found[inside[0]]
    return _tensors(found, f"{argument}, {'/'.join(holders)}" if holders else argument)


def _tensors(found: Any, argument: str) -> dict[str, Tensor]:
    """A mapping of names to tensors, without the extra state of modules."""
    if isinstance(found, Mapping):
        kept = {n: v for n, v in found.items() if not str(n).endswith("_extra_state")}
        if all(isinstance(n, str) and isinstance(v, Tensor) for n, v in kept.items()):
            return {name: value.detach() for name, value in kept.items()}
    raise checks.invalid(
        argument,
        "a state dict (tensors by name), alone or under " + ", ".join(map(repr, _HOLDERS)),
        checks.describe(found),
        "save model.state_dict()",
    )


# -- names ----------------------------------------------------------------------------------


def _plain_names(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that the minima of a run have."""
    if stored and all(name.split("/")[0] in ("parameter", "buffer") for name in stored):
        return {name.partition("/")[2]: value for name, value in stored.items()}
    return dict(stored)


def _renamed(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors by the model's own names, or by those of which the fewest differ."""
    best, fewest = dict(stored), len(stored) + len(own)
    if "n_averaged" in stored and "n_averaged" not in own:  # a count that AveragedModel keeps
        stored = {name: value for name, value in stored.items() if name != "n_averaged"}
    for theirs in _without_prefixes(stored):
        for ours in _without_prefixes(own):
            back = {plain: name for name, plain in ours.items()}
            found = {back.get(plain, plain): stored[name] for name, plain in theirs.items()}
            differing = len(_missing(found, own)) + len(found.keys() - own.keys())
            if differing < fewest:
                best, fewest = found, differing
    return best


def _without_prefixes(names: Collection[str]) -> Iterator[dict[str, str]]:
    """Names to names without one, two, ... prefixes of wrappers, finally without inner ones."""
    plain = {name: name for name in names}
    while True:
        yield plain
        prefix = next((p for p in _PREFIXES if all(n.startswith(p) for n in plain.values())), None)
        if prefix is None or not plain:
            break
        plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    inner = {
        name: ".".join(part for part in short.split(".") if part not in ("module", "_orig_mod"))
        for name, short in plain.items()
    }
    if inner != plain and len(set(inner.values())) == len(inner):
        yield inner


def _missing(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    given = {_storage(own[name]) for name in stored if name in own}
    return [
        name
        for name, value in own.items()
        if name not in stored
        and _storage(value) not in given
        # An unused count, which torch 0.4 and older did not keep.
        and name.rpartition(".")[2] != "num_batches_tracked"
    ]


def _misnamed(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    unknown = [name for name in stored if name not in own]
    return [*_some(_missing(stored, own), "missing"), *_some(unknown, "unknown")]


def _some(names: list[str], what: str) -> list[str]:
    if not names:
        return []
    if len(names) == 1:
        return [f"{names[0]} is {what}"]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{', '.join(names[:_SHOWN])}{more} are {what}"]


def _storage(value: Tensor) -> tuple[object, ...]:
    """Equal for tied tensors; empty tensors are never tied."""
    return (value.data_ptr(), value.shape) if value.numel() else (id(value),)


def _misshapen(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    found = [
        f"{name} is {checks.describe(stored[name])}, not {checks.describe(own[name])}"
        for name in own
        if name in stored
        and (
            stored[name].shape != own[name].shape
            or stored[name].is_floating_point() != own[name].is_floating_point()
            or stored[name].is_complex() != own[name].is_complex()
        )
    ]
    more = [f"and {len(found) - _SHOWN} more of other shapes"] if len(found) > _SHOWN else []
    return found[:_SHOWN] + more
