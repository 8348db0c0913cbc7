"""Products within functions that `torch.compile` compiles: one operation each, no graph break.

A compiled graph holds tensors and numbers, not operators, so products are custom operations that
find their operator by its number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Thread
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .._utils import checks
from .full_precision import full_precision

_C: Any = torch._C
_TAGS = (torch.Tag.cudagraph_unsafe,)  # products wait for the device, to look for NaN
_numbers = itertools.count()
_operators: WeakValueDictionary[int, CompileSafe] = WeakValueDictionary()


class CompileSafe:
    """Base class of matrices whose products `operator @ vectors` work in compiled functions too.

    A compiled function keeps no operator alive: keep it as long as the function is used.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    symmetric: bool = False

    def __init__(self) -> None:
        self._number = next(_numbers)
        _operators[self._number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy, perhaps in another process, where the number may be another operator's.
        self.__dict__.update(state)
        CompileSafe.__init__(self)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no products")

    def multiply(self, vectors: Tensor) -> Tensor:
        """The product, as `operator @ vectors`."""
        if torch.compiler.is_compiling():
            product: Tensor = product_operation(vectors.detach(), self._number, self.shape[0])
            return product
        return self @ vectors

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling() or func is not Tensor.matmul:
            return NotImplemented
        # In compiled functions `operator @ v` comes as matmul(v, operator), as does v @ operator.
        vectors, operator = args
        is_vector = operator.symmetric and vectors.ndim == 1
        if vectors.shape[-1] == operator.shape[0] and not is_vector:
            raise checks.invalid(
                "vectors",
                "a shape for which A @ v is not mistaken for v @ A in a compiled function",
                f"{list(vectors.shape)} for A of shape {list(operator.shape)}",
                "write A.multiply(v)",
            )
        return operator.multiply(vectors)


@contextmanager
def clean_dispatch_state() -> Iterator[None]:
    """Within it, autograd works as if called from the top, in full float32 and without autocast.

    `torch.no_grad` and `torch.inference_mode` would record nothing, and operations of the
    dispatcher run below autograd and `torch.func`, so derivatives in them would lack terms.
    """
    included = _C._dispatch_tls_local_include_set().add(_C.DispatchKey.ADInplaceOrView)
    excluded = _C._dispatch_tls_local_exclude_set().raw_repr() & _excluded_at_first()
    guard = _C._ForceDispatchKeyGuard(included, _C.DispatchKeySet.from_raw_repr(excluded))
    with torch.inference_mode(False), guard, full_precision(), torch.enable_grad():
        yield


@lru_cache
def _excluded_at_first() -> int:
    """The dispatch keys that a new thread excludes: autocast, where it is off."""
    bits: list[int] = []
    thread = Thread(target=lambda: bits.append(_C._dispatch_tls_local_exclude_set().raw_repr()))
    thread.start()
    thread.join()
    return bits[0]


def _operator(number: int) -> Any:
    try:
        return _operators[number]
    except KeyError:
        raise ReferenceError(
            "a compiled function calls an operator that no longer exists; keep the operator, "
            "and compile the function again for another"
        ) from None


@torch.library.custom_op("entropic_fast::operator_product", mutates_args=(), tags=_TAGS)
def product_operation(vectors: Tensor, number: int, rows: int) -> Tensor:
    with clean_dispatch_state():
        product: Tensor = _operator(number) @ vectors
    return product


@product_operation.register_fake
def _(vectors: Tensor, number: int, rows: int) -> Tensor:
    return vectors.new_empty((rows, *vectors.shape[1:]))


@torch.library.custom_op("entropic_fast::operator_forms", mutates_args=(), tags=_TAGS)
def forms_operation(vectors: Tensor, number: int) -> Tensor:
    with clean_dispatch_state():
        forms: Tensor = _operator(number).quadratic_forms(vectors)
    return forms


@forms_operation.register_fake
def _(vectors: Tensor, number: int) -> Tensor:
    return vectors.new_empty(vectors.shape[1:] or (1,), dtype=torch.float64)
