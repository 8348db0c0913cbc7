"""The score matrix, its Gram matrix and its spectrum.

S [E, P] holds in row e the score of example e: the gradient of its loss, which for
cross-entropy is that of the negative log-likelihood of the given label. F = S^T S / E is the
empirical Fisher matrix; its leading eigenvalues are sigma_i(S)^2 / E (Di Carlo, Goddard,
Schwab, arXiv 2512.06297, figure 2D), which are those of the small Gram matrix S S^T / E too.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..._torch.memory_budget import available_bytes, readable, resolve_budget, too_small
from ..._torch.torch_compile import clean_dispatch_state
from ..._utils import checks
from ...objective import Objective
from ...objective._objective import require_objective
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
    """The score matrix: row e is d loss_e / d theta.  # [E, P]

    Scores are gradients of the data term: weight decay of the objective is no part of them, nor of
    what is computed from them (norms, Gram, Fisher and kernel matrices).

    Args:
        obj: an objective whose examples do not influence one another.
        theta: the point; None for the model's own.  # [P]
        max_examples: E, the first so many examples; None for all N.

    Returns:
        in the objective's dtype; in float32 for a model of half precision.

    Raises:
        ValueError: normalization by batch statistics; a matrix larger than the free memory
            (`score_gram` needs no whole matrix); a NaN or infinite gradient.

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
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
    *,
    products: str = "float64",
    strategy: str = "auto",
    group_by: None = None,
) -> Tensor: ...


@overload
def score_gram(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
    *,
    products: str = "float64",
    strategy: str = "auto",
    group_by: str,
) -> dict[str, Tensor]: ...


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
    """The Gram matrix S S^T of the scores, accumulated in float64.  # [E, E]

    The score matrix is never whole in memory. `score_plan` says beforehand how it is done, and
    the log (logger "entropic_fast", level INFO) while it is.

    Args:
        obj, theta, max_examples: as for `score_matrix`.
        memory_budget: bytes to stay under, the result included; None for a quarter of the free
            memory, half on a GPU. What the process holds beforehand is not counted, nor are the two
            examples that the first call on a model compares with `torch.func` (some 8 P numbers).
        products: "float64", exact to float64's rounding for the scores as computed; or
            "float32": sums of 256 products of float32 accumulated in float64, so that entry
            (i, j) is off by some 1e-8 |s_i| |s_j|. On CPUs it is about twice as fast. GPUs with
            float64 tensor cores (A100, H100, H200, B200) should gain nothing from it, most others,
            with float64 at 1/32 or 1/64 of float32's rate, most of that; neither is measured.
        strategy: "auto", or one of "memory", "disk", "recompute" (see `score_plan`).
        group_by: None for the whole; "parameter" or "module" for the share of each, by name. The
            shares add up to the whole.

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
    """How `score_gram` would go about it, without doing it: `print(score_plan(obj))`.

    "memory": one pass, keeping for every parameter each example's gradient or the activations
    and output gradients that make it, whichever is smaller; "disk": the same in temporary
    files, removed afterwards; "recompute": blocks of rows, more than one pass, where there is
    no disk. The first that fits the budget is taken. The plan also says how many parameters go
    by layer rules, as a copy an example, and by `torch.func`.

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
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
    *,
    products: str = "float64",
    strategy: str = "auto",
    group_by: None = None,
) -> Tensor: ...


@overload
def score_spectrum(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    memory_budget: int | None = None,
    *,
    products: str = "float64",
    strategy: str = "auto",
    group_by: str,
) -> dict[str, Tensor]: ...


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
    """Leading eigenvalues of the empirical Fisher matrix S^T S / E, descending.  # [min(E, P)]

    In float64, from the smaller of S S^T and S^T S. Negative values, which only rounding
    makes, are returned as 0. Eigenvalues under `score_spectrum_floor` are rounding, not data.

    Args:
        obj, theta, max_examples, memory_budget, products: as for `score_gram`.
        strategy: as for `score_gram`; where E > P for the whole there is nothing to keep, and it
            makes no difference: S^T S is added up chunk by chunk in one pass.
        group_by: None for the whole; "parameter" or "module" for the diagonal block of each, by
            name.

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
    tall = group_by is None and count > obj.num_params
    size = obj.num_params if tall else count
    key = grouping(group_by)
    sizes: dict[str, int] = {}
    for name, part in obj.split(obj.point(theta)).items():
        sizes[key(name)] = sizes.get(key(name), 0) + part.numel()
    # Records are gone when the eigenvalue solver, which overwrites a copy and has a workspace of
    # its own, begins; the matrices are still there.
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
    """The level under which eigenvalues of `score_spectrum` are rounding.

    Three sources. Scores rounded to `dtype` move each singular value of S by up to about
    8 eps ||S||_F (8 for the growth of rounding through a network's layers), so an eigenvalue
    that is zero comes out as much as (8 eps)^2 times the sum of all. The float64 eigenvalue
    solver errs by the matrix's order times its eps times the largest. And float32 products add
    an error of at most some 8 eps |s_i| |s_j| / sqrt(P / 256) to entry (i, j), so of 8 eps
    times the sum of all eigenvalues over sqrt(P / 256).

    Args:
        spectrum: eigenvalues from `score_spectrum`, of one matrix; 0 for none.  # [n]
        dtype: the objective's dtype, in which the scores were computed.
        products: as given to `score_spectrum`.
        num_params: P, for float32 products; None counts it as if it were at most 256.

    Raises:
        ValueError: no tensor [n] of finite values; the dictionary of
            `score_spectrum(group_by=...)`, whose every value has a floor of its own.

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
    """S^T S accumulated in float64.  # [P, P]"""
    size = 8 * obj.num_params**2
    gradients = ExampleGradients(obj, theta, memory_budget=2**62)
    # A chunk's rows are transposed once more.
    each = gradients.example_bytes + gradients.row_bytes
    if room < size + each:
        raise too_small(
            size + each,
            room,
            f"the spectrum of {count} examples and {obj.num_params} parameters",
            "give more memory, or fewer max_examples",
        )
    gradients.chunk = gradients.chunk_within((room - size) * gradients.example_bytes // each)

    def own() -> Tensor:
        moment = torch.zeros(obj.num_params, obj.num_params, dtype=torch.float64, device=obj.device)
        for _, chunk in gradients.local_chunks(count):
            symmetric_update_(moment, chunk.T.contiguous(), double_products=double_products)
        return moment

    moment = obj.all_reduce(own, f"second moment of {count} scores", gradients.theta)
    mirror_lower(moment)
    return moment


def _eigenvalues(obj: Objective, matrix: Tensor, count: int, size: int) -> Tensor:
    """Eigenvalues of matrix / count, descending; one of the processes that share work takes
    them for all."""

    def one_takes() -> Tensor:
        if obj.communicator is not None and obj.communicator.rank:
            return matrix.new_zeros(len(matrix))
        found: Tensor = torch.linalg.eigvalsh(matrix)
        return found

    eigenvalues = obj.all_reduce(one_takes, "eigenvalues")
    return (eigenvalues / count).clamp(min=0).flip(0)[:size]
