"""Derivatives that a model takes itself, and functions that torch differentiates wrongly."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .._utils import checks


def require_right_gradients(model: nn.Module) -> None:
    """Reject layers whose own gradient is wrong in torch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.CrossMapLRN2d):
            raise checks.invalid(
                "model",
                "layers whose gradient torch has right",
                f"nn.CrossMapLRN2d ({name!r}), whose gradient is not its derivative",
                "use nn.LocalResponseNorm, which computes the same",
            )


@lru_cache
def cdist_is_right() -> bool:
    """Whether torch has the second derivative of `torch.cdist` (2.14.1 has)."""
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    far, p = torch.zeros(1, 2, dtype=torch.float64), 3.0
    with torch.enable_grad():
        gradients, forms = [], (torch.cdist(x, far, p), torch.linalg.vector_norm(x, p))
        for form in forms:
            (slope,) = torch.autograd.grad(form.square().sum(), x, create_graph=True)
            try:
                gradients.append(torch.autograd.grad(slope[0, 0], x)[0])
            except RuntimeError:
                return False
    return torch.allclose(gradients[0], gradients[1])


class Watcher(TorchFunctionMode):
    """Notes in `derivative` whether a derivative is taken within it, by any means.

    Rejects functions without one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.derivative = False
        self._depth, self._forward = _depth(), forward_depth()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if func in _DERIVATIVES or _depth() > self._depth:
            self.derivative = True
        if func in NO_DERIVATIVE and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise checks.invalid(
                "model",
                "functions that torch can differentiate",
                f"torch.special.{func.__name__[len('special_') :]}, for a constant in its gradient",
                "write it as a torch.autograd.Function with its derivative",
            )
        if getattr(func, "__name__", "") == "flex_attention":
            raise checks.invalid(
                "model",
                "attention with derivatives",
                "flex_attention, which has none on CPUs and no second one on GPUs",
                "use F.scaled_dot_product_attention, with the scores to add as attn_mask",
            )
        wrong = func in WRONG_FORWARD or (func in _SCATTERED and _is_product(args, kwargs))
        if wrong and forward_depth() > self._forward:
            raise checks.invalid(
                "model",
                "derivatives of its own that torch can differentiate again",
                f"torch's forward mode through {func.__name__}, whose gradient is wrong",
                "take that derivative by torch.func.grad, torch.func.vjp or torch.autograd.grad",
            )
        return func(*args, **(kwargs or {}))


_DERIVATIVES = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


def _is_product(args: Any, kwargs: Any) -> bool:
    return any(isinstance(a, str) and a == "prod" for a in (*args, *(kwargs or {}).values()))


def _depth() -> int:
    """How many derivatives are being taken around a call, by torch.func or forward mode."""
    return _levels("Grad") + forward_depth()


def forward_depth() -> int:
    """How many derivatives of forward mode are being taken around a call."""
    return _levels("Jvp") + forward_ad._current_level + 1


def _levels(kind: str) -> int:
    functorch: Any = torch._C._functorch
    wanted = getattr(functorch.TransformType, kind)
    return sum(level.key() == wanted for level in functorch.get_interpreter_stack() or ())


# Functions whose result torch takes for a constant, though it is not.
_CONSTANT = """
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 modified_bessel_i0 modified_bessel_i1
    modified_bessel_k0 modified_bessel_k1 scaled_modified_bessel_k0 scaled_modified_bessel_k1
    spherical_bessel_j0 chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v
    chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l
    legendre_polynomial_p shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u
    shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w
"""
NO_DERIVATIVE = {
    getattr(torch.special, name) for name in str.split(_CONSTANT) if hasattr(torch.special, name)
}
_SCATTERED = {torch.scatter_reduce, Tensor.scatter_reduce}  # wrong for products alone
# Functions of which torch's forward mode gives numbers whose gradient is wrong (of
# `cholesky_inverse` the numbers too).
WRONG_FORWARD = {
    torch.det, torch.linalg.det, Tensor.det,
    torch.slogdet, torch.linalg.slogdet, Tensor.slogdet,
    torch.logdet, Tensor.logdet,
    torch.linalg.solve, torch.linalg.solve_ex,
    torch.cholesky_inverse, Tensor.cholesky_inverse,
    torch.linalg.householder_product, torch.orgqr, Tensor.orgqr,
}  # fmt: skip
