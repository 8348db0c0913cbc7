"""AutoNEB between trained networks on the handwritten digits."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from entropic_fast.objective import Objective
from entropic_fast.paths import AutoNEBConfig, auto_neb, barrier, linear_path, path_losses

CONFIG = AutoNEBConfig(
    pivots=7,
    max_pivots=9,
    cycles=[(120, 0.1), (80, 0.03), (60, 0.01)],
    batch_size=100,
    weight_decay=0.0,
    eval_points=3,
)


def digits(count=400):
    data = load_digits()
    inputs = torch.tensor(data.data[:count] / 16 - 0.3, dtype=torch.float32)
    return inputs, torch.tensor(data.target[:count])


def network(seed, norm):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(24)] if norm else []
    return nn.Sequential(
        nn.Linear(64, 24), *middle, nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10)
    )


def minimum(seed, norm):
    """A network trained on full batches until its loss is small."""
    model, (x, y) = network(seed, norm), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "batchnorm"])
def connected(request):
    """Objective, ends and AutoNEB's result between two minima."""
    models = [minimum(seed, request.param) for seed in (0, 1)]
    objs = [Objective(m, "cross_entropy", digits(), batch_size=200) for m in models]
    a, b = (obj.parameters_vector() for obj in objs)
    return objs[0], a, b, auto_neb(objs[0], a, b, CONFIG)


def test_the_path_has_almost_no_barrier_where_the_line_has_a_high_one(connected):
    obj, a, b, result = connected
    line = barrier(path_losses(obj, linear_path(a, b), points=20))
    found = barrier(result.losses)
    assert line.over_max > 0.5
    assert found.over_max < 0.1 * line.over_max
    assert result.saddle.loss >= found.max_loss
    assert float(result.losses["accuracy"].min()) > 0.95


def test_the_path_is_longer_than_the_chord_but_not_by_much(connected):
    _, a, b, result = connected
    assert 1.0 < result.path.length / float((b - a).norm()) < 3.0


def test_the_record_of_a_run_is_whole(connected):
    _, _, _, result = connected
    assert result.history.num_rows == CONFIG.steps and result.cycles.num_rows == 3
    assert result.cycles["max_loss"][-1] == result.losses["loss"].max()
    assert result.history["length"][-1] == pytest.approx(result.path.length, rel=1e-6)


def test_buffers_are_neither_in_the_path_nor_of_consequence():
    """Useless running statistics at the ends change neither the path nor its losses."""
    models = [minimum(seed, True) for seed in (2, 3)]
    config = AutoNEBConfig(
        pivots=4, max_pivots=5, cycles=[(5, 0.1)] * 2, batch_size=100, eval_points=2
    )
    results = []
    for spoilt in (False, True):
        if spoilt:
            for model in models:
                model[1].running_mean.fill_(1e3)
                model[1].running_var.fill_(1e-3)
        objs = [Objective(m, "cross_entropy", digits()) for m in models]
        before = {name: value.clone() for name, value in objs[0].buffers.items()}
        results.append(auto_neb(objs[0], *(o.parameters_vector() for o in objs), config))
        for name, value in objs[0].buffers.items():
            assert torch.equal(value, before[name])
    size = sum(p.numel() for p in models[0].parameters())
    assert results[0].path.num_params == size
    assert torch.equal(results[0].path.pivots, results[1].path.pivots)
    assert results[0].losses.rows() == results[1].losses.rows()


def test_the_band_descends_batch_statistics():
    models = [minimum(seed, True) for seed in (4, 5)]
    objs = [Objective(m, "cross_entropy", digits()) for m in models]
    ends = [o.parameters_vector() for o in objs]
    config = AutoNEBConfig(pivots=4, max_pivots=4, cycles=[(3, 0.1)], batch_size=50)
    twin = Objective(models[0], "cross_entropy", digits(), norm="batch")
    default = auto_neb(objs[0], *ends, config)
    given = auto_neb(objs[0], *ends, config, train_obj=twin)
    frozen = auto_neb(objs[0], *ends, config, train_obj=objs[0])
    assert torch.equal(default.path.pivots, given.path.pivots)
    assert not torch.equal(default.path.pivots, frozen.path.pivots)


def test_the_training_twin_has_the_losses_of_a_model_in_training_mode():
    model, (x, y) = minimum(6, True), digits()
    obj = Objective(model, "cross_entropy", (x, y), batch_size=len(x))
    twin = obj.with_norm("batch")
    model.train()
    want = nn.functional.cross_entropy(model(x), y)
    assert twin.loss() == pytest.approx(want.item(), rel=1e-5)
    assert twin.loss() != pytest.approx(obj.loss(), rel=1e-5)
    assert not twin.has_running_statistics and obj.has_running_statistics
    assert obj.with_norm("running") is obj
    with pytest.raises(ValueError, match="running statistics"):
        twin.with_norm("running")


def test_tensors_are_the_examples_in_order():
    x, y = digits(50)
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    for data in ((x, y), batches, torch.utils.data.TensorDataset(x, y)):
        inputs, targets = Objective(network(0, False), "cross_entropy", data).tensors()
        assert torch.equal(inputs, x) and torch.equal(targets, y)
