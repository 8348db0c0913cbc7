"""Kinds of objects that a key is made of, and how each of them counts."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ._code_names import Reads

# Packages whose code is constant: its functions and classes are the same if they are one object.
LIBRARIES = frozenset(
    {"torch", "torchvision", "transformers", "timm", "numpy", "entropic_fast"}
    | set(sys.stdlib_module_names)
)
LIMIT = 200_000  # entries of a key
LARGE = 2**31  # bytes of tensors to compare by value
# Bytes of an instance of a class written in Python that has no slots: the rest is state in C.
PLAIN = 32
HEAP_TYPE = 1 << 9


class UnknownError(Exception):
    """Something whose influence on a forward pass is not understood."""


class Same:
    """Equal to itself alone, by identity; keeps nothing alive."""

    __slots__ = ("_id", "_ref")

    def __init__(self, thing: Any) -> None:
        self._id = id(thing)
        try:
            self._ref: Callable[[], Any] = ref(thing)
        except TypeError:
            if not isinstance(thing, IMMORTAL):
                raise UnknownError(type(thing).__name__) from None
            self._ref = lambda: thing

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        thing = self._ref()
        return isinstance(other, Same) and thing is not None and thing is other._ref()


IMMORTAL = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
PLAIN_VALUES = (
    str, bytes, torch.dtype, torch.layout, torch.memory_format, torch.device, range, type(None),
    type(Ellipsis), type(NotImplemented), bool, int,
)  # fmt: skip
BY_IDENTITY = (
    *IMMORTAL, types.BuiltinFunctionType, logging.Logger,
    torch._ops.OpOverload, torch._ops.OpOverloadPacket,
)  # fmt: skip
PLACES = (types.MemberDescriptorType, type(vars(Reads)["names"]))
TENSORS = (Tensor, nn.Parameter)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of hooks, beside the hooks themselves; of loading and saving; and views of parameters.
NOT_READ = frozenset({
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_compiled_call_impl",
})  # fmt: skip
OF_RECURRENT = frozenset({"_flat_weights", "_flat_weight_refs"})
NOT_OF_CLASSES = frozenset({
    "__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__annotations__",
    "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__match_args__",
    "__dataclass_fields__", "__dataclass_params__", "__firstlineno__", "__static_attributes__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__type_params__", "__slots__",
})  # fmt: skip
