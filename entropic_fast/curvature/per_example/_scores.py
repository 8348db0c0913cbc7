"""The score matrix, its Gram matrix and its spectrum.

Row e of S [E, P] is the score of example e: the gradient of its loss. F = S^T S / E is the
empirical Fisher matrix; its leading eigenvalues are sigma_i(S)^2 / E (Di Carlo, Goddard,
Schwab, arXiv 2512.06297, figure 2D), which are also those of the small Gram matrix S S^T / E.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..._torch.memory_budget import available_bytes, readable, resolve_budget, too_small
from ..._torch.torch_compile import clean_dispatch_state
from ..._utils import checks
from ...objective import Objective, require_objective
from ...ops.gram_update import symmetric_update_
from .._grouping import grouping
from ._chunks import ExampleGradients
from ._gram import GramComputation, mirror_lower
from ._gram_plan import STRATEGIES, ScorePlan

PRODUCTS = ("float64", "float32")


@clean_dispatch_state()
def score_matrix(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None
) -> Tensor:
    """The score matrix [E, P], whose row e is d loss_e / d theta.

    For a loss other than a negative log-likelihood a score is simply the loss gradient. Scores are
    gradients of the data term: they do not contain the objective's weight decay.

    Args:
        obj: an objective whose examples do not interact.
        theta: the point [P]; None for the model's own.
        max_examples: E, the number of examples from the first on; None for all N.

    Returns:
        in the objective's dtype; in float32 for a model of half precision.

    Raises:
        ValueError: normalization by batch statistics; a matrix larger than the free memory
            (`score_gram` does not need it); a NaN or infinite gradient.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> score_matrix(obj, torch.tensor([2.0])).tolist()
    [[-2.0], [-8.0]]
    """
    require_objective(obj)
    obj.require_single_examples()
    count = obj.count(max_examples)
    itemsize = 8 if obj.dtype == torch.float64 else 4
    free = available_bytes(obj.device)
    if count * obj.num_params * itemsize > free:
        raise checks.invalid(
            "max_examples",
            f"a score matrix [E, {obj.num_params}] that fits in the {readable(free)} free",
            f"E = {count}, {readable(count * obj.num_params * itemsize)}",
            "take fewer examples, or score_gram, which needs no whole score matrix",
        )
    gradients = ExampleGradients(obj, theta)
    scores = torch.empty(count, obj.num_params, dtype=gradients.dtype, device=obj.device)
    for start, rows in gradients.chunks(count):
        scores[start : start + len(rows)] = rows
    return scores


@overload
def score_gram(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None,
    memory_budget: int | None = None, *, products: str = "float64", strategy: str = "auto",
    group_by: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def score_gram(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None,
    memory_budget: int | None = None, *, products: str = "float64", strategy: str = "auto",
    group_by: str,
) -> dict[str, Tensor]: ...  # fmt: skip


@clean_dispatch_state()
def score_gram(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
    *,
    products: str = "float64",
    strategy: str = "auto",
    group_by: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """The Gram matrix S S^T [E, E] of the scores, accumulated in float64.

    For a loss other than a negative log-likelihood a score is simply the loss gradient. The score
    matrix is never held in memory. `score_plan` and the log (logger "entropic_fast", level INFO)
    describe the computation.

    Args:
        obj, theta, max_examples: as for `score_matrix`.
        memory_budget: limit in bytes, the result included; None for a quarter of the free memory,
            half on a GPU. It does not cover what the process holds beforehand, nor the two examples
            that the first call on a model compares with `torch.func` (about 8 P numbers).
        products: "float64", accurate to float64's rounding for the scores as computed; or
            "float32", about twice as fast on CPUs: sums of 256 float32 products are accumulated in
            float64, so that entry (i, j) is off by about 1e-8 |s_i| |s_j|.
        strategy: "auto", or one of "memory", "disk", "recompute" (see `score_plan`).
        group_by: None for all parameters; "parameter" or "module" for one matrix per parameter or
            module, by name. They add up to the total.

    Raises:
        ValueError: as for `score_matrix`; a budget too small for one example at a time.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> score_gram(obj, torch.tensor([2.0])).tolist()
    [[4.0, 16.0], [16.0, 64.0]]
    """
    require_objective(obj)
    obj.require_single_examples()
    count = obj.count(max_examples)
    checks.one_of("products", products, PRODUCTS)
    budget = resolve_budget(memory_budget, obj.device)
    task = GramComputation(
        obj, theta, count, budget, strategy, products == "float64", grouping(group_by)
    )
    grams = task.grams()
    return grams[""] if group_by is None else grams


@clean_dispatch_state()
def score_plan(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
    *,
    strategy: str = "auto",
) -> ScorePlan:
    """The plan of `score_gram`, without computing anything: `print(score_plan(obj))`.

    "memory": one pass, which keeps for every parameter each example's gradient, or the activations
    and output gradients that give it, whichever is smaller; "disk": the same in temporary files;
    "recompute": blocks of rows, in more than one pass. The first that fits the budget is chosen.

    Args:
        obj, theta, max_examples, memory_budget, strategy: as for `score_gram`.

    Raises:
        ValueError: as for `score_gram`.

    >>> import torch
    >>> obj = Objective(torch.nn.Linear(3, 2), "mse", (torch.zeros(5, 3), torch.zeros(5, 2)))
    >>> score_plan(obj, memory_budget=10**6).strategy
    'memory'
    """
    require_objective(obj)
    count = obj.count(max_examples)
    budget = resolve_budget(memory_budget, obj.device)
    return GramComputation(obj.without_distribution(), theta, count, budget, strategy, True).plan


@overload
def score_spectrum(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None,
    memory_budget: int | None = None, *, products: str = "float64", strategy: str = "auto",
    group_by: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def score_spectrum(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None,
    memory_budget: int | None = None, *, products: str = "float64", strategy: str = "auto",
    group_by: str,
) -> dict[str, Tensor]: ...  # fmt: skip


@clean_dispatch_state()
def score_spectrum(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
    *,
    products: str = "float64",
    strategy: str = "auto",
    group_by: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Leading min(E, P) eigenvalues of the empirical Fisher matrix S^T S / E, descending.

    In float64, from the smaller of S S^T and S^T S, for scores S; for a loss other than a negative
    log-likelihood a score is simply the loss gradient. Negative values are rounding and returned as
    0. Eigenvalues below `score_spectrum_floor` are rounding too.

    Args:
        obj, theta, max_examples, memory_budget, products: as for `score_gram`.
        strategy: as for `score_gram`; not used if E > P without groups, where S^T S is accumulated
            in one pass.
        group_by: None for all parameters; "parameter" or "module" for the diagonal block of each,
            by name.

    Raises:
        ValueError: as for `score_gram`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> score_spectrum(obj, torch.tensor([2.0])).tolist()
    [34.0]
    """
    require_objective(obj)
    obj.require_single_examples()
    count = obj.count(max_examples)
    checks.one_of("products", products, PRODUCTS)
    checks.one_of("strategy", strategy, STRATEGIES)
    budget = resolve_budget(memory_budget, obj.device)
    # If E > P, S^T S is the smaller matrix with the same eigenvalues other than 0.
    tall = group_by is None and count > obj.num_params
    size = obj.num_params if tall else count
    key = grouping(group_by)
    sizes: dict[str, int] = {}
    for name, part in obj.split(obj.point(theta)).items():
        sizes[key(name)] = sizes.get(key(name), 0) + part.numel()
    # The cache is freed before the eigenvalue solver, which needs a copy and a workspace beside
    # the matrices.
    solver = (2 + len(sizes)) * 8 * size * size
    if budget < solver:
        raise too_small(
            solver,
            budget,
            f"the eigenvalues of a matrix of order {size}",
            "give more memory, or fewer max_examples",
        )
    if tall:
        moment = _second_moment(obj, theta, count, budget, products == "float64")
        return _eigenvalues(obj, moment, count, size)
    task = GramComputation(obj, theta, count, budget, strategy, products == "float64", key)
    grams = task.grams()
    spectra = {k: _eigenvalues(obj, g, count, min(count, sizes[k])) for k, g in grams.items()}
    return spectra[""] if group_by is None else spectra


