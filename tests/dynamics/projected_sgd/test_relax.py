"""relax against a hand-written loop with torch.optim, and its promises about replicas."""

import copy
import math
import pickle

import pytest
import torch
from relax_cases import conv_problem, float64, images, mlp_problem, relax_with
from torch import nn

from entropic_fast.dynamics import DivergenceError, ProjectedSGD, Recording, relax
from entropic_fast.dynamics.projected_sgd._minibatches import Minibatches
from entropic_fast.objective import Objective
from entropic_fast.ops.random_bits.streams import fold_in, permutation
from entropic_fast.paths import Path, linear_path
from entropic_fast.training.models import digits_cnn, initialize


def by_hand(model, obj, path, start, make_optimizer, batch_size, k, steps, seed, replica):
    """k-SGD with torch.optim on a module in training mode and Path.project."""
    model = copy.deepcopy(model).train()
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters)
    nn.utils.vector_to_parameters(path.point(start), parameters)
    minibatches = Minibatches(obj, batch_size, seed, [replica])
    positions, distances, losses = [start], [0.0], []
    for step in range(1, steps + 1):
        x, y = minibatches(step - 1)
        loss = nn.functional.cross_entropy(model(x[0]), y[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % k == 0 or step == steps:
            with torch.no_grad():
                theta = nn.utils.parameters_to_vector(parameters)
                s, nearest, distance = path.project(theta)
                for p, q in zip(
                    parameters, nearest.split([p.numel() for p in parameters]), strict=True
                ):
                    p.copy_(q.view_as(p))  # in place: the optimizer's state stays
            positions.append(s)
            distances.append(distance)
    return positions, distances, losses


OPTIMIZERS = {
    "sgd": (dict(optimizer="sgd"), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd with decay": (
        dict(optimizer="sgd", weight_decay=0.03),
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.03),
    ),
    "heavy ball": (
        dict(optimizer="sgd", momentum=0.7, weight_decay=0.03),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.7, weight_decay=0.03),
    ),
    "nesterov": (
        dict(optimizer="nesterov", weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "adam": (
        dict(optimizer="adam", weight_decay=0.02),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.02),
    ),
    "adam, other betas": (
        dict(optimizer="adam", betas=(0.5, 0.9), eps=1e-3),
        lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.9), eps=1e-3),
    ),
}


