"""Checks of autograd's own second derivatives, on a few examples at their first use.

A function with a wrong double backward pass silently gives products with another matrix. Two random
products test symmetry; central differences of the gradient test Hessian products.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..._torch.full_precision import double_backward_fixes, full_precision
from ..._torch.graph_checks import backward_nodes, require_twice_differentiable
from ..._utils import checks
from ...objective import Objective
from ...objective.losses import output_hessian
from ...ops.random_bits import streams as random
from .._crosscheck import (
    AGREEMENT,
    ROUNDINGS,
    VerifiedLosses,
    WrongDerivativeError,
    coarsest_dtype,
    fast_paths_are_off,
)
from ._base import FastPathOperator
from ._difference_check import on_batch

logger = logging.getLogger(__name__)

# Examples in a check; all of them where they are one batch.
FEW = 4
# Spacings of differences in units of theta's root mean square, and the least value of that. The
# smaller spacing crosses fewer kinks of wide networks but rounds more.
SPACING, SMALLER, LEAST = 1e-5, 1e-8, 1e-2
# Relative gap between product and differences that means a wrong derivative, if it is RESOLVED
# times the change of the differences with their spacing (at a kink, or by rounding).
TOLERANCE, RESOLVED = 1e-5, 10
# Most bytes of float64 vectors [P] for which differences are computed.
VECTORS = 2 * 2**30
_HELD = 10  # vectors

_tested: WeakKeyDictionary[nn.Module, VerifiedLosses] = WeakKeyDictionary()


def require_right_products(operator: FastPathOperator) -> None:
    """Test a Hessian's or Gauss-Newton matrix's products by autograd, once per model and loss.

    Raises WrongDerivativeError for a matrix that is not symmetric, or Hessian products that are not
    derivatives of the gradient, where the gradient is that of the loss.
    """
    _once(operator.obj, operator.kind, lambda: _test_products(operator))


def require_right_loss(obj: Objective, theta: Tensor, name: str) -> None:
    """Test autograd's second derivatives of a loss in the outputs, once per model and loss."""
    if obj._reader.loss is None:
        _once(obj, "loss", lambda: _test_loss(obj, theta, name))


def require_adjoint(
    name: str, forth: Tensor, back: Tensor, v: Tensor, u: Tensor, dtype: torch.dtype
) -> None:
    """Raise WrongDerivativeError if <u, J v> and <J^T u, v> differ by more than rounding."""
    a, b = float((u.double() * forth.double()).sum()), float((back.double() * v.double()).sum())
    size = max(float(forth.double().norm()), float(back.double().norm()))
    if not abs(a - b) <= _limit(size, dtype):
        raise _wrong(name, f"<u, J v> = {a:.6g} but <J^T u, v> = {b:.6g} for random u and v", None)


def _once(obj: Objective, kind: str, test: Callable[[], None]) -> None:
    if fast_paths_are_off():
        return
    verified = _tested.setdefault(obj.module, VerifiedLosses())
    if (kind, obj.loss_fn) not in verified:
        test()
        verified.add(kind, obj.loss_fn)