def score_spectrum_floor(
    spectrum: Tensor,
    dtype: torch.dtype,
    *,
    products: str = "float64",
    num_params: int | None = None,
) -> float:
    """The level below which eigenvalues of `score_spectrum` are rounding.

    The sum of three errors. Rounding of the scores to `dtype` moves each singular value of S by up
    to about 8 eps ||S||_F (8 for the growth of rounding through the layers), and an eigenvalue 0 by
    (8 eps)^2 times the sum of all. The float64 eigenvalue solver errs by the order times eps times
    the largest. Float32 products add at most about 8 eps |s_i| |s_j| / sqrt(P / 256) to entry
    (i, j), and so 8 eps times the sum of all eigenvalues over sqrt(P / 256).

    Args:
        spectrum: eigenvalues [n] of one matrix, from `score_spectrum`; an empty one gives 0.
        dtype: the objective's dtype, in which the scores were computed.
        products: as given to `score_spectrum`.
        num_params: P, for float32 products; None assumes at most 256.

    Raises:
        ValueError: not a tensor [n] of finite values; the dictionary of
            `score_spectrum(group_by=...)`, each of whose values has its own floor.

    >>> import torch
    >>> score_spectrum_floor(torch.tensor([1.0, 0.1]), torch.float32) < 1e-11
    True
    """
    if not isinstance(spectrum, Tensor) or spectrum.ndim != 1:
        raise checks.invalid(
            "spectrum",
            "the eigenvalues of one matrix, a tensor [n]",
            checks.describe(spectrum),
            "of score_spectrum(group_by=...) pass one value at a time",
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise checks.invalid("dtype", "a dtype of floating point", checks.shown(dtype))
    values = checks.finite("spectrum", spectrum).double()
    if not len(values):
        return 0.0
    eps = torch.finfo(dtype).eps
    total = float(values.sum())
    solver = len(values) * torch.finfo(torch.float64).eps * float(values.max())
    floor = (8 * eps) ** 2 * total + solver
    if checks.one_of("products", products, PRODUCTS) == "float32" and dtype != torch.float64:
        sums = max(1.0, (num_params or 0) / 256)
        floor += 8 * torch.finfo(torch.float32).eps * total / sums**0.5
    return floor


def _second_moment(
    obj: Objective, theta: Tensor | None, count: int, room: int, double_products: bool
) -> Tensor:
    """S^T S [P, P], accumulated in float64."""
    size = 8 * obj.num_params**2
    gradients = ExampleGradients(obj, theta, memory_budget=2**62)
    # A chunk's rows and their transpose are held together.
    needed = gradients.example_bytes + gradients.row_bytes
    if room < size + needed:
        raise too_small(
            size + needed,
            room,
            f"the spectrum of {count} examples and {obj.num_params} parameters",
            "give more memory, or fewer max_examples",
        )
    gradients.chunk = gradients.chunk_within((room - size) * gradients.example_bytes // needed)

    def local_moment() -> Tensor:
        moment = torch.zeros(obj.num_params, obj.num_params, dtype=torch.float64, device=obj.device)
        for _, chunk in gradients.local_chunks(count):
            symmetric_update_(moment, chunk.T.contiguous(), double_products=double_products)
        return moment

    moment = obj.all_reduce(local_moment, f"second moment of {count} scores", gradients.theta)
    mirror_lower(moment)
    return moment


def _eigenvalues(obj: Objective, matrix: Tensor, count: int, size: int) -> Tensor:
    """Eigenvalues of matrix / count, descending, computed by one of the processes for all."""

    def one_takes() -> Tensor:
        if obj.communicator.rank:
            return matrix.new_zeros(len(matrix))
        values: Tensor = torch.linalg.eigvalsh(matrix)
        return values

    eigenvalues = obj.all_reduce(one_takes, "eigenvalues")
    # Negative eigenvalues of a positive semi-definite matrix are rounding.
    return (eigenvalues / count).clamp(min=0).flip(0)[:size]
