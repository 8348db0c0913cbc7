"""Complex parameters as pairs of real numbers, against twins whose parameters are those pairs."""

import copy

import pytest
import torch
from relax_cases import relax_with
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast.objective import Objective


class Spectral(nn.Module):
    """A Fourier layer between real ones, as in a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift = nn.Linear(1, 3)  # 6 parameters, and then pairs at an even offset
        self.w = nn.Parameter(0.3 * torch.randn(3, 2, 3, dtype=torch.cfloat))
        self.out = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(self.lift(x).mT)[..., :3]
        mixed = torch.einsum("bim,iom->bom", modes, self.w)
        return self.out(torch.tanh(torch.fft.irfft(mixed, n=x.shape[1])).mT)


class Waves(nn.Module):
    """A complex layer by `nn.Linear`, pairs at an odd offset, and a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.scale = nn.Parameter(torch.ones(1))
        self.layer = nn.Linear(4, 3, dtype=torch.cfloat)
        self.register_buffer("phase", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.scale * torch.complex(x, x.flip(1))) * self.phase
        return torch.cat([h.real, h.abs().square()], 1)


class Twin(nn.Module):
    """The same network, whose complex parameters are computed from pairs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.kept = copy.deepcopy(model), nn.ParameterList()
        self.places: list[tuple[nn.Module, str] | None] = []
        for module in self.model.modules():
            for name, p in list(module._parameters.items()):
                if p.is_complex():
                    del module._parameters[name]
                    self.kept.append(torch.view_as_real(p.detach()).clone())
                    self.places.append((module, name))
                else:
                    self.kept.append(p)
                    self.places.append(None)

    def forward(self, x: Tensor) -> Tensor:
        for place, p in zip(self.places, self.kept, strict=True):
            if place is not None:
                vars(place[0])[place[1]] = torch.complex(p[..., 0], p[..., 1])
        return self.model(x)

    def vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.kept])


def wide(model: nn.Module) -> nn.Module:
    """In double precision, complex parameters and buffers too."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for t in tensors.values():
                if t is not None:
                    t.data = t.data.to(torch.complex128 if t.is_complex() else torch.float64)
    return model


def data(kind: type[nn.Module]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape, target = ((5, 6, 1), (5, 6, 1)) if kind is Spectral else ((5, 4), (5, 6))
    return tuple(torch.randn(*s, generator=generator).double() for s in (shape, target))


def losses(twin: Twin, x: Tensor, y: Tensor) -> Tensor:
    return (twin(x) - y).square().flatten(1).mean(1)


def hessian(twin: Twin, x: Tensor, y: Tensor) -> Tensor:
    own = list(twin.kept)
    first = torch.autograd.grad(losses(twin, x, y).mean(), own, create_graph=True)
    rows = [
        torch.autograd.grad(entry, own, retain_graph=True, materialize_grads=True)
        for entry in torch.cat([g.flatten() for g in first])
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def scores(twin: Twin, x: Tensor, y: Tensor) -> Tensor:
    own = list(twin.kept)
    rows = [torch.autograd.grad(loss, own, retain_graph=True) for loss in losses(twin, x, y)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


KINDS = [Spectral, Waves]


@pytest.fixture(params=KINDS)
def case(request):
    model = wide(request.param())
    x, y = data(request.param)
    return Objective(model, "mse", (x, y), batch_size=2), Twin(model), model, x, y


def test_theta_is_real_and_holds_pairs_in_the_order_of_names(case):
    obj, twin, model, _, _ = case
    assert obj.dtype == torch.float64
    assert obj.parameter_names == tuple(n for n, _ in model.named_parameters())
    assert torch.equal(obj.parameters_vector(), twin.vector())
    for name, part in obj.split(obj.parameters_vector()).items():
        p = model.get_parameter(name)
        assert torch.equal(part, torch.view_as_real(p) if p.is_complex() else p)


def test_loss_gradient_and_scores(case):
    obj, twin, _, x, y = case
    expected = scores(twin, x, y)
    assert obj.loss() == pytest.approx(float(losses(twin, x, y).mean().detach()), rel=1e-13)
    assert torch.allclose(obj.gradient(), expected.mean(0), atol=1e-13)
    assert torch.allclose(ef.score_matrix(obj), expected, atol=1e-13)
    assert torch.allclose(ef.score_gram(obj), expected @ expected.T, atol=1e-12)
    assert torch.allclose(ef.gradient_norms(obj), expected.square().sum(1), atol=1e-12)
    assert ef.fisher_trace(obj).value == pytest.approx(float(expected.square().sum() / 5))


def test_products_and_traces(case):
    obj, twin, _, x, y = case
    expected = hessian(twin, x, y)
    operator = ef.HessianOperator(obj)
    assert operator.method.startswith("autograd")
    identity = torch.eye(obj.num_params).double()
    assert torch.allclose(operator @ identity, expected, atol=1e-12)
    largest = torch.linalg.eigvalsh(expected)[-1:]
    assert torch.allclose(ef.top_eigenvalues(operator, 1).values, largest, rtol=1e-4)
    assert torch.allclose(
        ef.hessian_diagonal(obj, probes=500).value, expected.diag(), atol=0.3 * float(largest)
    )
    estimate = ef.hessian_trace(obj, probes=100)
    assert abs(estimate.value - float(expected.trace())) < 5 * estimate.std_error


def test_gauss_newton_and_jacobian(case):
    obj, twin, _, x, _ = case
    out = twin(x).flatten(1)
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    o, list(twin.kept), retain_graph=True, materialize_grads=True
                )
            ]
        )
        for o in out.flatten()
    ]
    jacobian = torch.stack(rows)
    identity = torch.eye(obj.num_params).double()
    assert torch.allclose(ef.JacobianOperator(obj) @ identity, jacobian, atol=1e-12)
    expected = 2 / out.shape[1] * jacobian.T @ jacobian / len(x)
    assert torch.allclose(ef.GGNOperator(obj) @ identity, expected, atol=1e-12)
    assert ef.ggn_trace(obj).value == pytest.approx(float(expected.trace()))


