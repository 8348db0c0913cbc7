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
    assert operator.method == "graph"
    assert relative_error(operator @ identity, H) < 1e-10
    with ef.curvature.autograd_only():
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
        ef.relax(obj, path, 0.5, ef.ProjectedSGD(0.1, 4, steps=3))
    found = ef.relax(obj, path, 0.5, ef.ProjectedSGD(0.1, N, steps=1), seed=0)
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
    assert ef.HessianOperator(obj).method == "graph"


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


def pulled(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example toward those of its group.  # [N]"""
    same = (targets[:, None] == targets[None]).double()
    return (outputs[:, None] - outputs[None]).square().sum(2).mul(same).sum(1) + outputs[:, 0]


class Centered(nn.Module):
    """About the mean of each group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        h = self.a(x)
        same = (group[:, None] == group[None]).double()
        return self.b(torch.tanh(h - same @ h / same.sum(1, keepdim=True)))


class Capacity(nn.Module):
    """The 8 largest of a batch take another layer, as in mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        kept = (x[:, 0].argsort(descending=True).argsort() < 8).double()
        return self.a(x) + kept[:, None] * self.b(x)


GROUPS = {
    "in a row": lambda n: torch.arange(n) // 3,
    "in turn": lambda n: torch.arange(n) % 10,
    "shuffled": lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(0)) // 3,
}


@pytest.mark.parametrize("order", GROUPS)
@pytest.mark.parametrize("n", [40, 300])
def test_examples_that_are_mixed_within_groups_are_found(order: str, n: int):
    x, group = torch.randn(n, 3).double(), GROUPS[order](n)
    with pytest.raises(ValueError, match="coupled=True"):
        ef.Objective(nn.Linear(3, 2).double(), pulled, (x, group))
    with pytest.raises(ValueError, match="coupled=True"):
        ef.Objective(Centered(), "cross_entropy", ((x, group), torch.arange(n) % 2))


def test_what_depends_on_the_size_of_the_batch_is_found():
    x, y = torch.randn(300, 3).double(), torch.arange(300) % 2
    with pytest.raises(ValueError, match="coupled=True"):
        ef.Objective(Capacity(), "cross_entropy", (x, y))


class Graph(nn.Module):
    """A graph whose edges [2, E] are not counted by nodes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))


def test_one_graph_is_one_batch_of_nodes():
    x, edges = torch.randn(8, 3).double(), torch.randint(8, (2, 20))
    y = torch.arange(8) % 2
    with pytest.raises(ValueError, match=r"inputs\[1\] \[2, 20\].*coupled=True"):
        ef.Objective(Graph(), "cross_entropy", ((x, edges), y))
    obj = ef.Objective(Graph(), "cross_entropy", ((x, edges), y), coupled=True)
    model = Graph()
    ps = list(model.parameters())
    value = functional.cross_entropy(model(x, edges), y)
    g = torch.cat([p.flatten() for p in torch.autograd.grad(value, ps, create_graph=True)])
    rows = [torch.autograd.grad(v, ps, retain_graph=True) for v in g]
    H = torch.stack([torch.cat([p.flatten() for p in row]) for row in rows])
    assert obj.num_examples == 8
    assert relative_error(obj.gradient(), g.detach()) < 1e-12
    assert relative_error(ef.HessianOperator(obj) @ torch.eye(len(g)).double(), H) < 1e-10
    with pytest.raises(ValueError, match="of one length"):  # the edges of two graphs
        ef.Objective(Graph(), "cross_entropy", [((x, edges), y)] * 2, coupled=True)


def test_a_model_of_a_fixed_number_of_nodes_says_what_to_do():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("links", torch.rand(8, 8).double())
            self.out = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.links @ x)

    data = torch.randn(8, 3).double(), torch.arange(8) % 2
    with pytest.raises(ValueError, match=r"fails for 1: .*coupled=True"):
        ef.Objective(Fixed(), "cross_entropy", data)
    assert ef.Objective(Fixed(), "cross_entropy", data, coupled=True).loss() > 0


def test_a_profile_of_a_coupled_objective_leaves_the_scores_out():
    obj = ef.Objective(network(), contrastive, (X, T), coupled=True)
    a = obj.parameters_vector()
    table = ef.curvature_profile(
        obj, ef.linear_path(a, a + 0.1), points=2, settings=ef.CurvatureSettings(tol=1.0)
    )
    assert "hessian_trace" in table.columns and "fisher_trace" not in table.columns
