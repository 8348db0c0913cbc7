"""Products within compiled functions, and under torch's switches for derivatives."""

import copy
import gc
import shutil

import pytest
import torch
from cases import by_name
from torch import Tensor

from entropic_fast._torch.torch_compile import _operators
from entropic_fast.curvature import FisherOperator, GGNOperator, HessianOperator

KINDS = [HessianOperator, GGNOperator, FisherOperator]
BACKENDS = ["eager", "aot_eager"] + ["inductor"] * (shutil.which("g++") is not None)
kinds = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", BACKENDS)
# By rules; by autograd; with attention, which needs forward mode within vmap.
names = pytest.mark.parametrize("name", ["tied weight", "data-dependent branch", "attention"])
# torch's own, of its compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def compiled(function, backend: str = "aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


@names
@backends
def test_a_compiled_first_product_is_that_of_eager_mode(name: str, backend: str):
    """The first product captures the model, within an operation of the compiled graph."""
    for kind in KINDS:
        obj = by_name(name).objective()
        operator, v = kind(obj), randn(obj.num_params)
        got = compiled(lambda v, operator=operator: (operator @ (2 * v)) * 2, backend)(v)
        assert operator.products == 1
        assert torch.equal(got, (kind(obj) @ (2 * v)) * 2)
        block = randn(obj.num_params, 3)
        got = compiled(lambda v, operator=operator: operator @ v, backend)(block)
        assert torch.equal(got, kind(obj) @ block)


@names
def test_compiled_forms_are_those_of_eager_mode(name: str):
    for kind in KINDS:
        obj = by_name(name).objective()
        operator, block = kind(obj), randn(obj.num_params, 3)
        got = compiled(lambda v, operator=operator: operator.quadratic_forms(v) + 1)(block)
        assert torch.equal(got, kind(obj).quadratic_forms(block) + 1)


def test_compiled_forms_of_a_single_vector():
    obj = by_name("tied weight").objective()
    operator, v = HessianOperator(obj), randn(obj.num_params)
    got = compiled(lambda v: operator.quadratic_forms(v))(v)
    assert torch.equal(got, operator.quadratic_forms(v)) and got.shape == (1,)


def test_two_operators_in_one_function():
    obj = by_name("tied weight").objective()
    first, second = HessianOperator(obj), GGNOperator(obj, obj.parameters_vector() + 0.5)
    v = randn(obj.num_params)
    assert torch.equal(compiled(lambda v: first @ (second @ v))(v), first @ (second @ v))


@kinds
def test_opcheck_passes(kind):
    obj = by_name("tied weight").objective()
    operator, vectors = kind(obj), randn(obj.num_params, 3)
    ops = torch.ops.entropic_fast
    for given in (vectors, vectors[:, 0]):
        product = (given, operator._number, obj.num_params)
        torch.library.opcheck(ops.operator_product.default, product)
        torch.library.opcheck(ops.operator_forms.default, (given, operator._number))


def test_products_in_a_loop():
    def power(operator: HessianOperator, v: Tensor) -> Tensor:
        for _ in range(3):
            v = operator @ v
            v = v / v.norm()
        return v

    obj = by_name("tied weight").objective()
    function, v = compiled(power), randn(obj.num_params)
    for shift in range(4):  # operators as arguments, each another
        operator = HessianOperator(obj, obj.parameters_vector() + shift)
        assert torch.allclose(function(operator, v), power(operator, v), rtol=1e-12)
        assert operator.products == 6


def test_a_freed_operator_is_not_mistaken_for_another():
    obj = by_name("tied weight").objective()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    operator, v = HessianOperator(obj), randn(obj.num_params)
    function = compiled(lambda v: operator @ v, keep)
    before = function(v)
    operator = HessianOperator(obj, obj.parameters_vector() + 0.5)
    gc.collect()
    assert torch.equal(function(v), operator @ v)
    assert not torch.allclose(operator @ v, before)
    with pytest.raises(ReferenceError, match="an operator that no longer exists"):
        graphs[0](v)


def test_copies_are_operators_of_their_own():
    obj = by_name("tied weight").objective()
    operator, v = HessianOperator(obj), randn(obj.num_params)
    for copied in (copy.copy(operator), copy.deepcopy(operator)):
        assert _operators[copied._number] is copied and _operators[operator._number] is operator
        assert torch.equal(compiled(lambda v, copied=copied: copied @ v)(v), operator @ v)


def test_square_blocks_are_refused_where_the_sides_cannot_be_told_apart():
    obj = by_name("tied weight").objective()
    operator, block = HessianOperator(obj), randn(obj.num_params, obj.num_params)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"write A\.multiply\(v\)"):
        compiled(lambda v: operator @ v)(block)
    assert torch.equal(compiled(lambda v: operator.multiply(v))(block), operator @ block)


def test_bad_vectors_are_refused_in_compiled_functions_too():
    obj = by_name("tied weight").objective()
    operator = HessianOperator(obj)
    with pytest.raises(ValueError, match="vectors: expected a tensor of shape"):
        compiled(lambda v: operator @ v)(randn(obj.num_params + 1))


def test_operators_are_no_arguments_of_torchs_functions():
    obj = by_name("tied weight").objective()
    operator, v = HessianOperator(obj), randn(obj.num_params)
    for wrong in (
        lambda: v @ operator,
        lambda: torch.matmul(operator, v),
        lambda: torch.exp(operator),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match=r"a square shape \[P, P\]"):  # a matrix may be added
        _ = v + operator


def test_a_product_has_no_gradient_compiled_or_not():
    obj = by_name("tied weight").objective()
    operator, v = HessianOperator(obj), randn(obj.num_params).requires_grad_()
    assert not (operator @ v).requires_grad
    assert not compiled(lambda v: operator @ v)(v).requires_grad


@names
@kinds
@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_switches_for_derivatives_do_not_matter(name: str, kind: type, switch: type):
    v = randn(by_name(name).objective().num_params, 2)
    plain = kind(by_name(name).objective())
    expected, forms = plain @ v, plain.quadratic_forms(v)
    for inside in (False, True):
        obj = by_name(name).objective()
        operator = kind(obj)
        with switch():
            vectors = v + 0
            operator = kind(obj) if inside else operator
            assert torch.equal(operator @ vectors, expected)
            assert torch.equal(kind(obj) @ vectors[:, 0].clone(), kind(obj) @ v[:, 0])
            assert torch.equal(operator.quadratic_forms(vectors), forms)
