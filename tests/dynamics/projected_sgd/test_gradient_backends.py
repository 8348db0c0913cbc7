"""Ways to compute the same trajectories: threads, the forward-mode shortcut, groups of settings."""

import threading

import pytest
import torch
from relax_cases import conv_problem, mlp_problem, relax_with, valley
from torch import nn

from entropic_fast.dynamics import ProjectedSGD, Recording, displacement, relax, relax_many
from entropic_fast.dynamics.projected_sgd._gradient_backends import choose, close
from entropic_fast.dynamics.projected_sgd._minibatches import Minibatches
from entropic_fast.dynamics.projected_sgd._thread_pool import ThreadPool, ThreadPoolGradients
from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path
from entropic_fast.training.models import build, initialize

CLOSE = dict(rtol=0, atol=1e-10)


def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    return before


@pytest.mark.parametrize("name", ["resnet8-w4", "wrn10-1-w4", "digits-cnn-bn"])
def test_threads_give_the_same_bits_whatever_their_number(name):
    g = torch.Generator().manual_seed(0)
    model = initialize(build(name, in_channels=1), 0)
    data = torch.randn(30, 1, 8, 8, generator=g), torch.randint(10, (30,), generator=g)
    obj = Objective(model, "cross_entropy", data)
    a = obj.parameters_vector()
    path = linear_path(a, a + 0.01 * torch.randn(len(a), generator=g))
    common = dict(lr=0.01, batch_size=8, project_every=4, steps=8, backend="threads")
    runs = []
    for count, ids in ((1, range(5)), (2, range(5)), (3, [2, 0, 4])):
        before = threads(count)
        try:
            runs.append(relax_with(obj, path, 0.5, replicas=list(ids), **common))
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(before)
    one, two, some = runs
    assert one.backend == "threads" and one.notes == ()
    for column in ("position", "distance", "loss"):
        assert torch.equal(getattr(one, column), getattr(two, column))
        assert torch.equal(getattr(one, column)[[2, 0, 4]], getattr(some, column))


