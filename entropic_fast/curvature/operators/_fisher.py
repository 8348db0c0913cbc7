"""Products with the empirical Fisher matrix."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..._utils import checks
from ..._utils.devices import is_gpu
from ..._utils.workspace import scratch_of
from ...objective import Objective
from ..per_example._chunks import ExampleGradients
from ._base import CurvatureOperator

logger = logging.getLogger(__name__)

# Most slices of columns in a product on a GPU: the number of launches does not grow with P.
SLICES = 8


class FisherOperator(CurvatureOperator):
    """The empirical Fisher matrix F = S^T S / E of the scores of a point, never formed.

    A product with any number of columns is one pass over the examples, S^T (S V) / E chunk by
    chunk, in float64. The scores are those of the objective's targets; with
    `with_sampled_labels(obj)` the matrix estimates the true Fisher matrix.

    Args:
        obj, theta, max_examples: as for `score_matrix`.
        memory_budget: bytes for the scores of a chunk; None for a quarter of the free memory, half
            on a GPU. A product with K columns takes 8 P K bytes on top, and on a GPU a quarter of
            the scores' bytes (or 256 MiB) for float64 copies.
        dtype: of the vectors it multiplies; None for the objective's (float32 for a model in
            half precision).

    Attributes:
        passes: passes over the examples so far.

    Raises:
        ValueError: examples that interact; a budget below one example's needs; in products, vectors
            that do not fit, and a NaN or infinite score.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> F = FisherOperator(obj, torch.tensor([2.0]))  # the scores are -2 and -8
    >>> F.shape, (F @ torch.tensor([1.0])).tolist()
    ((1, 1), [34.0])
    """

    name = "FisherOperator"
    takes_half = True

    def __init__(
        self,
        obj: Objective,
        theta: Tensor | None = None,
        max_examples: int | None = None,
        memory_budget: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(obj, theta)
        if not any(dtype is supported for supported in (None, torch.float32, torch.float64)):
            raise checks.invalid("dtype", "torch.float32 or torch.float64", checks.shown(dtype))
        if dtype is not None or obj.dtype in checks.HALF:
            self.dtype = dtype or torch.float32
        self.count = obj.count(max_examples)
        self.passes = 0
        self._gradients = ExampleGradients(obj, self.theta, memory_budget)

    def _product(self, columns: Tensor) -> Tensor:
        def local_sum() -> Tensor:
            total = torch.zeros(columns.shape, dtype=torch.float64, device=self.device)
            for _, scores in self._gradients.local_chunks(self.count) if columns.shape[1] else ():
                _add_outer_products(scores, columns, total)
                del scores  # before the next are made
            return total

        total = self.obj.all_reduce(
            local_sum, f"Fisher products of {self.count}", self.theta, columns
        )
        self.passes += bool(columns.shape[1])
        return total.div_(self.count).to(self.dtype)

    def __repr__(self) -> str:
        return f"{self.name}(P={self.shape[0]}, E={self.count})"


def _add_outer_products(scores: Tensor, columns: Tensor, total: Tensor) -> None:
    """total += S^T (S V) in float64, for scores S [n, P], columns V [P, K], total [P, K]."""
    n, width = len(scores), columns.shape[1]
    step = max(1, scratch_of(scores.device).products // (8 * (n + 2 * width)))
    if is_gpu(scores.device):
        step = max(step, -(-len(columns) // SLICES))
    slices = [slice(i, i + step) for i in range(0, len(columns), step)]
    weights = torch.zeros(n, width, dtype=torch.float64, device=scores.device)
    for chosen in slices:
        weights.addmm_(scores[:, chosen].double(), columns[chosen].double())
    for chosen in slices:
        total[chosen].addmm_(scores[:, chosen].double().T, weights)