def _test_products(operator: FastPathOperator) -> None:
    try:
        small = _on_few_examples(operator)
        theta = small.theta
        u, v = (
            random.normal(theta.shape, 0, stream, dtype=theta.dtype, device=theta.device)
            for stream in (4, 5)
        )
        products = small._product_by_autograd(torch.stack([u, v])).T
        dtype = coarsest_dtype(small.obj, small.theta, next(small.obj.batches()).inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the product itself will say so
        logger.info("%s: products were not tested: %s", operator.name, error)
        return
    if not checks.all_finite(products):
        return  # likewise
    name, a, b = operator.name, float(u @ products[1]), float(v @ products[0])
    if not abs(a - b) <= _limit(float(products.norm(dim=1).max()), dtype):
        why = f"<u, H v> = {a:.6g} but <v, H u> = {b:.6g} for random u and v"
        raise _wrong(name, why, small)
    if operator.kind == "hessian" and dtype == torch.float64:
        _test_differences(small, v, products[1])


def _on_few_examples(operator: FastPathOperator) -> Any:
    """The operator on a few examples, in float64 where that is not too large."""
    obj = operator.obj
    few = on_batch(obj, obj.without_distribution().examples.check_batch(FEW))
    small: Any = copy.copy(operator)
    small.obj, small._is_tested = few, True
    if 8 * _HELD * obj.num_params <= VECTORS:
        small.obj = few.double()
        small.theta, small.dtype = operator.theta.double(), torch.float64
    return small


def _test_differences(small: Any, v: Tensor, product: Tensor) -> None:
    """Compare a product with differences of the gradient along v."""
    obj = small.obj
    try:
        gap = _gap(lambda point: (obj.loss(point), obj.gradient(point)), small.theta, v, product)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.info("%s: differences were not taken: %s", small.name, error)
        return
    if gap:
        why = (
            f"a product differs by {gap:.2g} of itself from what central differences of the "
            "gradient give"
        )
        raise _wrong(small.name, why, small)


@full_precision()
def _test_loss(obj: Objective, theta: Tensor, name: str) -> None:
    batch = obj.examples.check_batch(FEW)
    try:
        with torch.no_grad():
            outputs = obj.outputs(theta, batch.inputs).double()
        weights = torch.ones(batch.size, dtype=torch.float64, device=outputs.device)
        if output_hessian(obj.loss_fn, outputs, batch.targets, weights) is not None:
            return
        v = random.normal(outputs.shape, 0, 3, dtype=torch.float64, device=outputs.device)

        def derived(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            leaf = at.detach().clone().requires_grad_()
            with torch.enable_grad(), double_backward_fixes():
                loss = obj.output_losses(leaf, batch.targets).sum()
            require_twice_differentiable(loss)
            return leaf, loss, torch.autograd.grad(loss, leaf, create_graph=True)[0]

        def value(at: Tensor) -> tuple[float, Tensor]:
            _, loss, gradient = derived(at)
            return float(loss.detach()), gradient.detach()

        leaf, _, gradient = derived(outputs)
        product = torch.zeros_like(outputs)
        if gradient.requires_grad:
            (product,) = torch.autograd.grad(gradient, leaf, v, materialize_grads=True)
        gap = _gap(value, outputs, v, product.detach())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a loss of one dtype, or one that asks for more examples
        logger.info("%s: second derivatives of the loss were not tested: %s", name, error)
        return
    if gap:
        why = (
            f"the loss's second derivative in the outputs differs by {gap:.2g} of itself from "
            "what central differences of its gradient give"
        )
        raise _wrong(name, why, None)


def _gap(
    value: Callable[[Tensor], tuple[float, Tensor]], at: Tensor, v: Tensor, product: Tensor
) -> float:
    """The relative gap between a product and differences along v; 0 if that is not certain.

    `value` gives a loss and its gradient at a point, in float64.
    """
    scale, eps = max(LEAST, float(at.square().mean().sqrt())), torch.finfo(torch.float64).eps
    center, gradient = value(at)
    for spacing in (scale * SPACING, scale * SMALLER):
        losses, gradients = {}, {}
        for k in (-2, -1, 1, 2):
            losses[k], gradients[k] = value(at + k * spacing * v)
        if spacing == scale * SPACING:  # where kinks do not matter
            along = float((gradient * v).sum())
            difference = (losses[1] - losses[-1]) / (2 * spacing)
            rounding = ROUNDINGS * eps * abs(center) / spacing
            if not abs(along - difference) <= 1e-4 * float(gradient.norm()) + rounding:
                logger.info("a gradient is no derivative of its loss, by intention")
                return 0.0
        near = (gradients[1] - gradients[-1]) / (2 * spacing)
        far = (gradients[2] - gradients[-2]) / (4 * spacing)
        curvature = (gradients[1] + gradients[-1] - 2 * gradient) / (2 * spacing)
        gap, size = float((near - product).norm()), float(torch.stack([near, product]).norm())
        if gap <= TOLERANCE * size + ROUNDINGS * eps * float(gradient.norm()) / spacing:
            return 0.0
        if gap > RESOLVED * max(float((near - far).norm()), float(curvature.norm())):
            return gap / size
    return 0.0


def _limit(size: float, dtype: torch.dtype) -> float:
    return AGREEMENT[dtype][0] * size + ROUNDINGS * torch.finfo(dtype).eps


def _wrong(name: str, why: str, small: Any) -> WrongDerivativeError:
    custom: set[str] = set()
    if small is not None:
        batch = next(small.obj.batches())
        leaf = small.theta.detach().requires_grad_()
        with torch.enable_grad():
            nodes = backward_nodes(small.obj.losses(leaf, batch.inputs, batch.targets).sum())
            custom = {type(n).__name__ for n in nodes if isinstance(n, BackwardCFunction)}
    whose = (
        f"of {', '.join(sorted(custom))}, say"
        if custom
        else "of the model, the loss or torch itself"
    )
    return WrongDerivativeError(
        f"{name}: expected products with a symmetric matrix of second derivatives, got products "
        f"that are none: {why}; look for a function with a wrong or missing second derivative "
        f"({whose}) and write it in operations that torch differentiates; products as they are "
        "come within `with entropic_fast.curvature.autograd_only():`"
    )
