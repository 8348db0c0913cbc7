"""Attributes that a model's forward pass changes: put back after each call.

A count of calls, a hidden state, an activation kept for later: with them as they were given, the
model stays a function of its parameters and inputs, and no graph outlives its call.
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
    """The attributes of all modules, but what is registered: parameters, buffers, modules.

    >>> module = nn.Linear(1, 1)
    >>> before = attributes(module)
    >>> module.calls = 1
    >>> changed(before, module)
    {('', 'calls'): 1}
    """
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in _REGISTERED
    }


def changed(before: Mapping[Place, Any], model: nn.Module) -> dict[Place, Any]:
    """What has become of attributes that are not those of before, of modules that were there."""
    after, modules = attributes(model), {name for name, _ in before}
    return {
        place: after.get(place)
        for place in {**before, **after}
        if place[0] in modules and before.get(place, _NOT_THERE) is not after.get(place, _NOT_THERE)
    }


def put_back(before: Mapping[Place, Any], model: nn.Module, places: Iterable[Place]) -> None:
    """Give attributes the values of before; remove those that were not there."""
    for name, key in places:
        registered = vars(model.get_submodule(name))
        if (name, key) in before:
            registered[key] = before[name, key]
        else:
            registered.pop(key, None)


@contextmanager
def unchanged(model: nn.Module, places: Iterable[Place]) -> Iterator[None]:
    """Within it the model may change these attributes; afterwards they are as before."""
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
    """Whether values are such as a model keeps of a pass, not such as it counts."""
    return all(value is None or isinstance(value, Tensor) for value in values)
