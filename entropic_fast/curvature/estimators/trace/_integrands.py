"""Integrands of trace estimators: functions of v that average to traces, where E v v^T = I."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ...operators._algebra import OperatorBase

# Vectors [P, K] to numbers [K, L] quadratic in them, in float64 on the CPU.
TraceIntegrand: TypeAlias = Callable[[Tensor], Tensor]


def quadratic_form(operator: OperatorBase) -> TraceIntegrand:
    """v^T A v, which averages to the trace (L = 1)."""
    return lambda vectors: operator.quadratic_forms(vectors).cpu()[:, None]


def block_quadratic_forms(
    operator: OperatorBase, sizes: list[int], groups: list[int]
) -> TraceIntegrand:
    """The terms of v^T (A v) by groups of entries, which average to traces of diagonal blocks.

    `sizes` are the lengths of consecutive slices of a vector, `groups` the group of each slice.
    """

    def integrand(vectors: Tensor) -> Tensor:
        products = operator @ vectors
        forms = products.new_zeros(max(groups) + 1, vectors.shape[1], dtype=torch.float64)
        slices = zip(
            groups, vectors.split_with_sizes(sizes), products.split_with_sizes(sizes), strict=True
        )
        for group, v, product in slices:
            forms[group] += (v.double() * product.double()).sum(0)
        return forms.T.cpu()

    return integrand
