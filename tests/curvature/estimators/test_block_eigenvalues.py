"""Eigenvalues of the diagonal blocks of an objective's operators, by parameter and by module."""

import pytest
import torch
from cases import by_name
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast.curvature.estimators._eigenvalues import DiagonalBlock
from entropic_fast.curvature.estimators._searches import run_blocks
from entropic_fast.curvature.operators._algebra import as_operator
from entropic_fast.ops.random_bits import streams as random

KINDS = {"hessian": ef.HessianOperator, "ggn": ef.GGNOperator, "fisher": ef.FisherOperator}
MODELS = ["transformer layer", "tied weight", "residual in place", "layer norm"]


def dense(operator: object, size: int) -> Tensor:
    """The matrix by its columns, one by one."""
    eye = torch.eye(size, dtype=operator.dtype)
    matrix = torch.stack([operator @ column for column in eye], 1)
    return (matrix + matrix.T) / 2


def groups(obj: ef.Objective, group_by: str) -> dict[str, list[int]]:
    """Places of each group, by a walk over parameters of its own."""
    found: dict[str, list[int]] = {}
    at = 0
    for name, part in obj.split(obj.parameters_vector()).items():
        key = name if group_by == "parameter" else name[: name.rfind(".")] if "." in name else ""
        found.setdefault(key, []).extend(range(at, at + part.numel()))
        at += part.numel()
    return found


