"""Orthonormal directions to take out of a trace: given ones, and the range of products."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._torch.memory_budget import available_bytes, readable
from ...._torch.tall_qr import qr
from ...._utils import checks
from ...._utils.results import Eigenpairs
from ...operators._algebra import OperatorBase
from ...operators._projection import project_out
from .._probes import column_norms


def new_directions(vectors: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal directions [P, s] that vectors [P, K] span beyond an orthonormal basis [P, r].

    Directions along which they are rounding are left out, so s may be under K, and 0.
    """
    scale = float(column_norms(vectors).max())
    rest = project_out(basis, project_out(basis, vectors))
    q, triangle = qr(rest)
    left, lengths, _ = torch.linalg.svd(triangle.double().cpu())
    kept = lengths > 10 * torch.finfo(vectors.dtype).eps * scale
    # A small remainder is mostly rounding: sound vectors keep half of their length in one more
    # pass.
    fresh = project_out(basis, q @ left[:, kept].to(q))
    return qr(fresh[:, column_norms(fresh) > 0.5])[0]


def deflation_basis(deflate: Eigenpairs | Tensor | None, operator: OperatorBase) -> Tensor:
    """An orthonormal basis [P, r] of the directions whose share of a trace is computed exactly."""
    size, dtype, device = operator.order, operator.dtype, operator.device
    if deflate is None:
        return torch.zeros(size, 0, dtype=dtype, device=device)
    vectors = deflate.vectors if isinstance(deflate, Eigenpairs) else deflate
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != size:
        raise checks.invalid(
            "deflate", f"Eigenpairs or a matrix of shape [{size}, r]", checks.describe(vectors)
        )
    if vectors.shape[1] > size:
        raise checks.invalid("deflate", f"at most {size} directions", str(vectors.shape[1]))
    if vectors.dtype != dtype or vectors.device != device:
        raise checks.invalid(
            "deflate",
            f"{dtype} on {device}",
            f"{vectors.dtype} on {vectors.device}",
            "convert it with deflate.to(operator.device, operator.dtype)",
        )
    checks.finite("deflate", vectors)
    # The columns need not be orthonormal: the estimates hold for any basis of their span.
    return qr(vectors.detach())[0]


def require_room(count: int, operator: OperatorBase) -> None:
    """Reject `count` vectors that do not fit the free memory."""
    size, dtype, device = operator.order, operator.dtype, operator.device
    needed, free = count * size * torch.finfo(dtype).bits // 8, available_bytes(device)
    if needed > free:
        raise checks.invalid(
            "probes",
            f"vectors that fit in the {readable(free)} free",
            f"{readable(needed)} for {count} of them",
            'take fewer, or method="hutchinson", which keeps none',
        )