def test_workers_compute_on_one_core_each_and_leave_other_threads_theirs():
    before = threads(2)
    try:
        workers = ThreadPool(3)
        assert workers.run(torch.get_num_threads) == [1, 1, 1]
        assert torch.get_num_threads() == 2
        seen = []
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [2]
        with pytest.raises(ZeroDivisionError):
            workers.run(lambda: 1 // 0)
        workers.close()
    finally:
        torch.set_num_threads(before)


class Tied(nn.Module):
    """Tied weights, a frozen one, a buffer, and a recurrent layer that keeps lists of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("shift", torch.full((4,), 0.3))
        self.unused = nn.Parameter(torch.ones(3))
        self.recurrent = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        x = self.b(torch.tanh(self.a(x))) * self.frozen + self.shift
        return self.recurrent(x[:, None])[0][:, 0]


def test_threads_give_the_gradients_of_any_parameters():
    g = torch.Generator().manual_seed(0)
    model = Tied().double()
    x, y = torch.randn(12, 4, generator=g).double(), torch.randint(3, (12,), generator=g)
    obj = Objective(model, "cross_entropy", (x, y))
    theta = torch.randn(5, obj.num_params, generator=g, dtype=torch.float64)
    batch = Minibatches(obj, 6, 0, range(5))(0)
    threaded = ThreadPoolGradients(obj, 2)
    losses, rows = (part.clone() for part in threaded(theta, *batch))
    for r in range(5):
        part = obj.with_data((batch[0][r], batch[1][r]))
        torch.testing.assert_close(rows[r], part.gradient(theta[r]), rtol=1e-12, atol=1e-14)
        assert abs(float(losses[r]) - part.loss(theta[r])) < 1e-12
    theta.mul_(0.5)  # in place, as updates are
    assert not torch.equal(threaded(theta, *batch)[1], rows)
    torch.testing.assert_close(
        threaded(theta[:2].clone(), batch[0][:2], batch[1][:2])[1][1],
        obj.with_data((batch[0][1], batch[1][1])).gradient(theta[1]),
        rtol=1e-12,
        atol=1e-14,
    )
    threaded.close()


def test_the_engine_is_chosen_by_cores_replicas_and_size():
    small, _ = conv_problem("none")
    _, large_inputs = small, torch.zeros(1, 64, 1, 8, 8)
    rule = {(1, 1): "threads", (1, 2): "threads", (1, 3): "vmap", (2, 1): "loop", (2, 2): "threads"}
    rule |= {(2, 5): "threads", (2, 6): "vmap"}
    for (cores, replicas), expected in rule.items():
        before = threads(cores)
        try:
            theta = small.parameters_vector().repeat(replicas, 1)
            x, y = Minibatches(small, 4, 0, range(replicas))(0)
            name, gradients, note = choose("auto", small, theta, x, y)
            close(gradients)
            assert (name, note) == (expected, "")
            if replicas == 6:  # 4,096 numbers in a minibatch
                x, y = large_inputs.expand(6, -1, -1, -1, -1), torch.zeros(6, 64).long()
                name, gradients, note = choose("auto", small, theta, x, y)
                close(gradients)
                assert (name, note) == ("threads", "")
        finally:
            torch.set_num_threads(before)


def test_the_entropic_force_vanishes_at_k_1():
    # Where k = 15 drifts down the stiffness; see test_entropic_force.
    obj, path = valley()
    common = dict(lr=0.03, batch_size=4, replicas=4, seed=2)
    still = relax_with(obj, path, 0.3, project_every=1, steps=60, **common)
    assert float((still.position - 0.3).abs().max()) < 1e-12
    moving = relax_with(obj, path, 0.3, project_every=15, steps=300, **common)
    assert displacement(moving).low > 1e-4


def test_a_full_batch_has_no_force_either():
    obj, path = valley()
    still = relax(obj, path, 0.3, ProjectedSGD(0.03, obj.num_examples, steps=30))
    assert float((still.position - 0.3).abs().max()) < 1e-12


def test_groups_give_each_replica_what_it_would_have_alone():
    _, obj, path = mlp_problem()
    sgd = ProjectedSGD(0.1, 4, steps=30)
    settings = [
        sgd,
        sgd.replace(lr=0.05, batch_size=8, optimizer="nesterov", momentum=None),
        sgd.replace(lr=0.2),
        sgd.replace(lr=1e9, batch_size=6, momentum=0.5),
        sgd.replace(lr=0.01, optimizer="adam", steps=15),
    ]
    starts, ids = [0.2, 0.2, 0.6, 0.6, 0.3], [0, 1, 2, 3, 0]
    runs = relax_many(obj, path, starts, settings, replicas=ids, seed=4)
    for i, (run, one) in enumerate(zip(runs, settings, strict=True)):
        assert run.num_replicas == 1 and run.optimizer == one.optimizer
        if i == 3:
            assert bool(run.diverged.all())
            continue
        expected = relax(obj, path, starts[i], one, replicas=[ids[i]], seed=4)
        torch.testing.assert_close(run.position, expected.position, **CLOSE)


def test_groups_reject_what_they_cannot_run():
    _, obj, path = mlp_problem()
    sgd = ProjectedSGD(0.1, 4)
    with pytest.raises(ValueError, match="settings: expected a list of ProjectedSGD"):
        relax_many(obj, path, 0.2, [dict(lr=0.1, batch_size=4)])
    with pytest.raises(ValueError, match="settings: expected a list of ProjectedSGD"):
        relax_many(obj, path, 0.2, [])
    with pytest.raises(ValueError, match="lr: expected one learning rate"):
        relax_many(obj, path, 0.2, [sgd, sgd.replace(lr=[0.1, 0.2])])
    with pytest.raises(ValueError, match="starts: expected a position"):
        relax_many(obj, path, [0.1, 0.2, 0.3], [sgd, sgd])
    with pytest.raises(ValueError, match=r"recording\.to: expected None"):
        relax_many(obj, path, 0.2, [sgd], recording=Recording(to="runs.csv"))
