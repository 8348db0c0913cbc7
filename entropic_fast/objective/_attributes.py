"""Attributes that a model's forward pass changes, restored after each call.

A count of calls, a hidden state, a cached activation: with them restored, the model stays a
function of its parameters and inputs, and no graph outlives its call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_REGISTERED = ("_parameters", "_buffers", "_modules")
_NOT_THERE = object()
Place = tuple[str, str]  # a module's name, and that of its attribute


def attributes(model: nn.Module) -> dict[Place, Any]:
    """The attributes of all modules, without registered parameters, buffers and modules."""
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in _REGISTERED
    }


def changed(before: Mapping[Place, Any], model: nn.Module) -> dict[Place, Any]:
    """Attributes that differ from `before`, with their present values."""
    after, modules = attributes(model), {name for name, _ in before}
    return {
        place: after.get(place)
        for place in {**before, **after}
        if place[0] in modules and before.get(place, _NOT_THERE) is not after.get(place, _NOT_THERE)
    }


def put_back(before: Mapping[Place, Any], model: nn.Module, places: Iterable[Place]) -> None:
    """Restore attributes; remove those that did not exist."""
    for name, key in places:
        registered = vars(model.get_submodule(name))
        if (name, key) in before:
            registered[key] = before[name, key]
        else:
            registered.pop(key, None)


@contextmanager
def unchanged(model: nn.Module, places: Iterable[Place]) -> Iterator[None]:
    """Within it the model may change these attributes; they are restored afterwards."""
    before = {}
    for name, key in places:
        registered = vars(model.get_submodule(name))
        if key in registered:
            before[name, key] = registered[key]
    try:
        yield
    finally:
        put_back(before, model, places)


def only_tensors(values: Iterable[Any]) -> bool:
    """Whether values are cached tensors, not counters."""
    return all(value is None or isinstance(value, Tensor) for value in values)
