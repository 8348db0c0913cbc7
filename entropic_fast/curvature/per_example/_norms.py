"""Norms of per-example gradients, and the trace of the Fisher matrix from them.

No gradient is stored: each layer's rule squares and sums as it goes.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..._torch.memory_budget import resolve_budget
from ..._torch.torch_compile import clean_dispatch_state
from ..._utils.devices import is_gpu
from ..._utils.results import Estimate
from ..._utils.workspace import scratch_of
from ...objective import Objective
from ...objective._objective import require_objective
from .._grouping import grouping
from ._chunks import PassCost, probe_batch, require_finite, rows_made
from ._engine import PerExampleGradEngine
from .layer_rules import DenseGrad, FactoredGrad, squared_norms

# Elements of parameters whose rows a GPU squares together: biases and normalization weights, 39 of
# ResNet-20's 65 parameters, at 5 launches each.
JOINED = 4096


@overload
def gradient_norms(
    obj: Objective,
    theta: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    group_by: None = None,
) -> Tensor: ...


@overload
def gradient_norms(
    obj: Objective,
    theta: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    group_by: str,
) -> dict[str, Tensor]: ...


@clean_dispatch_state()
def gradient_norms(
    obj: Objective,
    theta: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    group_by: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Squared norm of each example's gradient, in float64.  # [N]

    Args:
        obj: an objective whose examples do not influence one another.
        theta: the point; None for the model's own.  # [P]
        memory_budget: bytes to stay under; None for a quarter of the free memory, half on a GPU.
        group_by: None for the whole; "parameter" or "module" for the share of each, by name.

    Raises:
        ValueError: normalization by batch statistics; a NaN or infinite gradient; a budget
            under one example's needs.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> gradient_norms(obj, torch.tensor([2.0])).tolist()
    [4.0, 64.0]
    """
    require_objective(obj)
    obj.require_single_examples()
    key = grouping(group_by)
    engine, count = PerExampleGradEngine(obj, theta), obj.num_examples
    keys = dict.fromkeys(map(key, obj.parameter_names))
    grads = probe_batch(engine).values()
    # Rows that norms are taken of, and their float64 copies, fill the scratch at most.
    together = sum(grad.row_bytes for grad in grads if _is_joined(grad))
    largest = max((grad.row_bytes for grad in grads), default=0)
    scratch = min(2 * scratch_of(obj.device).norms, 2 * count * max(largest, together))
    cost = PassCost(engine, rows_made(grads), 8 * count * len(keys) + scratch)
    del grads
    chunk = cost.chunk_within(resolve_budget(memory_budget, obj.device), 0, count)

    def own() -> Tensor:
        norms = torch.zeros(len(keys), count, dtype=torch.float64, device=obj.device)
        for batch in obj.local_batches(batch_size=chunk):
            part = norms[:, batch.start : batch.start + batch.size]
            sums = _Sums(dict(zip(keys, part, strict=True)))

            def add(name: str, grad: FactoredGrad, sums: _Sums = sums) -> None:
                sums.add(key(name), grad)

            engine.run(batch, add)
            sums.flush()
            require_finite(part.sum(0), batch.start, engine.theta)
        return norms

    summed = obj.all_reduce(own, f"gradient norms by {group_by}", engine.theta)
    norms = dict(zip(keys, summed, strict=True))
    return norms[""] if group_by is None else norms


def _is_joined(grad: FactoredGrad) -> bool:
    return isinstance(grad, DenseGrad) and grad.width <= JOINED and is_gpu(grad.tensors[0].device)


class _Sums:
    """Sums of squared norms [n] by key; on a GPU rows of small parameters are squared together."""

    def __init__(self, sums: dict[str, Tensor]) -> None:
        self.sums, self._bytes = sums, 0
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, key: str, grad: FactoredGrad) -> None:
        if not _is_joined(grad):
            self.sums[key] += grad.norms()
            return
        (rows,) = grad.tensors
        self._bytes += rows.nbytes
        if self._bytes > scratch_of(rows.device).norms:
            self.flush()
            self._bytes = rows.nbytes
        self._rows.setdefault(key, []).append(rows)

    def flush(self) -> None:
        """Add what is held back."""
        for key, rows in self._rows.items():
            self.sums[key] += squared_norms(torch.cat(rows, 1) if len(rows) > 1 else rows[0])
        self._rows.clear()


@overload
def fisher_trace(
    obj: Objective,
    theta: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    group_by: None = None,
) -> Estimate: ...


@overload
def fisher_trace(
    obj: Objective, theta: Tensor | None = None, *, memory_budget: int | None = None, group_by: str
) -> dict[str, Estimate]: ...


@clean_dispatch_state()
def fisher_trace(
    obj: Objective,
    theta: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    group_by: str | None = None,
) -> Estimate | dict[str, Estimate]:
    """Trace of the empirical Fisher matrix: the mean squared per-example gradient norm.

    Empirical: the scores are those of the given labels. For the true Fisher matrix, whose
    labels are drawn from the model, pass `with_sampled_labels(obj, theta)`.
    The value is exact for the data; the standard error is that of a mean over N examples
    taken as a sample (NaN for one example).

    Args:
        obj, theta, memory_budget, by: as for `gradient_norms`.

    Raises:
        ValueError: as for `gradient_norms`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> fisher_trace(obj, torch.tensor([2.0])).value
    34.0
    """
    require_objective(obj)
    if group_by is None:
        return Estimate.from_samples(gradient_norms(obj, theta, memory_budget=memory_budget))
    norms = gradient_norms(obj, theta, memory_budget=memory_budget, group_by=group_by)
    return {name: Estimate.from_samples(share) for name, share in norms.items()}