@pytest.mark.parametrize("backend", ["loop", "vmap", "threads"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_relax_is_torch_optim_and_projection_in_turn(name, backend):
    settings, make = OPTIMIZERS[name]
    model, obj, path = mlp_problem()
    run = relax_with(
        obj,
        path,
        [0.3, 0.8],
        lr=0.1,
        batch_size=5,
        project_every=4,
        steps=30,
        seed=7,
        backend=backend,
        max_distance=math.inf,
        **settings,
    )
    assert run.backend == backend
    for r, start in enumerate((0.3, 0.8)):
        s, d, losses = by_hand(model, obj, path, start, make, 5, 4, 30, 7, r)
        assert run.steps.tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 30]
        torch.testing.assert_close(run.position[r], float64(s), rtol=0, atol=1e-10)
        torch.testing.assert_close(run.distance[r], float64(d), rtol=1e-9, atol=1e-10)
        losses = float64(losses)
        means = [losses[0], *(c.mean() for c in losses.split(4))]
        torch.testing.assert_close(run.loss[r], torch.stack(means), rtol=1e-10, atol=0)


def test_batch_norm_layers_use_the_statistics_of_the_minibatch():
    # The reference runs the module itself in training mode.
    model = initialize(digits_cnn("batch", channels=(2, 3, 3)), 1).double()
    obj = Objective(model, "cross_entropy", images(dtype=torch.float64))
    a = obj.parameters_vector()
    g = torch.Generator().manual_seed(3)
    path = linear_path(a, a + 0.1 * torch.randn(len(a), generator=g, dtype=a.dtype))
    s, d, _ = by_hand(model, obj, path, 0.5, lambda p: torch.optim.SGD(p, 0.05), 8, 3, 12, 0, 0)
    batch = obj.with_norm("batch")
    for objective in (obj, batch):
        run = relax(objective, path, 0.5, ProjectedSGD(0.05, 8, project_every=3, steps=12))
        torch.testing.assert_close(run.position[0], float64(s), rtol=0, atol=1e-9)
        torch.testing.assert_close(run.distance[0], float64(d), rtol=1e-8, atol=0)


@pytest.mark.parametrize("backend", ["vmap", "threads"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_replica_does_what_it_would_do_alone(norm, backend):
    obj, path = conv_problem(norm)
    common = dict(batch_size=4, project_every=3, steps=9, seed=5, max_distance=math.inf)
    together = relax_with(
        obj,
        path,
        [0.2, 0.2, 0.5, 0.7],
        lr=[0.05, 0.05, 0.02, 0.1],
        replicas=[0, 4, 2, 9],
        backend=backend,
        **common,
    )
    assert together.backend == backend and together.notes == ()
    for r, i in enumerate(together.ids.tolist()):
        alone = relax_with(
            obj,
            path,
            float(together.start[r]),
            lr=float(together.lr[r]),
            replicas=[i],
            backend="loop",
            **common,
        )
        torch.testing.assert_close(together.position[r], alone.position[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.loss[r], alone.loss[0], rtol=1e-4, atol=1e-5)
    assert float((together.position[0] - together.position[1]).abs().max()) > 1e-5


def test_replicas_are_named_by_their_order_and_repeatable():
    _, obj, path = mlp_problem()
    common = dict(lr=0.1, batch_size=5, steps=30, seed=2)
    three, five = (relax_with(obj, path, 0.4, replicas=n, **common) for n in (3, 5))
    torch.testing.assert_close(three.position, five.position[:3], rtol=0, atol=1e-12)
    again = relax_with(obj, path, 0.4, replicas=3, **common)
    assert torch.equal(three.position, again.position)
    other = relax_with(obj, path, 0.4, replicas=3, **{**common, "seed": 3})
    assert not torch.allclose(three.position[:, -1], other.position[:, -1])


def test_minibatches_are_permutations_that_no_other_replica_changes():
    _, obj, _ = mlp_problem(n=11)
    some = Minibatches(obj, 3, 0, [5, 1])
    more = Minibatches(obj, 3, 0, [1, 2, 5])
    epoch = torch.stack([some.indices(step) for step in range(3)], 1)  # [2, 3, 3]
    for row in epoch:
        assert len(set(row.flatten().tolist())) == 9
    for step in (0, 2, 3, 10, 1):  # any order of asking
        assert torch.equal(some.indices(step), more.indices(step)[[2, 0]])
    assert not torch.equal(some.indices(0), some.indices(3))
    inputs, targets = some(4)
    x, y = obj.tensors()
    assert torch.equal(inputs[1], x[some.indices(4)[1]])
    assert torch.equal(targets[0], y[some.indices(4)[0]])
    some.keep([1])
    assert torch.equal(some.indices(4), more.indices(4)[[0]])


class Branching(nn.Module):
    """Asks for a value in the forward pass, which vmap cannot give."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        y = self.layer(x)
        return y if float(self.layer.weight.detach().sum()) > -1e6 else 2 * y


def test_a_model_that_vmap_cannot_do_falls_back_to_threads_and_says_so():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 5, generator=g), torch.randint(3, (20,), generator=g)
    model = initialize(Branching(), 0)
    obj = Objective(model, "cross_entropy", (x, y))
    a = obj.parameters_vector()
    path = linear_path(a, a + 1)
    settings = dict(lr=0.1, batch_size=4, project_every=5, steps=10, replicas=4)
    run = relax_with(obj, path, 0.5, **{**settings, "replicas": 3 * torch.get_num_threads() + 1})
    assert run.backend == "threads" and "vmap was not used" in run.notes[0]
    s, _, _ = by_hand(model, obj, path, 0.5, lambda p: torch.optim.SGD(p, 0.1), 4, 5, 10, 0, 3)
    torch.testing.assert_close(run.position[3], float64(s), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"backend: expected a model that .*vmap can do"):
        relax_with(obj, path, 0.5, backend="vmap", **settings)


def test_a_replica_that_diverges_is_marked_and_the_others_go_on():
    obj, path = conv_problem("none")
    common = dict(batch_size=4, project_every=4, steps=16)
    run = relax_with(obj, path, 0.5, lr=[0.01, 1e12, 0.01, 30.0], **common)
    assert run.diverged.tolist() == [False, True, False, True]
    assert 1 <= run.diverged_at[1] <= 4
    assert run.position[1, 0] == 0.5 and bool(run.position[1, 1:].isnan().all())
    assert len(run.notes) == 2 and "replica 1 (id 1, lr 1000000000000.0)" in run.notes[0]
    kept = relax_with(obj, path, 0.5, lr=[0.01, 0.01], replicas=[0, 2], **common)
    torch.testing.assert_close(run.position[[0, 2]], kept.position, rtol=0, atol=1e-5)
    with pytest.raises(DivergenceError, match=r"all 2 replicas.*replica 0 \(id 0\).*lr 10+\.0"):
        relax_with(obj, path, 0.5, lr=[1e12, 1e12], **common)


def test_an_infinite_loss_is_as_bad_as_nan():
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)

    def slope(outputs, targets):  # infinite from theta = 0.6 on, and never NaN
        wall = torch.where(outputs[:, 0] > 0.6 * targets[:, 0], torch.inf, 0.0)
        return -outputs[:, 0] / targets[:, 0] + wall.detach()

    obj = Objective(torch.nn.Linear(1, 1, bias=False).double(), slope, (x, x))
    path = linear_path(torch.zeros(1).double(), torch.ones(1).double())
    run = relax_with(obj, path, 0.5, lr=[0.01, 0.05], batch_size=2, project_every=1, steps=4)
    assert run.diverged.tolist() == [False, True]


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
def test_those_that_go_on_keep_their_own_optimizer_state(optimizer):
    _, obj, path = mlp_problem()
    common = dict(batch_size=4, project_every=4, steps=24)
    run = relax_with(obj, path, 0.5, optimizer=optimizer, lr=[0.02, 1e9, 0.05, 0.03], **common)
    assert run.diverged.tolist() == [False, True, False, False]
    alone = relax_with(
        obj, path, 0.5, optimizer=optimizer, lr=[0.02, 0.05, 0.03], replicas=[0, 2, 3], **common
    )
    torch.testing.assert_close(run.position[[0, 2, 3]], alone.position, rtol=0, atol=1e-10)
    torch.testing.assert_close(run.distance[[0, 2, 3]], alone.distance, rtol=0, atol=1e-10)


def test_a_replica_too_far_from_the_path_has_diverged_unless_that_is_allowed():
    _, obj, path = mlp_problem()
    settings = dict(lr=[0.01, 20.0], batch_size=4, steps=30)
    run = relax_with(obj, path, 0.5, max_distance=0.5, **settings)
    assert run.diverged_at.tolist() == [-1, 15]
    free = relax_with(obj, path, 0.5, max_distance=math.inf, **settings)
    assert not bool(free.diverged.any())
    assert float(free.distance[1, 1]) > 0.5 * path.length > float(free.distance[0].max())


def test_records_table_and_callback_agree():
    _, obj, path = mlp_problem()
    seen = []
    run = relax(
        obj,
        path,
        [0.2, 0.9],
        ProjectedSGD([0.1, 0.2], 6, project_every=3, steps=20),
        recording=Recording(every=6, loss_every=12, callback=seen.append),
    )
    assert run.steps.tolist() == [0, 6, 12, 18, 20] == [r.step for r in seen]
    assert torch.equal(torch.stack([r.position for r in seen], 1), run.position)
    assert torch.equal(torch.stack([r.loss for r in seen], 1), run.loss)
    assert run.full_loss.isfinite().any(0).tolist() == [True, False, True, False, False]
    for t in (0, 2):
        expected = [obj.loss(path.point(float(s))) for s in run.position[:, t]]
        torch.testing.assert_close(run.full_loss[:, t], float64(expected))
    table = run.to_table()
    assert table.num_rows == 10
    last = table.rows()[-1]
    assert last["replica"] == 1 and last["step"] == 20 and last["effective_time"] == 4.0
    assert last["position"] == float(run.position[1, -1]) and last["start"] == 0.9
    with pytest.raises(ValueError, match="effective_time: expected one learning rate"):
        _ = run.effective_time
    assert run.select([1]).effective_time.tolist() == [0.2 * t for t in run.steps.tolist()]
    chosen = run.select(torch.tensor([False, True]))
    assert torch.equal(chosen.position, run.position[1:])
    assert torch.equal(pickle.loads(pickle.dumps(run)).position, run.position)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_table_of_a_cycle_holds_the_batches_of_its_epochs(size):
    """Orders are made for all replicas and epochs at once, and kept from cycle to cycle."""
    data = torch.arange(7.0)[:, None], torch.zeros(7, 1)
    obj = Objective(torch.nn.Linear(1, 1), "mse", data)
    batches, per_epoch = Minibatches(obj, size, 3, [5, 1]), 7 // size
    for step, count in ((0, 1), (1, 15), (16, 2), (17, 9), (3, 4), (90, 8), (97, 1)):
        for entry, at in zip(batches._batches(step, count), range(step, step + count), strict=True):
            epoch, batch = divmod(at, per_epoch)
            for row, name in zip(entry, (5, 1), strict=True):
                order = permutation(7, fold_in(3, "relax", name), epoch)
                if size == 7:
                    order = torch.arange(7)
                assert torch.equal(row, order[batch * size : (batch + 1) * size])
    batches.keep([1])
    alone = Minibatches(obj, size, 3, [1])
    assert torch.equal(batches._batches(96, 5), alone._batches(96, 5))


@pytest.mark.parametrize("backend", ["loop", "threads"])
def test_a_full_batch_has_no_noise_of_seed_or_order(backend):
    _, obj, path = mlp_problem()
    common = dict(lr=0.1, batch_size=obj.num_examples, steps=30, backend=backend)
    run = relax_with(obj, path, 0.4, replicas=3, **common)
    other = relax_with(obj, path, 0.4, seed=5, replicas=[7], **common)
    assert torch.equal(run.position, other.position.expand(3, -1))
    x, y = Minibatches(obj, obj.num_examples, 0, [0, 1])(3)
    assert torch.equal(x[1], obj.tensors()[0]) and torch.equal(y[0], obj.tensors()[1])
    theta = path.point(0.4)  # descends the gradient of the loss over all examples
    for _ in range(15):
        theta = theta - 0.1 * obj.gradient(theta)
    assert abs(path.project(theta)[0] - float(run.position[0, 1])) < 1e-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(start=1.2), r"start: expected positions in \[0, 1\]"),
        (dict(start=[0.1, math.nan]), "start: expected positions"),
        (dict(start="middle"), "start: expected a number"),
        (dict(lr=-0.1), "lr: expected finite numbers above 0"),
        (dict(lr=[0.1, 0.2], start=[0.1, 0.2, 0.3]), "replicas: .* 3 for start, 2 for lr"),
        (dict(lr=[0.1, 0.2], replicas=3), "replicas: .* 2 for lr, 3 for replicas"),
        (dict(start=[]), "replicas: .*0 for start"),
        (dict(replicas=0), "replicas: expected an integer"),
        (dict(replicas=[-1]), "replicas: expected an integer"),
        (dict(optimizer="lion"), "optimizer: expected one of 'sgd', 'nesterov', 'adam'"),
        (dict(optimizer="adam", momentum=0.9), "momentum: expected None"),
        (dict(optimizer="nesterov", momentum=0.0), "momentum: expected a number"),
        (dict(momentum=1.0), "momentum: expected a number"),
        (dict(weight_decay=-1.0), "weight_decay: expected"),
        (dict(betas=(0.9, 1.0)), "betas: expected two numbers"),
        (dict(batch_size=25), "batch_size: expected at most the 24 examples"),
        (dict(batch_size=0), "batch_size: expected an integer"),
        (dict(steps=0), "steps: expected an integer"),
        (dict(project_every=0), "project_every: expected an integer"),
        (dict(record_every=20), r"recording\.every: expected a multiple of project_every"),
        (dict(loss_every=10), r"recording\.loss_every: expected a multiple of every"),
        (dict(max_distance=0.0), "max_distance: expected a number above 0"),
        (dict(backend="fast"), "backend: expected one of"),
        (dict(seed=-1), "seed: expected an integer"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    _, obj, path = mlp_problem()
    good = dict(start=0.5, lr=0.1, batch_size=4, steps=30)
    with pytest.raises(ValueError, match=message):
        relax_with(obj, path, **{**good, **change})


def test_a_path_that_is_not_the_objectives_is_refused():
    _, obj, path = mlp_problem()
    good = dict(lr=0.1, batch_size=4, steps=30)
    with pytest.raises(ValueError, match="path: expected a path in the objective's 66 parameters"):
        relax_with(obj, Path(torch.eye(3).double()), 0.5, **good)
    with pytest.raises(ValueError, match=r"path: expected pivots of torch\.float64"):
        relax_with(obj, path.to(torch.float32), 0.5, **good)
    with pytest.raises(ValueError, match="path: expected a Path"):
        relax_with(obj, path.pivots, 0.5, **good)
    with pytest.raises(ValueError, match="pivots: expected at least 2 pivots"):
        relax_with(obj, Path(path.pivots[:1]), 0.5, **good)
    with pytest.raises(ValueError, match="obj: expected an Objective"):
        relax_with(nn.Linear(1, 1), path, 0.5, **good)
