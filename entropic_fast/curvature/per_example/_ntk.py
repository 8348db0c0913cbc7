"""The empirical neural tangent kernel: the Gram matrix of the outputs' gradients."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._torch.graph_checks import require_finite_outputs
from ..._torch.torch_compile import clean_dispatch_state
from ..._utils import checks
from ...objective import Objective, require_objective
from ...objective.data import RepeatedExamples
from ._scores import score_gram


@overload
def ntk_gram(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None,
    memory_budget: int | None = None, *, group_by: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def ntk_gram(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None,
    memory_budget: int | None = None, *, group_by: str,
) -> dict[str, Tensor]: ...  # fmt: skip


@clean_dispatch_state()
def ntk_gram(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
    *,
    group_by: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """The Gram matrix J J^T of the Jacobian of all outputs, in float64.  # [E, K, E, K]

    Entry [e, k, f, l] is the inner product of d output_k(x_e) / d theta and
    d output_l(x_f) / d theta: the empirical neural tangent kernel at theta (Jacot, Gabriel,
    Hongler, arXiv 1806.07572). The outputs of an example are flattened to K numbers; loss and
    targets play no part. It is computed as `score_gram` of E * K examples, each with one output as
    its loss.

    Args:
        obj, theta, max_examples: as for `score_matrix`.
        memory_budget: bytes to stay under, the 8 (E K)^2 of the result included; None for a
            quarter of the free memory, half on a GPU.
        group_by: None for the total; "parameter" or "module" for the share of each, by name. The
            shares add up to the total.

    Raises:
        ValueError: as `score_gram`; NaN or infinite outputs; outputs whose number K is not the
            same for all examples.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    >>> obj = Objective(torch.nn.Linear(2, 2, bias=False), "mse", (x, x))
    >>> kernel = ntk_gram(obj)  # x_e . x_f where k = l, else 0
    >>> kernel.shape, kernel[:, 0, :, 0].tolist(), bool(kernel[:, 0, :, 1].any())
    (torch.Size([2, 2, 2, 2]), [[1.0, 2.0], [2.0, 5.0]], False)
    """
    require_objective(obj)
    obj.require_single_examples()
    obj.require_outputs("the tangent kernel")
    count, theta = obj.count(max_examples), obj.point(theta)
    outputs = _require_outputs(obj, theta, count)
    which = torch.arange(outputs, device=obj.device).repeat(obj.num_examples)
    # The gradient of an output is the score of an example whose loss is that output.
    single = obj._replace(RepeatedExamples(obj.examples, outputs, which), _chosen, theta)
    shape = count, outputs, count, outputs
    if group_by is None:
        return score_gram(single, theta, count * outputs, memory_budget).view(shape)
    shares = score_gram(single, theta, count * outputs, memory_budget, group_by=group_by)
    return {name: share.view(shape) for name, share in shares.items()}


def _chosen(outputs: Tensor, which: Tensor) -> Tensor:
    """Output number `which` [n] of each example of outputs [n, ...].  # [n]"""
    return outputs.reshape(len(outputs), -1).gather(1, which[:, None])[:, 0]


def _require_outputs(obj: Objective, theta: Tensor, count: int) -> int:
    """K, after a pass that rejects outputs that are not finite, or not all K."""
    size = None
    for batch in obj.batches(count):
        with torch.no_grad(), full_precision():
            outputs = obj.outputs(theta, batch.inputs)
        require_finite_outputs(outputs, batch.start)
        numbers = outputs[0].numel()
        # One tensor holds all pairs of outputs: K must not depend on the example.
        if size not in (None, numbers):
            raise checks.invalid(
                "outputs",
                f"{size} numbers for every example, as for the first",
                f"{numbers} for example {batch.start}",
                "group examples by their number of outputs, with a kernel for each group",
            )
        size = numbers
    assert size is not None
    return size
