"""Caches of facts about an architecture, common to all objectives whose models have it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.modules import module as _modules

from .._torch.architecture_key import Key, key_of
from ._parameters import model_lock

if TYPE_CHECKING:
    from ._functional_model import FunctionalModel

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """The most recently used values by key; threads may share it.

    >>> kept = LRUCache(1)
    >>> kept.put(("a",), 1), kept.put(("b",), 2), kept.put(None, 3)
    (None, None, None)
    >>> kept.get(("a",)), kept.get(("b",)), kept.get(None)
    (None, 2, None)
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()
        _kept.append(self)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key | None) -> Value | None:
        """The value of a key, or None."""
        with self._lock:
            if key is None or key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: Key | None, value: Value) -> None:
        """Keep a value; nothing happens without a key."""
        if key is None:
            return
        with self._lock:
            self._values[key] = value
            while len(self._values) > self.most:
                self._values.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


_kept: list[LRUCache[Any]] = []


def forget() -> None:
    """Empty all caches."""
    for kept in _kept:
        kept.clear()


def objective_key(
    obj: FunctionalModel, *things: Any, constants: list[Tensor] | None = None
) -> Key | None:
    """The key of an objective's model and output reader, independent of theta and buffer values.

    Args:
        things: what counts besides.
        constants: as `key_of`.
    """
    model, names, reader = obj.module, set(obj.parameter_names), obj._reader
    with model_lock(model):  # a thread that runs the model replaces its parameters
        named = list(model.named_parameters())
        given = [p for name, p in named if name in names]
        return key_of(
            settings(),
            model,
            (reader.part, reader.loss, obj.norm, str(obj.dtype)),
            *things,
            given=[*given, *model.buffers()],
            lasting=[p for name, p in named if name not in names],
            constants=constants,
        )


def settings() -> tuple[Any, ...]:
    """Settings of the process that a forward pass reads."""
    return (
        torch.get_default_dtype(),
        str(torch.get_default_device()),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_cudnn_enabled(),
        torch._C._get_mkldnn_enabled(),
        *(list(hooks.values()) for hooks in _global_hooks()),
    )


def _global_hooks() -> list[Mapping[int, Any]]:
    return [
        getattr(_modules, f"_global_{kind}_hooks")
        for kind in ("forward", "forward_pre", "backward", "backward_pre")
    ]
