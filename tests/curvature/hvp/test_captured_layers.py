"""Layers that need a decomposition, or another way than the rules, against autograd alone."""

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.nn import functional

from entropic_fast._torch.derivative_checks import cdist_is_right
from entropic_fast.curvature import GGNOperator, HessianOperator, JacobianOperator, autograd_only
from entropic_fast.objective import Objective
from entropic_fast.training.models import resnet

KINDS = (HessianOperator, GGNOperator, JacobianOperator)


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function, width: int = 8) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(2 * self.first(x)))


def grid_sampled(h: Tensor) -> Tensor:
    """Both the image and where it is read move."""
    image, grid = h.view(-1, 1, 2, 4), h.tanh().view(-1, 2, 2, 2)
    return functional.grid_sample(image, grid, align_corners=False).flatten(1).repeat(1, 2)


def matrix_exponential(h: Tensor) -> Tensor:
    return torch.matrix_exp(0.5 * h.view(-1, 2, 2)).flatten(1).reshape(-1, 8)


def in_place(h: Tensor) -> Tensor:
    return functional.hardsigmoid(h + 0, inplace=True)


def cosines(h: Tensor) -> Tensor:
    return functional.cosine_similarity(h[:, None], h[:, None].flip(2) * h[:, :, None], dim=2)


BY_RULES = {
    "normalize": functional.normalize,
    "cosine_similarity": cosines,
    "mish": functional.mish,
    "hardsigmoid": functional.hardsigmoid,
    "hardsigmoid in place": in_place,
    "hardswish": functional.hardswish,
    "grid_sample": grid_sampled,
    "matrix_exp": matrix_exponential,
}
COMPLEX = {
    "fft": lambda h: torch.fft.irfft(torch.fft.rfft(h) ** 2, n=8),
    "view_as_complex": lambda h: torch.view_as_real(
        torch.view_as_complex(h.view(-1, 4, 2)) ** 2
    ).flatten(1),
    "polar": lambda h: torch.polar(h.abs() + 1, h).real,
}


def objective(model: nn.Module, x: Tensor) -> Objective:
    return Objective(model.double(), "cross_entropy", (x.double(), torch.arange(len(x)) % 3))


def between(function) -> Objective:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return objective(Between(function), torch.randn(4, 5))


def assert_both_ways_agree(obj: Objective, way: str) -> None:
    vectors = torch.randn(
        obj.num_params, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    for kind in KINDS:
        operator = kind(obj)
        assert operator.method.startswith(way), operator.method
        with autograd_only():
            other = kind(obj)
        expected = other @ vectors
        assert relative_error(operator @ vectors, expected) < 1e-10
        if kind is JacobianOperator:
            assert relative_error(operator.T @ expected, other.T @ expected) < 1e-10


def torch_differentiates_grid_sample_twice() -> bool:
    h = torch.zeros(1, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(grid_sampled(h).sum(), h, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), h)
    except RuntimeError as error:
        assert "not implemented" in str(error)
        return False
    return True


@pytest.mark.parametrize("name", BY_RULES)
def test_products_go_by_rules(name: str):
    if name == "grid_sample" and not torch_differentiates_grid_sample_twice():
        pytest.skip(f"torch {torch.__version__} has no second derivative to compare with")
    assert_both_ways_agree(between(BY_RULES[name]), "graph")


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_go_to_autograd(name: str):
    assert_both_ways_agree(
        between(COMPLEX[name]), "autograd: the model computes with complex numbers"
    )


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [pooled, lambda: resnet(8, width=2)], ids=["pooled", "resnet"])
def test_images_of_either_layout_go_by_rules(make, layout: torch.memory_format):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, x = make(), torch.randn(2, 3, 8, 8)
    assert_both_ways_agree(objective(model, x.to(memory_format=layout)), "graph")


def test_channels_last_inside_the_model_go_by_rules():
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = pooled()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.contiguous(memory_format=torch.channels_last))

    with torch.random.fork_rng():
        torch.manual_seed(5)
        obj = objective(Inside(), torch.randn(2, 3, 8, 8))
    assert_both_ways_agree(obj, "graph")


