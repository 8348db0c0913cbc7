"""Norms of per-example gradients, and the trace of the Fisher matrix from them.

No gradient is stored: layer rules give squared norms directly.
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
from ...objective import Objective, require_objective
from .._grouping import grouping
from ._chunks import PassCost, probe_batch, require_finite, rows_made
from ._engine import PerExampleGradEngine
from .layer_rules import DenseGrad, FactoredGrad, squared_norms

# Parameters of up to this many elements have their rows squared together on a GPU: biases and
# normalization weights, 39 of ResNet-20's 65 parameters, which took 5 launches each.
JOINED = 4096


@overload
def gradient_norms(
    obj: Objective, theta: Tensor | None = None, *, memory_budget: int | None = None,
    group_by: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def gradient_norms(
    obj: Objective, theta: Tensor | None = None, *, memory_budget: int | None = None, group_by: str
) -> dict[str, Tensor]: ...


@clean_dispatch_state()
def gradient_norms(
    obj: Objective,
    theta: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    group_by: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Squared norms [N] of per-example gradients, in float64.

    Args:
        obj, theta: as for `score_matrix`.
        memory_budget: limit in bytes; None for a quarter of the free memory, half on a GPU.
        group_by: None for the total; "parameter" or "module" for the share of each, by name.

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
    made, largest = engine.surveyed("rows", lambda: _row_bytes(engine))
    # Rows and their float64 copies fill the scratch at most.
    scratch = min(2 * scratch_of(obj.device).norms, 2 * count * largest)
    cost = PassCost(engine, made, 8 * count * len(keys) + scratch)
    chunk = cost.chunk_within(resolve_budget(memory_budget, obj.device), 0, count)

    def local_norms() -> Tensor:
        # Zeros for the examples of other processes: the sum over processes gathers all.
        norms = torch.zeros(len(keys), count, dtype=torch.float64, device=obj.device)
        for batch in obj.local_batches(batch_size=chunk):
            of_batch = norms[:, batch.start : batch.start + batch.size]
            sums = _Sums(dict(zip(keys, of_batch, strict=True)))

            def add(name: str, grad: FactoredGrad, sums: _Sums = sums) -> None:
                sums.add(key(name), grad)

            engine.run(batch, add)
            sums.flush()
            require_finite(of_batch.sum(0), batch.start, engine.theta)
        return norms

    summed = obj.all_reduce(local_norms, f"gradient norms by {group_by}", engine.theta)
    norms = dict(zip(keys, summed, strict=True))
    return norms[""] if group_by is None else norms


def _row_bytes(engine: PerExampleGradEngine) -> tuple[int, int]:
    """Bytes per example of the rows that layer rules make, and of those squared at once."""
    grads = probe_batch(engine).values()
    together = sum(grad.row_bytes for grad in grads if _is_joined(grad))
    return rows_made(grads), max([together, *(grad.row_bytes for grad in grads)])


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
        # Rows and their float64 copies must fit the scratch.
        if self._bytes > scratch_of(rows.device).norms:
            self.flush()
            self._bytes = rows.nbytes
        self._rows.setdefault(key, []).append(rows)

    def flush(self) -> None:
        """Add the rows collected so far."""
        for key, rows in self._rows.items():
            self.sums[key] += squared_norms(torch.cat(rows, 1) if len(rows) > 1 else rows[0])
        self._rows.clear()


@overload
def fisher_trace(
    obj: Objective, theta: Tensor | None = None, *, memory_budget: int | None = None,
    group_by: None = None,
) -> Estimate: ...  # fmt: skip


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
    """Trace of the Fisher matrix; given labels make it the empirical Fisher (Kunstner et al. 2019).

    It is the mean squared norm of the scores (see `score_matrix`; for a loss other than a negative
    log-likelihood a score is simply the loss gradient). For labels drawn from the model, pass
    `with_sampled_labels(obj, theta)`: the trace is then that of the Monte Carlo Fisher. The
    standard error is a sampling error: treating the examples as an i.i.d. sample, how far the value
    may be from the population trace (NaN for one example).

    Args:
        obj, theta, memory_budget, group_by: as for `gradient_norms`.

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
