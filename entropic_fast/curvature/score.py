"""The score matrix, its Gram matrix and spectrum, and per-example gradient norms.

S [E, P] holds in row e the score of example e: the gradient of its loss, which for
cross-entropy is that of the negative log-likelihood of the given label. F = S^T S / E is the
empirical Fisher matrix; its leading eigenvalues are sigma_i(S)^2 / E (Di Carlo, Goddard,
Schwab, arXiv 2512.06297, figure 2D), which are those of the small Gram matrix S S^T / E too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..objective import Objective
from ..results import Estimate
from .memory import available_bytes, readable, resolve_budget, too_small
from .per_example import ExampleGradients


def score_matrix(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None
) -> Tensor:
    """The score matrix: row e is d loss_e / d theta.  # [E, P]

    Args:
        obj: an objective whose examples do not influence one another.
        theta: the point; None for the model's own.  # [P]
        max_examples: E, the first so many examples; None for all N.

    Raises:
        ValueError: normalisation by batch statistics; a matrix larger than the free memory
            (`score_gram` needs no whole matrix); a NaN or infinite gradient.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> score_matrix(obj, torch.tensor([2.0])).tolist()
    [[-2.0], [-8.0]]
    """
    obj.require_single_examples()
    count = _count(obj, max_examples)
    itemsize = torch.finfo(obj.dtype).bits // 8
    free = available_bytes(obj.device)
    if count * obj.num_params * itemsize > free:
        raise checks.fail(
            "max_examples",
            f"a score matrix [E, {obj.num_params}] that fits in the {readable(free)} free",
            f"E = {count}, {readable(count * obj.num_params * itemsize)}",
            "take fewer examples, or score_gram, which needs no whole score matrix",
        )
    scores = torch.empty(count, obj.num_params, dtype=obj.dtype, device=obj.device)
    for start, gradients in ExampleGradients(obj, theta).chunks(count):
        scores[start : start + len(gradients)] = gradients
    return scores


def score_gram(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """The Gram matrix S S^T of the scores, accumulated in float64.  # [E, E]

    Rows of S are held in blocks as large as the budget allows; the examples after a block are
    recomputed against it. With everything in one block that is one pass over the examples,
    with B blocks (B + 1) / 2.

    Args:
        obj, theta, max_examples: as for `score_matrix`.
        memory_budget: bytes to stay under, the result included; None for a quarter of the
            free memory. What the process holds beforehand is not counted.

    Raises:
        ValueError: as for `score_matrix`; a budget too small for one example at a time.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> score_gram(obj, torch.tensor([2.0])).tolist()
    [[4.0, 16.0], [16.0, 64.0]]
    """
    obj.require_single_examples()
    count = _count(obj, max_examples)
    budget = resolve_budget(memory_budget, obj.device)
    result = 8 * count * count
    gradients, block_rows, scratch = _plan_gram(obj, theta, count, budget - result, budget)
    gram = torch.zeros(count, count, dtype=torch.float64, device=obj.device)
    block = torch.empty(block_rows, obj.num_params, dtype=obj.dtype, device=obj.device)
    products = _Products(scratch, obj.device)
    for begin in range(0, count, block_rows):
        end = min(begin + block_rows, count)
        rows = block[: end - begin]
        for start, chunk in gradients.chunks(count, first=begin):
            stop = start + len(chunk)
            low, high = max(start, begin), min(stop, end)
            if low < high:
                block[low - begin : high - begin] = chunk[low - start : high - start]
            if start < end <= stop:  # the block is full
                products.add(gram[begin:end, begin:end], rows, rows)
            after = max(start, end)
            if after < stop:
                products.add(gram[begin:end, after:stop], rows, chunk[after - start :])
    upper = gram.triu()
    return upper + upper.triu(1).T


def score_spectrum(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Leading eigenvalues of the empirical Fisher matrix S^T S / E, descending.  # [min(E, P)]

    In float64, from the smaller of S S^T and S^T S. Negative values, which only rounding
    makes, are returned as 0. Eigenvalues under `score_spectrum_floor` are rounding, not data.

    Args:
        obj, theta, max_examples, memory_budget: as for `score_gram`.

    Raises:
        ValueError: as for `score_gram`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> score_spectrum(obj, torch.tensor([2.0])).tolist()
    [34.0]
    """
    obj.require_single_examples()
    count = _count(obj, max_examples)
    budget = resolve_budget(memory_budget, obj.device)
    size = min(count, obj.num_params)
    # The eigenvalue solver overwrites a copy and has a workspace of its own.
    solver = 2 * 8 * size * size
    if budget <= solver:
        raise too_small(
            solver,
            budget,
            f"the eigenvalues of a matrix of order {size}",
            "give more memory, or fewer max_examples",
        )
    if count <= obj.num_params:
        matrix = score_gram(obj, theta, count, budget - solver)
    else:
        matrix = _second_moment(obj, theta, count, budget - solver)
    eigenvalues: Tensor = torch.linalg.eigvalsh(matrix)
    return (eigenvalues / count).clamp(min=0).flip(0)


