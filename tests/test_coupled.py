"""Losses and models that mix examples: rejected, or one batch of all of them if asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.nn import functional

import entropic_fast as ef

N = 11


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """In-batch negatives: each example against all others.  # [N]"""
    z = functional.normalize(outputs, dim=1)
    pairs = functional.normalize(targets, dim=1)
    return functional.cross_entropy(4 * z @ pairs.T, torch.arange(len(z)), reduction="none")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrastive": contrastive,
    "contrastive mean": lambda o, t: contrastive(o, t).mean(),
    "broadcast": lambda o, t: ((o[:, :1] - t[:, 0]) ** 2).mean(1),
    "batch mean": lambda o, t: (o - o.mean(0)).square().mean(1) + (o - t).square().mean(1),
    "scalar": lambda o, t: (o - t).square().mean().sqrt(),
}
X, T = (torch.randn(N, 3, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def hessian(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    ps = list(model.parameters())
    value = loss(model(X), T).mean()
    g = torch.cat([p.flatten() for p in torch.autograd.grad(value, ps, create_graph=True)])
    rows = [
        torch.cat([p.flatten() for p in torch.autograd.grad(v, ps, retain_graph=True)]) for v in g
    ]
    return g.detach(), torch.stack(rows)


@pytest.mark.parametrize("name", ["contrastive", "broadcast", "batch mean"])
def test_losses_that_mix_examples_are_rejected_with_an_example(name: str):
    with pytest.raises(
        ValueError, match=r"loss: .* for example \d+ in a batch of 11 .* for it alone"
    ):
        ef.Objective(network(), LOSSES[name], (X, T))


def test_losses_that_mix_examples_are_rejected_behind_a_batch_of_one():
    with pytest.raises(ValueError, match=r"for example \d+ in a batch of 10 "):
        ef.Objective(network(), LOSSES["contrastive"], [(X[:1], T[:1]), (X[1:], T[1:])])


@pytest.mark.parametrize("name", ["contrastive mean", "scalar"])
def test_one_loss_for_all_says_what_to_do(name: str):
    with pytest.raises(ValueError, match="coupled=True"):
        ef.Objective(network(), LOSSES[name], (X, T))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_coupled_objective_is_of_all_examples_at_once(name: str, batched: bool):
    data = [(X[:4], T[:4]), (X[4:], T[4:])] if batched else (X, T)
    obj = ef.Objective(network(), LOSSES[name], data, coupled=True)
    g, H = hessian(network(), LOSSES[name])
    identity = torch.eye(obj.num_params, dtype=torch.float64)
    assert obj.loss() == pytest.approx(
        float(LOSSES[name](network()(X), T).mean().detach()), rel=1e-13
    )
    assert relative_error(obj.gradient(), g) < 1e-12
    operator = ef.HessianOperator(obj)
    assert operator.way == "rules"
    assert relative_error(operator @ identity, H) < 1e-10
    with ef.curvature.without_rules():
        assert relative_error(ef.HessianOperator(obj) @ identity, H) < 1e-10
    trace = ef.hessian_trace(obj, probes=64, seed=0)
    assert abs(float(trace) - float(H.trace())) < 5 * trace.std_error + 1e-9
    top = ef.top_eigenvalues(operator, k=1, tol=1e-9)
    assert float(top.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-6)
    path = ef.linear_path(obj.parameters_vector(), torch.zeros_like(g), 4)
    for t, loss in zip((0.0, 1.0), ef.path_losses(obj, path, 4)["loss"][[0, -1]], strict=True):
        assert float(loss) == pytest.approx(obj.loss(path.point(t)), rel=1e-12)


@pytest.mark.parametrize(
    "ask",
    [
        ef.score_matrix, ef.score_gram, ef.gradient_norms, ef.fisher_trace, ef.ntk_gram,
        ef.ggn_trace, ef.FisherOperator,
        lambda obj: obj.tensors(4),
    ],
)  # fmt: skip
def test_single_examples_of_a_coupled_objective_are_rejected(ask: Callable[..., object]):
    obj = ef.Objective(network(), contrastive, (X, T), coupled=True)
    with pytest.raises(ValueError, match="coupled"):
        ask(obj)


def test_dynamics_of_a_coupled_objective_take_all_examples():
    obj = ef.Objective(network(), contrastive, (X, T), coupled=True)
    theta = obj.parameters_vector()
    path = ef.linear_path(theta, theta + 0.1, 4)
    with pytest.raises(ValueError, match="11 examples of a coupled objective"):
        ef.relax(obj, path, start=0.5, steps=3, lr=0.1, batch_size=4)
    found = ef.relax(obj, path, start=0.5, steps=1, lr=0.1, batch_size=N, seed=0)
    after = path.point(0.5) - 0.1 * obj.gradient(path.point(0.5))
    t = path.project(after[None])[0]
    assert float(found.position[0, -1]) == pytest.approx(float(t[0]), abs=1e-9)


def test_a_model_of_whole_batches_is_named():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.view(20, 3) + x[:1])

    x, t = torch.randn(20, 3).double(), torch.randn(20, 3).double()
    with pytest.raises(ValueError, match=r"takes a batch of 20 but fails for 8 .* coupled=True"):
        ef.Objective(Fixed(), "mse", (x, t))
    obj = ef.Objective(Fixed(), "mse", (x, t), coupled=True)
    assert ef.HessianOperator(obj).way == "rules"


@pytest.mark.parametrize("bad", [{"batch_size": 4}])
def test_batches_of_a_coupled_objective_cannot_be_cut(bad: dict[str, int]):
    with pytest.raises(ValueError, match="its entire data is one batch"):
        ef.Objective(network(), contrastive, (X, T), coupled=True, **bad)
    with pytest.raises(ValueError, match="batches of one form"):
        ef.Objective(
            nn.Sequential(nn.Linear(3, 3).double()),
            contrastive,
            [(X, T), (X[:, :2], T)],
            coupled=True,
        )


def test_a_coupled_objective_in_another_dtype_and_on_other_data():
    obj = ef.Objective(network(), contrastive, (X, T), coupled=True)
    single = obj.cast(torch.float32)
    assert single.loss() == pytest.approx(obj.loss(), rel=1e-5)
    assert single.double().loss() == pytest.approx(obj.loss(), rel=1e-5)
    few = obj.with_data([(X[:4], T[:4]), (X[4:7], T[4:7])])
    assert few.loss() == pytest.approx(float(contrastive(network()(X[:7]), T[:7]).mean().detach()))


def test_paths_of_a_coupled_objective_take_all_examples_in_every_step():
    obj = ef.Objective(network(), contrastive, (X, T), coupled=True)
    a = obj.parameters_vector()
    b = a + 0.3 * torch.randn(len(a), generator=torch.Generator().manual_seed(5)).double()
    results = [
        ef.auto_neb(obj, a, b, ef.AutoNEBConfig(cycles=((4, 0.1),), pivots=4, batch_size=size))
        for size in (3, None)
    ]
    assert torch.equal(results[0].path.pivots, results[1].path.pivots)


def test_what_a_loss_mixes_may_depend_on_the_targets():
    """Examples of one label alone are mixed; the first data have none."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        alike = (targets[:, None] == targets[None]).double()
        return (outputs[:, None] - outputs[None]).square().sum(2).mul(alike).sum(1) + outputs[:, 0]

    obj = ef.Objective(network(), loss, (X, torch.arange(N)))
    with pytest.raises(ValueError, match="for it alone"):
        obj.with_data((X, torch.arange(N) // 5))
    with pytest.raises(ValueError, match="for it alone"):
        ef.Objective(network(), loss, (X, torch.arange(N) // 5))
