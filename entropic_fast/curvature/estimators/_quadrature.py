"""Quadrature rules of a tridiagonal matrix, and others that tell how far they may be off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rule = tuple[Tensor, Tensor]  # nodes [m], ascending, and weights [m]
# A node at 0 that takes an entry this many times the matrix's size changes nothing.
FAR = 1e6


def gauss_rule(diagonal: Tensor, off_diagonal: Tensor) -> Rule:
    """Nodes and weights of the Gauss rule of m Lanczos steps (Golub and Welsch 1969)."""
    nodes, vectors = torch.linalg.eigh(tridiagonal(diagonal, off_diagonal))
    return nodes, vectors[0].square()


def other_rules(diagonal: Tensor, off_diagonal: Tensor, rounding: float) -> list[Rule]:
    """Rules from the same products as the Gauss rule: with fewer steps, and with a node at 0.

    They are the Gauss rules of m / 2, 3 m / 4 and m - 1 steps, and the rule of m + 1 nodes with one
    at 0. Where a function has a kink at 0 or falls steeply there, the Gauss rule converges slowly
    and its steps differ little; the last rule puts as much weight at 0 as the moments allow, and
    for log(x + delta) of a matrix without negative eigenvalues it errs in the opposite direction.

    `off_diagonal` [m] ends with the norm of what follows the last Lanczos vector. If that is within
    `rounding`, the Gauss rule is exact, and all four are equal to it.
    """
    m = len(diagonal)
    nodes, vectors = torch.linalg.eigh(tridiagonal(diagonal, off_diagonal))
    gauss, beta = (nodes, vectors[0].square()), float(off_diagonal[-1])
    if beta <= rounding:
        return [gauss] * 4
    fewer = [max(m // 2, 1), max(3 * m // 4, 1), max(m - 1, 1)]
    rules = [gauss_rule(diagonal[:k], off_diagonal) for k in fewer]
    size = max(float(nodes.abs().max()), beta)
    last = float((beta**2 * vectors[-1].square() / nodes).sum())
    if not abs(last) <= FAR * size:  # infinite or NaN with a node at 0 already
        return [*rules, gauss]
    more, weights = gauss_rule(torch.cat([diagonal, diagonal.new_tensor([last])]), off_diagonal)
    # Within the possible range of the operator: a node beyond has almost no weight, but f may be
    # arbitrarily large there.
    more = more.clamp(min(float(nodes[0]), 0.0) - beta, max(float(nodes[-1]), 0.0) + beta)
    more[more.abs().argmin()] = 0.0
    return [*rules, (more, weights)]


def stacked(rules: Sequence[Rule], length: int) -> Rule:
    """Rules of several probes as rows, padded with their last node at weight 0.  # [V, length]"""
    nodes = torch.stack([_padded(n, length, float(n[-1])) for n, _ in rules])
    return nodes, torch.stack([_padded(w, length, 0.0) for _, w in rules])


def tridiagonal(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """The symmetric matrix [m, m] of a diagonal [m] and the first m - 1 entries beside it."""
    beside = torch.diag(off_diagonal[: len(diagonal) - 1], 1)
    return torch.diag(diagonal) + beside + beside.T


def _padded(values: Tensor, length: int, fill: float) -> Tensor:
    return torch.cat([values, values.new_full((length - len(values),), fill)])
