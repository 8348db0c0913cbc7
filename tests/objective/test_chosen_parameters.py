"""Objective(parameters=...): theta of some of a model's parameters, the others constants."""

import copy

import pytest
import torch
from relax_cases import relax_with
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast.objective import Objective


class Tied(nn.Module):
    """An embedding tied to the output layer, between them a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embed(x).mean(1))))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.Tanh(),
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)),
        nn.Linear(4, 3),
    ).double()


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 4).double(), torch.arange(n) % 3


def places(model: nn.Module, names: tuple[str, ...]) -> Tensor:
    """Where parameters lie in the vector of all."""
    index, start = [], 0
    for name, p in model.named_parameters():
        if name in names:
            index += range(start, start + p.numel())
        start += p.numel()
    return torch.tensor(index)


CHOICES = [
    ("3.*", ("3.weight", "3.bias")),
    ("3", ("3.weight", "3.bias")),
    ("2", ("2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias")),
    ("*.bias", ("0.bias", "2.0.bias", "2.1.bias", "3.bias")),
    (["2.1", "0.weight"], ("0.weight", "2.1.weight", "2.1.bias")),
    ("2.?", ("2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias")),
    (lambda m: m[3], ("3.weight", "3.bias")),
    (
        lambda m: [m[0].weight, m[2]],
        ("0.weight", "2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"),
    ),
    (lambda m: m[3].parameters(), ("3.weight", "3.bias")),
    (lambda m: m[0].bias, ("0.bias",)),
    ("*", tuple(n for n, _ in network().named_parameters())),
]


@pytest.mark.parametrize(("chosen", "names"), CHOICES)
@pytest.mark.parametrize("loss", ["cross_entropy", lambda out, y: out.square().sum(1)])
def test_everything_is_that_of_the_block(chosen, names: tuple[str, ...], loss):
    model = network().eval()
    full = Objective(model, loss, data(), batch_size=4)
    chosen = chosen(model) if callable(chosen) else chosen
    obj = Objective(model, loss, data(), batch_size=4, parameters=chosen)
    at = places(model, names)
    assert obj.parameter_names == names
    assert torch.equal(obj.parameters_vector(), full.parameters_vector()[at])
    assert obj.loss() == full.loss()
    assert torch.allclose(obj.gradient(), full.gradient()[at], atol=1e-14)
    assert torch.allclose(ef.score_matrix(obj), ef.score_matrix(full)[:, at], atol=1e-13)
    for operator in (ef.HessianOperator, ef.GGNOperator):
        block, whole = operator(obj), operator(full)
        expected = (whole @ torch.eye(full.num_params).double())[at][:, at]
        assert torch.allclose(block @ torch.eye(len(at)).double(), expected, atol=1e-12)
        assert block.method == whole.method
    expected = ef.HessianOperator(full) @ torch.eye(full.num_params).double()
    block = expected[at][:, at]
    largest = torch.linalg.eigvalsh(block)[-1]
    found = ef.top_eigenvalues(ef.HessianOperator(obj), 1, tol=1e-6)
    assert float(found.values[0]) == pytest.approx(float(largest), rel=1e-5, abs=1e-9)


def test_products_at_other_points_hold_the_others_fixed():
    model = network().eval()
    obj = Objective(model, "cross_entropy", data(), parameters="3")
    theta = obj.parameters_vector() + 0.3
    moved = copy.deepcopy(model)
    obj.load_into(moved, theta)
    for name, p in moved.named_parameters():
        same = torch.equal(p, model.get_parameter(name))
        assert same == (not name.startswith("3."))
    assert obj.loss(theta) == Objective(moved, "cross_entropy", data()).loss()
    path = ef.linear_path(obj.parameters_vector(), theta, 3)
    relaxed = ef.relax(obj, path, 0.5, ef.ProjectedSGD(0.1, 3, steps=3), replicas=2)
    assert bool(torch.isfinite(relaxed.position).all())
    assert obj.double().with_norm("batch").num_params == 15


@pytest.mark.parametrize("pattern", ["embed", "embed.weight", "head.weight"])
def test_a_tied_parameter_goes_by_its_first_name(pattern: str):
    model = Tied().double()
    x, y = torch.arange(12).view(6, 2) % 5, torch.arange(6) % 5
    obj = Objective(model, "cross_entropy", (x, y), parameters=pattern)
    full = Objective(model, "cross_entropy", (x, y))
    assert obj.parameter_names == ("embed.weight",)
    found = ef.HessianOperator(obj) @ torch.eye(15).double()
    expected = ef.HessianOperator(full) @ torch.eye(full.num_params).double()
    assert torch.allclose(found, expected[:15, :15], atol=1e-12)
    assert torch.allclose(ef.score_matrix(obj), ef.score_matrix(full)[:, :15], atol=1e-12)


def test_what_is_chosen_need_not_require_a_gradient():
    model = network().eval()
    expected = Objective(model, "cross_entropy", data(), parameters="0").gradient()
    for p in model.parameters():
        p.requires_grad_(False)
    obj = Objective(model, "cross_entropy", data(), parameters="0")
    assert torch.equal(obj.gradient(), expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_complex_parameters_are_chosen_too():
    torch.manual_seed(0)

    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.layer = nn.Linear(4, 3, dtype=torch.cfloat)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.first(x).to(torch.cfloat)).abs()

    full = Objective(Waves(), "cross_entropy", data())
    obj = Objective(Waves(), "cross_entropy", data(), parameters="layer.bias")
    assert obj.num_params == 6
    full = Objective(obj.module, "cross_entropy", data(), parameters="*")
    assert torch.allclose(obj.gradient(), full.gradient()[-6:], atol=1e-7)


def test_names_with_and_without_wrappers_are_taken():
    wrapped = torch.optim.swa_utils.AveragedModel(network().eval())
    for pattern in ("3.*", "module.3.*", "module.3", "3"):
        obj = Objective(wrapped, "cross_entropy", data(), parameters=pattern)
        assert obj.parameter_names == ("3.weight", "3.bias")
    assert Objective(
        wrapped, "cross_entropy", data(), parameters=wrapped.module[3]
    ).parameter_names == ("3.weight", "3.bias")


@pytest.mark.parametrize("pattern", ["0.weight", "0.w*", "0"])
def test_a_computed_weight_stands_for_what_it_is_computed_from(pattern: str):
    model = network()
    nn.utils.parametrizations.weight_norm(model[0])
    obj = Objective(model, "cross_entropy", data(), parameters=pattern)
    of = ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1")
    assert obj.parameter_names == (("0.bias", *of) if pattern == "0" else of)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("heads.*", r"'heads\.\*', which matches none; .*the names are 0\.weight, 0\.bias"),
        ("2.0.wieght", r"did you mean '2\.0\.weight'"),
        (["3", "layer4"], r"'layer4', which matches none"),
        ([], "an empty sequence"),
        (3, "got int 3"),
        ([3], "got int 3"),
        (nn.Linear(4, 3), "take them from that very model"),
        (nn.Tanh(), "take them from that very model"),
        ([nn.Parameter(torch.ones(3))], "take them from that very model"),
    ],
)
def test_what_matches_nothing_is_refused(chosen, message: str):
    with pytest.raises(ValueError, match=rf"^parameters: expected .*{message}"):
        Objective(network(), "cross_entropy", data(), parameters=chosen)


def test_many_names_are_not_listed_whole():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(300)])
    with pytest.raises(ValueError, match="and 592 more") as refusal:
        Objective(model, "cross_entropy", data(), parameters="x")
    assert len(str(refusal.value)) < 400


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = network(), nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_parameters_without_influence_are_refused():
    with pytest.raises(ValueError, match="a loss that depends on the trainable parameters"):
        Objective(Unused(), "cross_entropy", data(), parameters="spare")


def test_a_state_dict_is_no_model():
    with pytest.raises(ValueError, match="load a state dict into the model that it is of"):
        Objective(network().state_dict(), "cross_entropy", data())


class Experts(nn.Module):
    """Of two experts, one for each example; an example uses none of the other's parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.experts[int(one[0] > 0)](one[None]) for one in x])


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_examples_may_use_no_chosen_parameter(batch_size: int):
    x, y = data()
    x[:, 0] = torch.tensor([1.0, 1, -1, -1, -1, 1])
    arguments = (Experts().double(), "cross_entropy", (x, y))
    full = Objective(*arguments, batch_size=batch_size)
    obj = Objective(*arguments, batch_size=batch_size, parameters="experts.1")
    assert torch.allclose(obj.gradient(), full.gradient()[15:], atol=1e-14)
    assert torch.allclose(ef.score_matrix(obj), ef.score_matrix(full)[:, 15:], atol=1e-14)
    identity = torch.eye(15).double()
    for operator in (ef.HessianOperator, ef.GGNOperator):
        expected = (operator(full) @ torch.eye(30).double())[15:, 15:]
        assert torch.allclose(operator(obj) @ identity, expected, atol=1e-13)
    jacobian = ef.JacobianOperator(full) @ torch.eye(30).double()
    assert torch.allclose(ef.JacobianOperator(obj) @ identity, jacobian[:, 15:], atol=1e-13)
    path = ef.linear_path(obj.parameters_vector(), obj.parameters_vector() + 0.1, 3)
    settings = {"lr": 0.1, "batch_size": 1, "steps": 6, "replicas": 2}
    runs = [relax_with(obj, path, 0.5, backend=e, **settings).position for e in ("loop", "threads")]
    assert torch.allclose(*runs, atol=1e-12)
    config = ef.AutoNEBConfig(pivots=3, batch_size=1, cycles=[(4, 0.01)])
    result = ef.auto_neb(obj, obj.parameters_vector(), obj.parameters_vector() + 0.1, config)
    assert bool(torch.isfinite(result.path.pivots).all())