def test_the_hard_sigmoid_has_its_second_derivative_without_rules():
    """By central differences of the gradient."""
    obj = between(functional.hardsigmoid)
    theta, step = obj.parameters_vector(), 1e-5
    v = torch.linspace(-1, 1, len(theta), dtype=torch.float64)
    expected = (obj.gradient(theta + step * v) - obj.gradient(theta - step * v)) / (2 * step)
    with autograd_only():
        operator = HessianOperator(obj)
    assert relative_error(operator @ v, expected) < 1e-7


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(7, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.bag(tokens))


@pytest.mark.parametrize("rules", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_differentiates_once_is_refused_by_name(kind: type, rules: bool):
    bag = Objective(Bag().double(), "cross_entropy", (torch.arange(6).view(3, 2), torch.arange(3)))
    operator = kind(bag)
    if not rules:
        with autograd_only():
            operator = kind(bag)
    with pytest.raises(RuntimeError, match=r"nn\.EmbeddingBag: .* use nn\.Embedding"):
        operator @ torch.ones(bag.num_params, dtype=torch.float64)


def far(h: Tensor) -> Tensor:
    return torch.cdist(h[:, None], h.view(-1, 8, 1) * torch.ones(8).double(), p=3)[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_right_or_refused_by_name(kind: type, monkeypatch):
    obj = between(far)
    if cdist_is_right():
        assert_both_ways_agree(obj, "")
    monkeypatch.setattr("entropic_fast._torch.graph_checks.cdist_is_right", lambda: False)
    with autograd_only():
        operator = kind(obj)
    with pytest.raises(RuntimeError, match=r"torch\.cdist: "):
        operator @ torch.ones(obj.num_params, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it is imported
@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_module_is_taken_for_the_one_it_was_made_from(inside: bool):
    """Nothing is compiled, as it never runs."""
    model = Between(functional.gelu).double()
    if inside:
        given = Between(functional.gelu).double()
        given.load_state_dict(model.state_dict())
        given.first = torch.compile(given.first, backend="eager")
    else:
        given = torch.compile(model, backend="eager")
    x = torch.randn(4, 5, dtype=torch.float64)
    obj, plain = objective(given, x), objective(model, x)
    assert obj.parameter_names == plain.parameter_names
    assert_both_ways_agree(obj, "graph")
    if inside:
        assert type(given.first).__name__ == "OptimizedModule"  # the model given is unchanged
    obj.load_into(given, plain.parameters_vector() + 1)
    assert torch.equal(objective(given, x).parameters_vector(), plain.parameters_vector() + 1)


@pytest.mark.parametrize("chosen", ["*.bias", "1.bias", "1.weight", "0.*"])
def test_a_normalization_with_frozen_parameters_goes_by_the_graph(chosen: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    obj = Objective(model, "cross_entropy", data, parameters=chosen)
    eye = torch.eye(obj.num_params, dtype=torch.float64)
    for make in (HessianOperator, GGNOperator):
        with autograd_only():
            expected = make(obj) @ eye
        operator = make(obj)
        assert relative_error(operator @ eye, expected) < 1e-10
        assert operator.method == "graph"


class Parallel(nn.Module):
    """Normalizations of one tensor, with statistics and weights of their own."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norms = nn.ModuleList(nn.BatchNorm1d(4, affine=affine) for _ in range(3))
        for i, norm in enumerate(self.norms):
            norm.running_mean += 0.3 * i
            norm.running_var += i
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        one, two, three = (norm(x) for norm in self.norms)
        return self.last(one.relu() * two.tanh() + three)


@pytest.mark.parametrize("affine", [False, True])
def test_normalizations_of_one_tensor_go_by_the_graph(affine: bool):
    torch.manual_seed(0)
    model = Parallel(affine).double()
    data = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    obj = Objective(model, "cross_entropy", data)
    eye = torch.eye(obj.num_params, dtype=torch.float64)
    with autograd_only():
        expected = HessianOperator(obj) @ eye
    operator = HessianOperator(obj)
    assert relative_error(operator @ eye, expected) < 1e-10
    assert relative_error(operator.quadratic_forms(eye), expected.diagonal()) < 1e-10
    assert operator.method == "graph"