def test_paths_and_dynamics(case):
    obj, twin, _, x, y = case
    theta = obj.parameters_vector()
    path = ef.linear_path(theta, theta + 0.1, 3)
    found = ef.path_losses(obj, path, 3)
    with torch.no_grad():
        for p in twin.kept:
            p += 0.1
    last = float(losses(twin, x, y).mean().detach())
    assert float(found["loss"][-1]) == pytest.approx(last, rel=1e-12)
    settings = {"steps": 3, "lr": 0.01, "replicas": 2, "batch_size": 2}
    loop = relax_with(obj, path, 0.5, backend="loop", **settings)
    for backend in ("vmap", "auto"):
        now = relax_with(obj, path, 0.5, backend=backend, **settings)
        assert torch.allclose(now.position, loop.position, atol=1e-10)
    with pytest.raises(ValueError, match=r"backend: .*complex parameters"):
        relax_with(obj, path, 0.5, backend="threads", **settings)
    config = ef.AutoNEBConfig(pivots=3, batch_size=5, cycles=[(5, 0.01)])
    result = ef.auto_neb(obj, theta, theta + 0.1, config)
    assert bool(torch.isfinite(result.path.pivots).all())


def test_theta_goes_back_into_a_model(case):
    obj, _, model, _, _ = case
    other = copy.deepcopy(model)
    theta = obj.parameters_vector() + 0.1
    obj.load_into(other, theta)
    assert torch.equal(Twin(other).vector(), theta)


def test_conjugates_are_what_they_stand_for():
    model = wide(Waves())
    model.layer.weight = nn.Parameter(model.layer.weight.detach().conj())
    obj = Objective(model, "mse", data(Waves))
    part = obj.split(obj.parameters_vector())["layer.weight"]
    assert torch.equal(part, torch.view_as_real(model.layer.weight.detach().resolve_conj()))
    obj.load_into(model, obj.parameters_vector() + 1)
    assert torch.equal(Objective(model, "mse", data(Waves)).parameters_vector(), 1 + obj._theta)


@pytest.mark.parametrize("kind", KINDS)
def test_precision_goes_together(kind: type[nn.Module]):
    obj = Objective(kind(), "mse", data(kind))
    assert obj.dtype == torch.float32
    twice = obj.double()
    assert twice.dtype == torch.float64
    expected = Objective(wide(kind()), "mse", data(kind)).gradient()
    assert torch.allclose(twice.gradient(), expected, atol=1e-6)
    assert torch.allclose(obj.gradient().double(), expected, atol=1e-5)
    held = [t for t in (*twice.module.parameters(), *twice.buffers.values()) if t.is_complex()]
    assert {t.dtype for t in held} == {torch.complex128}