def wanted(values: Tensor, which: str, k: int) -> Tensor:
    k = min(k, len(values))
    if which == "LA":
        return values.flip(0)[:k]
    if which == "SA":
        return values[:k]
    if which == "LM":
        return values[values.abs().argsort(descending=True)][:k]
    return torch.cat([values[: k // 2], values[len(values) - (k + 1) // 2 :]]).flip(0)


@pytest.mark.parametrize("group_by", ["module", "parameter"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_each_block_has_the_eigenvalues_of_the_dense_one(name: str, kind: str, group_by: str):
    obj = by_name(name).objective()
    matrix = dense(KINDS[kind](obj), obj.num_params)
    pairs = ef.top_eigenvalues(KINDS[kind](obj), 3, tol=1e-8, group_by=group_by)
    places = groups(obj, group_by)
    assert list(pairs) == list(places)
    scale = float(matrix.abs().max())
    for key, place in places.items():
        block = matrix[place][:, place]
        got, k = pairs[key], min(3, len(place))
        assert got.converged and got.values.shape == got.residuals.shape == (k,)
        assert got.vectors.shape == (len(place), k)
        exact = torch.linalg.eigvalsh(block).flip(0)[:k]
        assert torch.allclose(got.values, exact, atol=1e-8 * scale, rtol=1e-6)
        rest = block @ got.vectors - got.vectors * got.values
        assert torch.allclose(rest.norm(dim=0), got.residuals, atol=1e-11 * scale, rtol=0.05)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_all_ends_and_more_pairs_than_a_block_has(which: str, k: int):
    obj = by_name("residual in place").objective()
    operator = ef.HessianOperator(obj)
    matrix = dense(operator, obj.num_params)
    pairs = ef.top_eigenvalues(operator, k, tol=1e-9, which=which, group_by="parameter")
    for key, place in groups(obj, "parameter").items():
        exact = wanted(torch.linalg.eigvalsh(matrix[place][:, place]), which, k)
        got = pairs[key].values
        if which == "LM":
            got, exact = got.abs(), exact.abs()
        assert torch.allclose(got, exact, atol=1e-9), key


def test_one_group_is_the_operator_itself():
    obj = ef.Objective(
        nn.Linear(4, 2).double(), "mse", (random.normal((9, 4), 0), torch.ones(9, 2))
    )
    operator = ef.HessianOperator(obj)
    (pairs,) = ef.top_eigenvalues(operator, 3, tol=1e-10, group_by="module").values()
    assert torch.allclose(pairs.values, ef.top_eigenvalues(operator, 3, tol=1e-10).values)


class Wide(nn.Module):
    """Parameters of the module itself among those of its parts, and one without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.none = nn.Parameter(torch.zeros(0))
        self.first, self.last = nn.Linear(5, 30), nn.Linear(30, 3)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(torch.tanh(self.first(x))) + self.shift


def wide(dtype: torch.dtype = torch.float64) -> ef.Objective:
    torch.manual_seed(0)
    data = (torch.randn(16, 5, dtype=dtype), torch.arange(16) % 3)
    return ef.Objective(Wide().to(dtype), "cross_entropy", data)


def test_the_roots_own_parameters_are_one_group():
    obj = wide()
    pairs = ef.top_eigenvalues(ef.HessianOperator(obj), 2, tol=1e-9, group_by="module")
    assert list(pairs) == ["", "first", "last"] and pairs[""].vectors.shape == (6, 2)
    matrix = dense(ef.HessianOperator(obj), obj.num_params)
    for key, place in groups(obj, "module").items():
        exact = torch.linalg.eigvalsh(matrix[place][:, place]).flip(0)[:2]
        assert torch.allclose(pairs[key].values, exact, atol=1e-9)


def test_blocks_share_products():
    """The columns of all blocks go to the operator up to eight at once."""
    obj = wide()

    widths: list[int] = []

    class Recorded(ef.HessianOperator):
        def _product(self, columns: Tensor) -> Tensor:
            widths.append(columns.shape[1])
            return super()._product(columns)

    operator = Recorded(obj)
    pairs = ef.top_eigenvalues(operator, 1, group_by="parameter")
    spent = sum(p.matvecs for p in pairs.values())
    assert operator.products == spent == sum(widths)
    assert max(widths) > 3 and len(widths) < spent / 2
    assert max(widths) <= 8


def test_a_warm_start_by_name_saves_products():
    obj = wide()
    operator = ef.HessianOperator(obj)
    cold = ef.top_eigenvalues(operator, 2, group_by="module")
    warm = ef.top_eigenvalues(operator, 2, v0=cold, group_by="module")
    assert warm["first"].matvecs < cold["first"].matvecs
    one = ef.top_eigenvalues(operator, 2, v0={"last": cold["last"].vectors}, group_by="module")
    assert one["first"].matvecs == cold["first"].matvecs > one["last"].matvecs


def test_float32_and_max_matvecs_for_each_block():
    obj = wide(torch.float32)
    operator = ef.HessianOperator(obj)
    told = r'group_by="module": \(3 times; the first:\) block "": .*raise max_matvecs'
    with pytest.warns(ef.NotConvergedWarning, match=told) as seen:
        pairs = ef.top_eigenvalues(operator, 1, 1e-6, max_matvecs=3, group_by="module")
    assert len(seen) == 1
    assert all(p.matvecs <= 3 + 1 and p.values.dtype == torch.float32 for p in pairs.values())
    assert not pairs["first"].converged


def test_what_has_no_blocks_is_refused():
    obj = wide()
    operator = ef.HessianOperator(obj)
    with pytest.raises(ValueError, match="operator: expected one of an objective with group_by"):
        ef.top_eigenvalues(torch.eye(4), group_by="module")
    with pytest.raises(ValueError, match="group_by: expected one of 'parameter', 'module'"):
        ef.top_eigenvalues(operator, group_by="layer")
    with pytest.raises(ValueError, match="v0: expected starts by name"):
        ef.top_eigenvalues(operator, v0={"middle": torch.ones(3)}, group_by="module")
    with pytest.raises(ValueError, match="v0: expected starts by name"):
        ef.top_eigenvalues(operator, v0=torch.ones(obj.num_params), group_by="module")
    with pytest.raises(ValueError, match="starts by name need group_by"):
        ef.top_eigenvalues(operator, v0={"first": torch.ones(3)})


def test_a_block_by_itself_is_an_operator():
    matrix = random.normal((6, 6), 1)
    place = torch.tensor([1, 4, 5])
    block = DiagonalBlock(as_operator(matrix), place)
    vectors = random.normal((3, 2), 2)
    assert torch.allclose(block @ vectors, matrix[place][:, place] @ vectors)

    def product(vectors: Tensor):
        return (yield vectors, True)

    found = run_blocks(
        as_operator(matrix), [product(vectors), product(vectors[:1])], [place, place[:1]], 2
    )
    assert torch.allclose(found[0], block @ vectors)
    assert torch.allclose(found[1], matrix[1, 1] * vectors[:1])
