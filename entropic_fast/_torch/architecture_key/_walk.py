"""The walk over everything that a forward pass may read."""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import struct
import sys
import types
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ._code_names import reads_of
from ._kinds import (
    BY_IDENTITY,
    HEAP_TYPE,
    HOOKS,
    LARGE,
    LIBRARIES,
    LIMIT,
    NOT_OF_CLASSES,
    NOT_READ,
    OF_RECURRENT,
    PLACES,
    PLAIN,
    PLAIN_VALUES,
    TENSORS,
    Same,
    UnknownError,
)

logger = logging.getLogger(__name__)


Key = tuple[Hashable, ...]


def key_of(
    *things: Any,
    given: Iterable[Tensor] = (),
    lasting: Iterable[Tensor] = (),
    constants: list[Tensor] | None = None,
) -> Key | None:
    """A key that equal things have in common; None where something is not understood.

    Args:
        things: models, losses, settings.
        given: tensors whose values come from outside; only shape, dtype and device count.
        lasting: tensors that never change, so that their values are hashed once.
        constants: a list that receives all other tensors, in an order that equal things share.
    """
    walk = _Walk(given, lasting)
    try:
        for thing in things:
            walk.visit(thing)
    except (UnknownError, RuntimeError, AttributeError, TypeError, ValueError) as why:
        # Raised also by objects that change during the walk, or that cannot be inspected.
        logger.debug("not compared with other models: %s", why)
        return None
    if constants is not None:
        constants += walk.constants
    return tuple(walk.found)


