"""Models in wrappers, with weights that hooks compute, or with tensors of a forward pass."""

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from relax_cases import relax_with
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from entropic_fast import HessianOperator, gradient_norms, hessian_trace, score_matrix
from entropic_fast.curvature.per_example._engine import PerExampleGradEngine
from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator).double(), torch.arange(n) % 3


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean loss, through the module itself."""
    loss = nn.functional.cross_entropy(model(x), y)
    found = torch.autograd.grad(loss, parameters(model), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """By double backward."""
    loss, own = nn.functional.cross_entropy(model(x), y), parameters(model)
    first = torch.autograd.grad(loss, own, create_graph=True)
    rows = [
        torch.autograd.grad(entry, own, retain_graph=True, materialize_grads=True)
        for entry in torch.cat([g.flatten() for g in first])
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def differences(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same by central differences, as torch has weight normalization wrong."""
    rows = []
    for p in parameters(model):
        flat = p.detach().view(-1)
        for i in range(p.numel()):
            before, sides = float(flat[i]), []
            for step in (1e-5, -1e-5):
                flat[i] = before + step
                sides.append(gradient(model, x, y))
            flat[i] = before
            rows.append((sides[0] - sides[1]) / 2e-5)
    return torch.stack(rows)


def scores(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of single examples, one backward pass each."""
    return torch.stack([gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])


# -- wrappers ------------------------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return wrapped


def data_parallel(model: nn.Module) -> nn.Module:
    """As made where no GPU is seen."""
    with mock.patch.dict(
        nn.DataParallel.__init__.__globals__, _get_available_device_type=lambda: None
    ):
        return nn.DataParallel(model)


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [data_parallel, AveragedModel, compiled]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_wrapped_model_is_the_model_inside(wrap, inside: bool):
    x, y = data()
    plain = network()
    wrapped = copy.deepcopy(plain)
    if inside:
        wrapped[0] = wrap(wrapped[0])
    else:
        wrapped = wrap(wrapped)
    obj, expected = (Objective(m, "cross_entropy", (x, y)) for m in (wrapped, plain))
    assert obj.parameter_names == expected.parameter_names
    assert obj.loss() == expected.loss()
    assert torch.equal(obj.gradient(), expected.gradient())
    assert torch.allclose(score_matrix(obj), score_matrix(expected), atol=1e-14)
    operator = HessianOperator(obj)
    assert torch.allclose(operator @ torch.eye(43).double(), hessian(plain, x, y), atol=1e-8)
    assert operator.method == "graph"


def test_wrappers_nest_and_names_are_those_without():
    net = compiled(data_parallel(nn.Sequential(AveragedModel(network()), nn.Tanh())))
    obj = Objective(net, "cross_entropy", data())
    assert obj.parameter_names == ("0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias")


def test_a_child_called_module_keeps_its_name():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    obj = Objective(data_parallel(Holder()), "cross_entropy", data())
    assert obj.parameter_names[0] == "module.0.weight"


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("into", [*WRAPPERS, nn.Identity])
def test_theta_is_loaded_into_wrapped_models(wrap, into):
    obj = Objective(wrap(network()), "cross_entropy", data())
    inner = network(1)
    target = inner if into is nn.Identity else into(inner)
    theta = torch.arange(43).double()
    obj.load_into(target, theta)
    assert torch.equal(torch.cat([p.detach().flatten() for p in target.parameters()]), theta)


def test_tied_modules_stay_tied_across_a_wrapper():
    inner = nn.Linear(4, 4).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = data_parallel(inner), inner
            self.rest = [data_parallel(inner)]

        def forward(self, x: Tensor) -> Tensor:
            return self.rest[0](self.b(self.a(x)))

    obj = Objective(Twice(), "cross_entropy", data())
    assert obj.num_params == 20
    x, y = data()
    expected = hessian(nn.Sequential(inner, inner, inner), x, y)
    assert torch.allclose(HessianOperator(obj) @ torch.eye(20).double(), expected, atol=1e-8)


def test_a_module_registered_twice_keeps_its_own_parameters():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(torch.tanh(self.again(self.first(x))))

    x, y = data()
    model = Twice().double()
    obj = Objective(model, "cross_entropy", (x, y))
    assert obj.parameter_names == ("first.weight", "first.bias", "tied.bias")
    found = HessianOperator(obj) @ torch.eye(24).double()
    assert torch.allclose(found, hessian(model, x, y), atol=1e-8)
    assert torch.allclose(score_matrix(obj), scores(model, x, y), atol=1e-12)
    held = list(obj.module.named_parameters(remove_duplicate=False))
    assert len(held) == 6 and all(isinstance(p, nn.Parameter) for _, p in held)
    assert obj.cast(torch.float32).loss() == pytest.approx(obj.loss(), rel=1e-5)


def test_a_forward_may_reach_through_its_wrapper():
    class Reaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = data_parallel(network())

        def forward(self, x: Tensor) -> Tensor:
            return self.net.module(x)

    assert Objective(Reaching(), "cross_entropy", data()).num_params == 43


def test_a_hook_on_a_wrapper_is_refused():
    net = data_parallel(network())
    net.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"hooks.*DataParallel.*on the module inside"):
        Objective(net, "cross_entropy", data())


def test_distributed_data_parallel_is_unwrapped(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = nn.parallel.DistributedDataParallel(network())
            net(data()[0]).sum().backward()
        obj = Objective(net, "cross_entropy", data())
        assert obj.loss() == Objective(network(), "cross_entropy", data()).loss()
        obj.load_into(net, torch.ones(43).double())
        assert float(net.module[0].weight.detach().mean()) == 1
    finally:
        torch.distributed.destroy_process_group()


# -- weights that are computed -------------------------------------------------------------


def by_weight_norm(model: nn.Sequential) -> nn.Sequential:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(model[0])
        weight_norm(model[2], dim=None)
    return model


def by_spectral_norm(model: nn.Sequential) -> nn.Sequential:
    spectral_norm(model[0])
    spectral_norm(model[2], dim=1)
    return model


def by_pruning(model: nn.Sequential) -> nn.Sequential:
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[2], "bias", amount=1)
    prune.l1_unstructured(model[0], "weight", amount=0.2)  # a container of both
    return model


def by_new_weight_norm(model: nn.Sequential) -> nn.Sequential:
    parametrizations.weight_norm(model[0])
    return model


def by_new_spectral_norm(model: nn.Sequential) -> nn.Sequential:
    parametrizations.spectral_norm(model[0])
    return model


def by_orthogonal(model: nn.Sequential) -> nn.Sequential:
    parametrizations.orthogonal(model[0])
    return model


def by_householder(model: nn.Sequential) -> nn.Sequential:
    parametrizations.orthogonal(model[0], orthogonal_map="householder")
    return model


def by_cayley(model: nn.Sequential) -> nn.Sequential:
    parametrizations.orthogonal(model[0], orthogonal_map="cayley", use_trivialization=False)
    return model


COMPUTED = [
    by_weight_norm,
    by_spectral_norm,
    by_pruning,
    by_new_weight_norm,
    by_new_spectral_norm,
    by_orthogonal,
    by_householder,
    by_cayley,
]


def trained(change: Callable[[nn.Sequential], nn.Sequential]) -> nn.Sequential:
    """After steps of training, from which tensors with a graph are left over."""
    torch.manual_seed(1)
    model = change(network()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data()[0]), data()[1]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("change", COMPUTED)
@pytest.mark.parametrize("training", [False, True])
def test_computed_weights_are_taken_after_training(change, training: bool):
    model = trained(change)
    before = copy.deepcopy(model.state_dict())
    obj = Objective(model.train(training), "cross_entropy", data(), batch_size=4)
    model.eval()
    x, y = data()
    names = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    assert obj.parameter_names == names
    assert obj.loss() == pytest.approx(
        float(nn.functional.cross_entropy(model(x), y).detach()), rel=1e-12
    )
    assert torch.allclose(score_matrix(obj), scores(model, x, y), atol=1e-12)
    if "weight_norm" in change.__name__:
        assert PerExampleGradEngine(obj).traceable
    expected = (differences if "weight_norm" in change.__name__ else hessian)(model, x, y)
    for now in (obj, obj.double()):
        found = HessianOperator(now) @ torch.eye(obj.num_params).double()
        assert torch.allclose(found, expected, atol=1e-8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", COMPUTED)
def test_computed_weights_follow_theta(change):
    model = trained(change)
    obj = Objective(model, "cross_entropy", data())
    theta = obj.parameters_vector() + 0.05 * torch.randn(obj.num_params).double()
    other = change(network(3))
    obj.load_into(other, theta)
    x, y = data()
    loss = float(nn.functional.cross_entropy(other.eval()(x), y).detach())
    assert obj.loss(theta) == pytest.approx(loss, rel=1e-9)
    assert obj.cast(torch.float32).loss() == pytest.approx(obj.loss(), rel=1e-5)
    assert obj.with_norm("batch").loss() == obj.loss()


@pytest.mark.parametrize("change", [by_weight_norm, by_spectral_norm, by_pruning])
@pytest.mark.parametrize("backend", ["vmap", "threads", "loop"])
def test_computed_weights_relax(change, backend: str):
    if backend == "vmap" and change is by_weight_norm:
        pytest.skip("torch has no batching rule for weight normalization")
    obj = Objective(trained(change), "cross_entropy", data())
    theta = obj.parameters_vector()
    path = linear_path(theta, theta + 0.1, 3)
    settings = {"steps": 3, "lr": 0.1, "replicas": 2, "batch_size": 3}
    found, expected = (relax_with(obj, path, 0.5, backend=e, **settings) for e in (backend, "loop"))
    assert torch.allclose(found.position, expected.position, atol=1e-9)


def test_a_recurrent_layer_with_weight_norm():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.rnn = weight_norm(nn.RNN(2, 3, batch_first=True), "weight_hh_l0")

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0][:, -1]

    model = Last().double()
    x, y = data()
    model(x.view(6, 2, 2)).sum().backward()
    obj = Objective(model, "cross_entropy", (x.view(6, 2, 2), y))
    found = HessianOperator(obj) @ torch.eye(obj.num_params).double()
    assert torch.allclose(found, differences(model.eval(), x.view(6, 2, 2), y), atol=1e-8)


# -- tensors kept of a forward pass --------------------------------------------------------


class Keeping(nn.Module):
    """Keeps what it computed, in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.net[0](x)
        h = self.net[1](self.last)
        self.seen["h"] = [h]
        return self.net[2](h)


def test_a_model_that_keeps_activations_is_copied():
    model = Keeping()
    x, y = data()
    model(x)
    kept = model.last
    obj = Objective(model, "cross_entropy", (x, y), batch_size=4)
    expected = hessian(model.net, x, y)
    for now in (obj, obj.with_norm("batch"), obj.cast(torch.float32).double()):
        found = HessianOperator(now) @ torch.eye(43).double()
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(score_matrix(now), scores(model.net, x, y), atol=1e-5)
        gradient_norms(now)
        hessian_trace(now, probes=2)
    again = Objective(obj.module, "cross_entropy", (x, y), parameters="*")  # after transforms
    assert again.loss() == obj.loss()
    assert model.last is not kept or kept.grad_fn is not None  # the user's own stays as it was


def test_what_cannot_be_copied_is_named():
    model = network()
    model[1].lock = threading.Lock()
    with pytest.raises(ValueError, match=r"copied.*in attribute 'lock' of '1'"):
        Objective(model, "cross_entropy", data())


def test_a_model_that_holds_a_generator_names_it():
    def numbers() -> Iterator[int]:
        yield 1

    model = network()
    model.numbers = numbers()
    with pytest.raises(ValueError, match=r"copied.*in attribute 'numbers' of the model"):
        Objective(model, "cross_entropy", data())


# -- other ---------------------------------------------------------------------------------


def test_a_forward_with_any_arguments_is_taken():
    class Any(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, *inputs: Tensor, **settings: object) -> Tensor:
            return self.net(*inputs, **settings)

    assert Objective(Any(), "cross_entropy", data()).loss() == pytest.approx(
        Objective(network(), "cross_entropy", data()).loss()
    )


def test_a_part_without_gradient_is_a_constant():
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.net[1](self.net[0](x))
            return self.net[2](h)

    x, y = data()
    model = Partly()
    found = HessianOperator(Objective(model, "cross_entropy", (x, y))) @ torch.eye(43).double()
    head = hessian(model.net[2], model.net[:2](x).detach(), y)
    assert torch.allclose(found[25:, 25:], head, atol=1e-8)
    assert float(found[:25].abs().max()) == 0


def test_advice_for_half_precision_with_wide_norms_works():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4), nn.Linear(4, 3).bfloat16())
    with pytest.raises(ValueError, match=r"bfloat16 \('0.weight'\), float32.*model\.float\(\)"):
        Objective(model, "cross_entropy", data())
    assert Objective(model.float(), "cross_entropy", data()).dtype == torch.float32


def test_a_frozen_backbone_in_half_precision_is_named():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 3)
            self.backbone.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    with pytest.raises(ValueError, match=r"bfloat16 and float32: cast it with model\.float\(\)"):
        Objective(Head(), "cross_entropy", data())
    assert Objective(Head().float(), "cross_entropy", data()).num_params == 15
