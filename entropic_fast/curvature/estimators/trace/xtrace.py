"""XTrace: every sign vector both builds the sketch and samples the rest, by leaving one out.

Epperly, Tropp and Webber, *XTrace: Making the most of every sample in stochastic trace estimation*,
SIAM J. Matrix Anal. Appl. 45 (2024), algorithm 2.1. With Y = A W for sign vectors W [P, l], and
Q_i an orthonormal basis of the range of Y without its column i, the estimates

    t_i = tr(Q_i^T A Q_i) + w_i^T (I - Q_i Q_i^T) A (I - Q_i Q_i^T) w_i

are each unbiased, their mean is the result, and their standard deviation over sqrt(l) is its
error estimate. Only the range Q of all of Y is multiplied: Q_i Q_i^T = Q (I - s_i s_i^T) Q^T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...._utils import checks
from ...._utils.results import Estimate
from ....ops.random_bits import streams as random
from ...operators._linear_operator import multiply, require_operator
from .._probes import BLOCK, MIN_SAMPLES, inner, mean_estimate, precise, sign_vectors
from ._deflation import new_directions, require_room

# A column counts as spanned by the others if its leverage is short of 1 by more.
LEVERAGE_ROUNDING = 1e-6


def xtrace(operator: Any, probes: int, tol: float | None, seed: int, exact: float) -> Estimate:
    """XTrace of a symmetric operator with at most `probes` vectors, half of them signs.

    Args:
        operator: as `require_operator` asks.
        exact: added to the value; known of the trace otherwise.

    Raises:
        ValueError: fewer than 2 probes; vectors that do not fit the memory.
    """
    signs = checks.integer("probes", probes, 2) // 2
    state = _State(operator, seed)
    if tol is None:
        state.grow(signs)
        return state.estimate(exact)
    state.grow(min(MIN_SAMPLES, signs))
    while state.count < signs and not precise(state.estimate(exact), tol):
        state.grow(min(state.count + BLOCK, signs))
    return state.estimate(exact)


class _State:
    """Signs W [P, l], an orthonormal basis Q [P, q] of A W, and A Q [P, q]; q at most l."""

    def __init__(self, operator: Any, seed: int) -> None:
        self.operator, self.key = operator, random.fold_in(seed, "xtrace")
        self.size, self.dtype, self.device = require_operator(operator)
        self.signs = torch.zeros(self.size, 0, dtype=self.dtype, device=self.device)
        self.basis, self.images = self.signs, self.signs
        self.triangle = torch.zeros(0, 0, dtype=torch.float64)  # Q^T A W, [q, l]
        self.forms = torch.zeros(0, dtype=torch.float64)  # w^T A w, [l]

    @property
    def count(self) -> int:
        """l, the sign vectors taken."""
        return self.signs.shape[1]

    def grow(self, count: int) -> None:
        """Take sign vectors until there are `count`."""
        require_room(3 * count, self.operator)
        while self.count < count:
            taken = range(self.count, min(self.count + BLOCK, count))
            signs = sign_vectors(self.size, self.key, taken, self.dtype, self.device)
            products = multiply(self.operator, signs)
            new = new_directions(products, self.basis)
            old = self.basis.shape[1]
            self.basis = torch.cat([self.basis, new], 1)
            if new.shape[1]:
                self.images = torch.cat([self.images, multiply(self.operator, new)], 1)
            triangle = torch.zeros(self.basis.shape[1], taken.stop, dtype=torch.float64)
            triangle[:old, : taken.start] = self.triangle
            triangle[:, taken.start :] = inner(self.basis, products)
            self.triangle = triangle
            self.forms = torch.cat([self.forms, (signs.double() * products.double()).sum(0).cpu()])
            self.signs = torch.cat([self.signs, signs], 1)

    def estimate(self, exact: float) -> Estimate:
        """Mean of the estimates that leave one out, and its error."""
        projected = inner(self.basis, self.images)  # Q^T A Q, [q, q]
        seen = inner(self.basis, self.signs)  # Q^T W, [q, l]
        imaged = inner(self.images, self.signs)  # (A Q)^T W, [q, l]
        out = _left_out(self.triangle, torch.finfo(self.dtype).eps)  # s_i, [q, l]
        known = projected.trace() - (out * (projected @ out)).sum(0)
        inside = seen - out * (out * seen).sum(0)  # Q^T Q_i Q_i^T w_i
        rest = self.forms - (inside * (self.triangle + imaged - projected @ inside)).sum(0)
        found = mean_estimate(known + rest, exact)
        return Estimate(found.value, found.std_error, self.count + self.basis.shape[1])


def _left_out(triangle: Tensor, eps: float) -> Tensor:
    """The unit direction s_i that the range loses with column i of a [q, l] matrix; or 0.

    It is orthogonal to all columns but i, a column of the transposed pseudo-inverse; a column that
    the others span (its leverage is under 1) takes no direction with it.
    """
    left, lengths, right = torch.linalg.svd(triangle, full_matrices=False)
    kept = lengths > 10 * eps * lengths.max() if len(lengths) else lengths > 0
    left, lengths, right = left[:, kept], lengths[kept], right[kept]
    leverage = right.square().sum(0)
    out: Tensor = left @ (right / lengths[:, None])
    out /= torch.linalg.vector_norm(out, dim=0).clamp(min=torch.finfo(out.dtype).tiny)
    out *= leverage > 1 - LEVERAGE_ROUNDING
    return out
