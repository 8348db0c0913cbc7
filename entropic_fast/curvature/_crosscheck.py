"""Agreement of fast paths with autograd, and the context in which only autograd is used."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .._torch.architecture_key import key_of

if TYPE_CHECKING:
    from .._utils.trees import Tree
    from ..objective import Objective

# Largest relative differences that count as agreement: in the norm of one parameter's gradient, and
# relative to the entire gradient, against which rounding in small parts may be large.
AGREEMENT = {
    torch.float64: (1e-6, 1e-11),
    torch.float32: (1e-2, 1e-5),
    torch.bfloat16: (0.2, 0.05),
    torch.float16: (0.1, 0.02),
}
# Absolute differences up to this are rounding, however small the gradient.
SMALL_GRADIENT = {t: 100 * torch.finfo(t).eps for t in (torch.float64, torch.float32)}


class FastPathMismatchError(RuntimeError):
    """A fast path and autograd give different derivatives; the message says of what."""


class WrongDerivativeError(RuntimeError):
    """autograd's second derivatives are wrong, because a function in the model has them wrong."""


# Absolute differences of up to so many eps are rounding, however small the product.
ROUNDINGS = 1e3


class _Coarsest(TorchFunctionMode):
    """Records the least precise dtype among results that require a gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.dtype in AGREEMENT and t.requires_grad:
                self.dtype = max(self.dtype, t.dtype, key=lambda dtype: AGREEMENT[dtype])
        return result


def coarsest_dtype(obj: Objective, theta: Tensor, inputs: Tree) -> torch.dtype:
    """The least precise dtype in which the model computes; Llama always normalizes in float32."""
    return outputs_and_dtype(obj, theta, inputs)[1]


def outputs_and_dtype(obj: Objective, theta: Tensor, inputs: Tree) -> tuple[Tensor, torch.dtype]:
    """The model's outputs, and the least precise dtype in which it computes them."""
    mode = _Coarsest(theta.dtype)
    with torch.enable_grad(), mode:
        outputs = obj.outputs(theta.detach().requires_grad_(), inputs)
    return outputs.detach(), mode.dtype


def require_agreement(
    name: str, got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Raise FastPathMismatchError if products and autograd's differ by more than rounding.

    Norms are of all tensors together.
    """
    scale, gap = _norm(expected), _norm(got, expected)
    slack = ROUNDINGS * torch.finfo(dtype).eps
    if not gap <= AGREEMENT[dtype][0] * scale + slack:
        raise FastPathMismatchError(
            f"{name}: a product of norm {scale:.3g} differs by {gap:.3g} between the "
            "captured graph and autograd; if the loss or the model mixes examples of a batch, pass "
            "coupled=True; else this is a bug in entropic_fast: please report the model; "
            "meanwhile, build the operator within "
            "`with entropic_fast.curvature.autograd_only():`"
        )


_NORM_AT_ONCE = 1 << 20


def _norm(tensors: Sequence[Tensor], minus: Sequence[Tensor] | None = None) -> float:
    """The norm in float64 of tensors, or of their differences, without a float64 copy of them."""
    squares = []
    for i, tensor in enumerate(tensors):
        pieces = torch.split(tensor.reshape(-1), _NORM_AT_ONCE)
        others = None if minus is None else torch.split(minus[i].reshape(-1), _NORM_AT_ONCE)
        for j, piece in enumerate(pieces):
            piece = piece.double() if others is None else piece.double() - others[j].double()
            squares.append(piece.square().sum())
    return math.sqrt(float(torch.stack(squares).sum()))  # one synchronization on a GPU


# Losses at most that the models of one architecture have in common.
_LOSSES = 256


class VerifiedLosses:
    """Kinds of results and the losses for which both methods were compared; keeps no loss alive.

    Losses that compute the same function count as one for all models of an architecture.
    """

    def __init__(self, shared: set[Hashable] | None = None) -> None:
        self._verified: dict[tuple[Hashable, int], Any] = {}
        self._shared: set[Hashable] = set() if shared is None else shared

    def for_another_model(self) -> VerifiedLosses:
        """The record for another model of the same architecture."""
        return VerifiedLosses(self._shared)

    def __contains__(self, pair: tuple[Hashable, Any]) -> bool:
        kind, loss = pair
        reference = self._verified.get((kind, id(loss)))  # losses need not be hashable
        if reference is not None and reference() is loss:
            return True
        return (kind, key_of(loss)) in self._shared

    def add(self, kind: Hashable, loss: Any) -> None:
        alike = key_of(loss)
        if alike is not None and len(self._shared) < _LOSSES:
            self._shared.add((kind, alike))
        key = kind, id(loss)
        if loss is None:  # of results that depend on none
            self._verified[key] = lambda: None
            return
        try:
            self._verified[key] = ref(loss, lambda _: self._verified.pop(key, None))
        except TypeError:  # no weak reference to it: it will be compared again
            return


_autograd_only: ContextVar[bool] = ContextVar("autograd_only", default=False)


@contextmanager
def autograd_only() -> Iterator[None]:
    """Compute derivatives by torch's autograd alone, which is slower and not cross-checked.

    Use it after a `FastPathMismatchError`, and to see which of the two results is wrong. Operators
    built within this context keep to autograd.

    >>> import torch
    >>> from entropic_fast import HessianOperator, Objective
    >>> from entropic_fast.curvature import autograd_only
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (torch.ones(2, 1),) * 2)
    >>> with autograd_only():
    ...     HessianOperator(obj).method
    'autograd: switched off by autograd_only'
    """
    token = _autograd_only.set(True)
    try:
        yield
    finally:
        _autograd_only.reset(token)


def fast_paths_are_off() -> bool:
    return _autograd_only.get()