def score_spectrum_floor(spectrum: Tensor, dtype: torch.dtype) -> float:
    """The level under which eigenvalues of `score_spectrum` are rounding.

    Two sources: scores rounded to `dtype` move each singular value of S by up to about
    8 eps ||S||_F (8 for the growth of rounding through a network's layers), so an eigenvalue
    that is zero comes out as much as (8 eps)^2 times the sum of all; and the float64
    eigenvalue solver errs by the matrix's order times its eps times the largest.

    Args:
        spectrum: eigenvalues from `score_spectrum`.  # [n]
        dtype: the objective's dtype, in which the scores were computed.

    >>> import torch
    >>> score_spectrum_floor(torch.tensor([1.0, 0.1]), torch.float32) < 1e-11
    True
    """
    values = spectrum.double()
    eps = torch.finfo(dtype).eps
    solver = len(values) * torch.finfo(torch.float64).eps * float(values.max())
    return (8 * eps) ** 2 * float(values.sum()) + solver


def gradient_norms(obj: Objective, theta: Tensor | None = None) -> Tensor:
    """Squared norm of each example's gradient, in float64.  # [N]

    Args:
        obj: an objective whose examples do not influence one another.
        theta: the point; None for the model's own.  # [P]

    Raises:
        ValueError: normalisation by batch statistics; a NaN or infinite gradient.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> gradient_norms(obj, torch.tensor([2.0])).tolist()
    [4.0, 64.0]
    """
    chunks = ExampleGradients(obj, theta).chunks()
    norms = [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for _, g in chunks]
    return torch.cat(norms).square()


def fisher_trace(obj: Objective, theta: Tensor | None = None) -> Estimate:
    """Trace of the empirical Fisher matrix: the mean squared per-example gradient norm.

    Empirical: the scores are those of the given labels, not of labels drawn from the model.
    The value is exact for the data; the standard error is that of a mean over N examples
    taken as a sample (NaN for one example).

    Args:
        obj, theta: as for `gradient_norms`.

    Raises:
        ValueError: as for `gradient_norms`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> fisher_trace(obj, torch.tensor([2.0])).value
    34.0
    """
    norms = gradient_norms(obj, theta)
    n = len(norms)
    error = float(norms.std()) / n**0.5 if n > 1 else float("nan")
    return Estimate(float(norms.mean()), error, n)


def _count(obj: Objective, max_examples: int | None) -> int:
    if max_examples is None:
        return obj.num_examples
    checks.whole("max_examples", max_examples, 1)
    if max_examples > obj.num_examples:
        raise checks.fail(
            "max_examples", f"at most the {obj.num_examples} examples there are", str(max_examples)
        )
    return max_examples


def _plan_gram(
    obj: Objective, theta: Tensor | None, count: int, room: int, budget: int
) -> tuple[ExampleGradients, int, int]:
    """Gradients in chunks, rows of S to hold, and bytes of scratch, that fit in `room`."""
    itemsize = torch.finfo(obj.dtype).bits // 8
    row = obj.num_params * itemsize
    # Float64 columns of every row of a product: at the least one column.
    scratch = max(16 * count, min(max(room, 0) // 8, 64 * 2**20))
    gradients = ExampleGradients(obj, theta, memory_budget=2**62)
    needed = gradients.example_bytes + row
    left = room - scratch
    if left < needed:
        raise too_small(
            budget - room + max(needed * 8 // 7 + 1, needed + scratch),
            budget,
            f"the Gram matrix of {count} examples",
            "give more memory, or fewer max_examples",
        )
    # A quarter for the chunk is enough to vectorise; every row more held saves recomputing.
    gradients.chunk = gradients.chunk_within(max(gradients.example_bytes, left // 4))
    rows = min(count, (left - gradients.chunk * gradients.example_bytes) // row)
    return gradients, max(1, rows), scratch


def _second_moment(obj: Objective, theta: Tensor | None, count: int, room: int) -> Tensor:
    """S^T S accumulated in float64.  # [P, P]"""
    size = 8 * obj.num_params**2
    gradients = ExampleGradients(obj, theta, memory_budget=2**62)
    per_example = gradients.example_bytes + 8 * obj.num_params
    # Each product has the result's size before it is added.
    if room < 2 * size + per_example:
        raise too_small(
            4 * size + per_example,
            room + 2 * size,
            f"the spectrum of {count} examples and {obj.num_params} parameters",
            "give more memory, or fewer max_examples",
        )
    gradients.chunk = gradients.chunk_within(
        max(gradients.example_bytes, room - 2 * size - 8 * obj.num_params * 32)
    )
    moment = torch.zeros(obj.num_params, obj.num_params, dtype=torch.float64, device=obj.device)
    for _, chunk in gradients.chunks(count):
        moment.addmm_(chunk.double().T, chunk.double())
    return moment


class _Products:
    """out += a b^T in float64, converting as many columns at a time as the scratch holds.

    The squares of small singular values drown in float32 products, whose rounding is 1e-7 of
    the largest; so the products are float64 even where the scores are float32. One scratch
    serves all products: fresh buffers for each left holes in the heap that took 1.7 times the
    budget.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.scratch = torch.empty(max(2, size // 8), dtype=torch.float64, device=device)

    def add(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        same = b is a
        rows = len(a) if same else len(a) + len(b)
        width = max(1, len(self.scratch) // rows)
        for i in range(0, a.shape[1], width):
            left = self._double(a[:, i : i + width], 0)
            right = left if same else self._double(b[:, i : i + width], left.numel())
            out.addmm_(left, right.T)

    def _double(self, columns: Tensor, at: int) -> Tensor:
        if columns.dtype == torch.float64:
            return columns
        place = self.scratch[at : at + columns.numel()].view(columns.shape)
        return place.copy_(columns)