class _Walk:
    """Records the things it visits, and repeated ones as such."""

    def __init__(self, given: Iterable[Tensor], lasting: Iterable[Tensor]) -> None:
        self.found: list[Hashable] = []
        self._given = {id(tensor): tensor for tensor in given}
        self._lasting = {id(tensor): tensor for tensor in lasting}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id is another's
        self.constants: list[Tensor] = []
        self._bytes = 0

    def visit(self, thing: Any) -> None:
        if len(self.found) > LIMIT:
            raise UnknownError("too much to compare")
        kind = type(thing)
        if kind in PLAIN_VALUES:
            self.found.append((kind.__name__, thing))
        elif kind in (float, complex):  # 0.0 is -0.0, and NaN is not NaN
            value = complex(thing)
            self.found.append((kind.__name__, struct.pack("dd", value.real, value.imag)))
        elif id(thing) in self._seen:
            if id(thing) in self._given:
                raise UnknownError("a parameter held as an attribute too")
            self.found.append(("again", self._seen[id(thing)]))
        else:
            self._notice(thing)
            self._first(thing)

    def _notice(self, thing: Any) -> None:
        self._seen[id(thing)] = len(self._seen)
        self._alive.append(thing)

    def _first(self, thing: Any) -> None:
        for kinds, method in _METHODS:
            if isinstance(thing, kinds):
                method(self, thing)
                return
        self._instance(thing)

    def _many(self, name: str, things: Iterable[Any]) -> None:
        things = list(things)
        self.found.append((name, len(things)))
        for thing in things:
            self.visit(thing)

    # -- values ----------------------------------------------------------------------------

    def _tensor(self, tensor: Tensor) -> None:
        if type(tensor) not in TENSORS or tensor.layout != torch.strided:
            raise UnknownError(type(tensor).__name__)
        if id(tensor) in self._given:  # read as an attribute, not through its place in the module
            raise UnknownError("a parameter held as an attribute")
        self.found.append((*_looks(tensor), tensor.stride(), tensor.requires_grad))
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes > LARGE or tensor.is_meta:
            raise UnknownError("too much to compare")
        self.constants.append(tensor)
        if id(tensor) not in self._lasting:
            self.found.append(_digest(tensor))
            return
        if tensor not in _digests:
            _digests[tensor] = _digest(tensor)
        self.found.append(_digests[tensor])

    def _array(self, array: Any) -> None:
        if array.dtype.hasobject:
            raise UnknownError("an array of objects")
        self.found.append((type(array).__name__, str(array.dtype), array.shape))
        self.found.append(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest())

    def _slice(self, thing: slice) -> None:
        self._many("slice", (thing.start, thing.stop, thing.step))

    def _sequence(self, things: Any) -> None:
        self._type_of(things)
        self._many("sequence", things)

    def _set(self, things: Any) -> None:
        if not all(type(thing) in (str, int) for thing in things):
            raise UnknownError("a set")
        self._type_of(things)
        self._many("set", sorted(things, key=repr))

    def _mapping(self, things: Any) -> None:
        self._type_of(things)
        self._many("mapping", (item for pair in dict.items(things) for item in pair))

    def _type_of(self, thing: Any) -> None:
        """The type of a container, and attributes beside its contents."""
        self.visit(type(thing))
        self.visit(getattr(thing, "default_factory", None))
        if getattr(thing, "__dict__", None):
            self.visit(vars(thing))

    def _enum(self, member: enum.Enum) -> None:
        self.visit(type(member))
        self.visit(member.value)

    # -- code ------------------------------------------------------------------------------

    def _python_module(self, module: types.ModuleType) -> None:
        if not _is_library(module.__name__):
            raise UnknownError(f"all of the module {module.__name__}")
        self.found.append(Same(module))

    def _identity(self, thing: Any) -> None:
        owner = getattr(thing, "__self__", None)  # of a function written in C
        if owner is None or isinstance(owner, types.ModuleType | type):
            self.found.append(Same(thing))
        else:
            self.found.append(thing.__name__)
            self.visit(owner)

    def _function(self, function: types.FunctionType) -> None:
        original = getattr(function, "_torchdynamo_orig_callable", None)
        if original is not None:  # compiled, but run as it was written
            self.visit(original)
            return
        self.found.append(Same(function.__code__))
        self.visit(function.__defaults__)
        self.visit(function.__kwdefaults__)
        cells = function.__closure__ or ()
        self._many("closure", (cell.cell_contents for cell in cells if not _is_empty(cell)))
        if _is_library(function.__globals__.get("__name__")):
            return
        self.visit(vars(function))
        reads = reads_of(function.__code__)
        for name in reads.imports:
            if not _is_library(name):  # its attributes may change
                raise UnknownError(f"an import of {name} within a function")
        for first, *further in reads.names:
            value = function.__globals__.get(first, "not there")
            while further and isinstance(value, types.ModuleType):
                value = getattr(value, further.pop(0), "not there")
            self.found.append(first)
            self.visit(value)

    def _method(self, method: types.MethodType) -> None:
        self.found.append("method")
        self.visit(method.__func__)
        self.visit(method.__self__)

    def _partial(self, partial: functools.partial[Any]) -> None:
        self._many("partial", (type(partial), partial.func, partial.args, partial.keywords))

    def _wrapper(self, thing: Any) -> None:
        """A static or class method, or a function whose results are cached."""
        self.found.append(type(thing).__name__)
        self.visit(thing.__wrapped__)

    def _property(self, thing: property) -> None:
        self._many("property", (thing.fget, thing.fset, thing.fdel))

    def _class(self, cls: type) -> None:
        named = getattr(sys.modules.get(cls.__module__), cls.__name__, None)
        if _is_library(cls.__module__) and named is cls:
            self.found.append(Same(cls))
            if issubclass(cls, nn.Module):  # or another put in its place
                self.found.append(Same(cls.forward))
            return
        if issubclass(cls, enum.Enum):
            self.found.append(Same(cls))
            return
        if cls.__module__ == "torch.nn.utils.parametrize":  # made for one model alone
            self._many("parametrized", (*cls.__bases__, *vars(cls)))
            return
        self.found.append((cls.__module__, cls.__qualname__))
        self._many("bases", (*cls.__bases__, type(cls)))
        for name, value in vars(cls).items():
            if name not in NOT_OF_CLASSES and not isinstance(value, PLACES):
                self.found.append(name)
                self.visit(value)

    # -- objects ---------------------------------------------------------------------------

    def _module(self, module: nn.Module) -> None:
        self.visit(type(module))
        recurrent = isinstance(module, nn.RNNBase)
        for name, value in vars(module).items():
            if name in NOT_READ or (recurrent and name in OF_RECURRENT):
                continue
            self.found.append(name)
            if name in HOOKS:
                self._hooks(module, name, value)
            elif name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    self.found.append(key)
                    self._placed(tensor)
            else:
                self.visit(value)

    def _placed(self, tensor: Tensor | None) -> None:
        """A parameter or buffer in its place; of a given one only the looks count."""
        if tensor is None or id(tensor) not in self._given:
            self.visit(tensor)
        elif id(tensor) in self._seen:
            self.found.append(("again", self._seen[id(tensor)]))
        elif type(tensor) not in TENSORS:
            raise UnknownError(type(tensor).__name__)
        else:
            self._notice(tensor)
            self.found.append(("given", *_looks(tensor)))

    def _hooks(self, module: nn.Module, name: str, hooks: Mapping[int, Any]) -> None:
        kinds = [getattr(module, f"{name}_{kind}", {}) for kind in ("with_kwargs", "always_called")]
        for number, hook in hooks.items():
            self.found.append(tuple(number in kind for kind in kinds))
            self.visit(hook)

    def _instance(self, thing: Any) -> None:
        """An object of a class written in Python is its class and its attributes."""
        cls = type(thing)
        bases = [base for base in cls.__mro__ if base is not object]
        in_python = [base.__flags__ & HEAP_TYPE or base is SimpleNamespace for base in bases]
        slots = [name for base in bases for name in _slots(base)]
        if (
            not bases
            or not all(in_python)
            or cls.__basicsize__ > PLAIN + 8 * len(slots)
            or not (slots or hasattr(thing, "__dict__"))
        ):
            raise UnknownError(cls.__name__)
        self.visit(cls)
        for name in slots:
            self.visit(getattr(thing, name, None))
        self.visit(getattr(thing, "__dict__", None))


_Method = Callable[[_Walk, Any], None]
_METHODS: tuple[tuple[Any, _Method], ...] = (
    (Tensor, _Walk._tensor),
    (nn.Module, _Walk._module),
    (type, _Walk._class),
    (enum.Enum, _Walk._enum),
    ((np.ndarray, np.generic), _Walk._array),
    (dict, _Walk._mapping),
    ((set, frozenset), _Walk._set),
    ((tuple, list, deque), _Walk._sequence),
    (slice, _Walk._slice),
    (types.FunctionType, _Walk._function),
    (types.MethodType, _Walk._method),
    (functools.partial, _Walk._partial),
    ((staticmethod, classmethod, functools._lru_cache_wrapper), _Walk._wrapper),
    (property, _Walk._property),
    (types.ModuleType, _Walk._python_module),
    (BY_IDENTITY, _Walk._identity),
)


_digests: MutableMapping[Tensor, bytes] = WeakIdKeyDictionary()


def _digest(tensor: Tensor) -> bytes:
    kept = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return hashlib.sha256(kept.reshape(-1).view(torch.uint8).numpy().data).digest()


def _slots(cls: type) -> list[str]:
    names = vars(cls).get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    if any(name.startswith("__") and not name.endswith("__") for name in names):
        raise UnknownError("a private slot")
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _looks(tensor: Tensor) -> tuple[Hashable, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _is_library(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in LIBRARIES


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True
