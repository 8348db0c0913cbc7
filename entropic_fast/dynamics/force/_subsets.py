"""Curvature on a subset of the data, and on disjoint subsets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._utils import trees
from ...curvature import HessianOperator
from ...objective import Objective
from ..projected_sgd import in_random_batches


def as_in_dynamics(obj: Objective) -> Objective:
    """The objective, with batch statistics over random batches of the same size."""
    if obj.norm != "batch":
        return obj
    return in_random_batches(obj, next(obj.batches()).size)


def first_examples(obj: Objective, max_examples: int | None) -> Objective:
    """The objective on its first `max_examples` examples (None: all), in batches of equal size."""
    return _parts(obj, max_examples, 1)[0]


def forms_by_parts(
    obj: Objective, theta: Tensor, vectors: Tensor, max_examples: int | None
) -> Tensor:
    """v^T H v for the columns of vectors [P, K], spread over disjoint subsets of `max_examples`.

    One row per subset [G, ceil(K / G)], filled up with NaN, on the CPU. Subsets are independent, so
    the spread of their mean includes the error of using fewer examples.
    """
    parts = _parts(obj, max_examples, vectors.shape[1])
    forms = torch.full((len(parts), -(-vectors.shape[1] // len(parts))), torch.nan).double()
    for row, (form, subset) in enumerate(zip(forms, parts, strict=True)):
        values = HessianOperator(subset, theta).quadratic_forms(vectors[:, row :: len(parts)])
        form[: len(values)] = values.cpu()
    return forms


def mean_of_parts(values: Tensor) -> tuple[float, float]:
    """Mean of values [G, C] and its standard error over rows, or over columns if there is one row.

    NaN for the error of a single value.
    """
    rows = values if len(values) > 1 else values.T
    finite = rows.isfinite()
    mean = rows[finite].mean()
    gaps = (rows - mean).nansum(1)
    count = len(rows)
    error = (gaps.square().sum() * count / (count - 1)).sqrt() / finite.sum() if count > 1 else None
    return float(mean), torch.nan if error is None else float(error)


def _parts(obj: Objective, max_examples: int | None, most: int) -> list[Objective]:
    size = next(obj.batches()).size
    count = min(max_examples or obj.num_examples, obj.num_examples)
    if obj.norm == "batch":
        count = max(count // size, 1) * size
    if count >= obj.num_examples:
        return [obj]
    number = max(min(obj.num_examples // count, most), 1)
    held = obj.tensors(number * count)
    return [
        obj.sampled(*trees.chosen(held, slice(i, i + count)), batch_size=size)
        for i in range(0, number * count, count)
    ]