@pytest.mark.parametrize("frozen", ["layer.weight", "layer.bias", "scale"])
def test_frozen_parameters_beside_complex_ones(frozen: str):
    model = wide(Waves())
    x, y = data(Waves)
    expected = scores(Twin(model), x, y)
    sizes = [torch.view_as_real(p).numel() if p.is_complex() else 1 for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    model.get_parameter(frozen).requires_grad_(False)
    obj = Objective(model, "mse", (x, y))
    kept = [
        part for name, part in zip(names, expected.split(sizes, 1), strict=True) if name != frozen
    ]
    assert torch.allclose(ef.score_matrix(obj), torch.cat(kept, 1), atol=1e-12)


def test_a_real_head_behind_frozen_complex_layers():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(4, 4)
            self.layer = nn.Linear(4, 3, dtype=torch.cfloat).requires_grad_(False)
            self.head = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(torch.complex(self.first(x), x)).abs())

    model = wide(Mixed())
    x, y = data(Waves)
    obj = Objective(model, "mse", (x, y))
    own = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, own, retain_graph=True)])
        for loss in (model(x) - y).square().mean(1)
    ]
    assert torch.allclose(ef.score_matrix(obj), torch.stack(rows), atol=1e-12)


def _wide_real() -> nn.Module:
    model = Waves()
    return model.double()  # leaves complex ones as they are


def _narrow_complex() -> nn.Module:
    model = wide(Waves())
    return model.float()


@pytest.mark.parametrize(("make", "advice"), [(_wide_real, "float"), (_narrow_complex, "double")])
def test_the_advice_for_mixed_precision_works(make, advice: str):
    with pytest.raises(ValueError, match=rf"of one dtype.*cast it with model\.{advice}\(\)$"):
        Objective(make(), "mse", data(Waves))
    model = getattr(make(), advice)()
    assert Objective(model, "mse", data(Waves)).num_params == 31


def test_two_complex_precisions_are_refused_with_advice_that_works():
    model = wide(Waves())
    model.layer.bias.data = model.layer.bias.data.to(torch.complex64)
    with pytest.raises(ValueError, match=r"p\.data = p\.data\.to\(torch\.complex128\)"):
        Objective(model, "mse", data(Waves))
    for p in model.double().parameters():
        if p.is_complex():
            p.data = p.data.to(torch.complex128)
    assert Objective(model, "mse", data(Waves)).dtype == torch.float64


# -- complex outputs -----------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.complex(x, x)).square()


def data_with_complex_targets() -> tuple[Tensor, Tensor]:
    return data(Waves)[0], torch.ones(5, 2, dtype=torch.complex128)


def _distance(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().square().sum(1)


def test_complex_outputs_go_with_a_real_loss():
    obj = Objective(Plain(), _distance, data_with_complex_targets())
    theta, identity = obj.parameters_vector(), torch.eye(obj.num_params).double()
    sides = [[obj.gradient(theta + s * row) for row in 1e-5 * identity] for s in (1, -1)]
    expected = (torch.stack(sides[0]) - torch.stack(sides[1])) / 2e-5
    assert torch.allclose(ef.HessianOperator(obj) @ identity, expected, atol=1e-6)
    assert torch.allclose(ef.score_matrix(obj).mean(0), obj.gradient(), atol=1e-12)
    for quantity in (ef.JacobianOperator, ef.ggn_trace, ef.ntk_gram):
        with pytest.raises(ValueError, match=r"outputs: expected real numbers.*view_as_real"):
            quantity(obj)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_complex_outputs_for_a_loss_by_name_are_refused(loss: str):
    y = torch.ones(5, 2) if loss == "mse" else torch.arange(5) % 2
    with pytest.raises(ValueError, match=rf"model: expected real outputs for the loss '{loss}'"):
        Objective(Plain(), loss, (data(Waves)[0], y))


def test_a_complex_loss_is_refused():
    with pytest.raises(ValueError, match="loss: expected real losses"):
        Objective(Plain(), lambda out, y: (out - y).square().sum(1), data_with_complex_targets())
