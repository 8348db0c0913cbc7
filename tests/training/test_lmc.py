import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from entropic_fast._utils.table import Table
from entropic_fast.curvature import HessianOperator, top_eigenvalues
from entropic_fast.objective import Objective
from entropic_fast.training import TrainConfig, train
from entropic_fast.training.data import load
from entropic_fast.training.lmc import (
    LineSettings,
    Trunk,
    branch,
    instability,
    linear_mode_connectivity,
    measure_line,
    summarize,
)
from entropic_fast.training.models import build, initialize

TRAIN, TEST = load("digits", limit=80, test_limit=40)
CONFIG = TrainConfig(epochs=4, batch_size=20, augment=False, lr=0.05)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(norm="batch"):
    from entropic_fast.training.models import digits_cnn

    return digits_cnn(norm, channels=(2, 3, 3))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def result():
    return linear_mode_connectivity(
        small, TRAIN, CONFIG, epochs=(2, 0, 4), settings=LineSettings(5), eval_data=TEST, seed=7
    )


def test_the_tables_have_their_columns(result):
    assert result.table.columns == (
        "k",
        "point",
        "loss",
        "accuracy",
        "test_loss",
        "test_accuracy",
        "eigenvalue",
        "residual",
        "converged",
        "distance",
    )
    assert result.table["k"].tolist() == [0] * 5 + [2] * 5 + [4] * 5
    assert result.table.where(k=2)["point"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert result.instability["k"].tolist() == [0, 2, 4]
    assert (
        "test_loss"
        not in linear_mode_connectivity(
            small, TRAIN, TrainConfig(epochs=0), epochs=[0], settings=LineSettings(3)
        ).table.columns
    )


def test_branching_at_the_end_leaves_nothing_between(result):
    last = result.instability.where(k=4)
    assert result.table.where(k=4)["distance"].tolist() == [0] * 5
    for name in ("loss_instability", "barrier", "error_barrier"):
        assert last[name][0] == 0
    # To the square of the relative residual, 1e-2, as each search begins at the one before.
    assert abs(last["eigenvalue_instability"][0]) < 1e-4


def test_later_branches_end_closer_together(result):
    distance = [result.table.where(k=k)["distance"][0] for k in (0, 2, 4)]
    assert distance[0] > distance[1] > distance[2] == 0


def test_each_k_is_the_same_alone_as_together(result):
    alone = linear_mode_connectivity(
        small, TRAIN, CONFIG, epochs=(2,), settings=LineSettings(5), eval_data=TEST, seed=7
    )
    for name in alone.table.columns:
        assert alone.table[name].tolist() == result.table.where(k=2)[name].tolist()


def test_the_whole_agrees_with_its_parts_by_hand(result):
    # Trunk and branches by calls of train alone, the midpoint by an explicit average.
    from entropic_fast.ops.random_bits.streams import fold_in

    start = train(small(), TRAIN, CONFIG, seed=7, stop_epoch=2)
    ends = []
    for i in (1, 2):
        model = copy.deepcopy(start.model)
        train(
            model,
            TRAIN,
            CONFIG,
            seed=7,
            order_seed=fold_in(7, "branch", i),
            resume=start.state,
        )
        ends.append(model)
    middle = small()
    with torch.no_grad():
        for p, a, b in zip(middle.parameters(), *(m.parameters() for m in ends), strict=True):
            p.copy_((a.double() + b.double()) / 2)
    x, y = TRAIN.tensors()
    for layer in middle.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    middle.train()(x)  # one batch holds all examples: its statistics are the data's
    middle.eval()
    row = result.table.where(k=2).rows()[2]
    with torch.no_grad():
        outputs = middle(x)
    assert row["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-4)
    assert row["accuracy"] == float((outputs.argmax(1) == y).double().mean())
    test_x, test_y = TEST.tensors()
    with torch.no_grad():
        outputs = middle(test_x)
    expected = nn.functional.cross_entropy(outputs, test_y)
    assert row["test_loss"] == pytest.approx(float(expected), rel=1e-4)

    objective = Objective(middle.double(), "cross_entropy", (x.double(), y))
    operator = HessianOperator(objective)
    dense = operator @ torch.eye(objective.num_params, dtype=torch.float64)
    top = float(torch.linalg.eigvalsh((dense + dense.T) / 2)[-1])
    assert row["eigenvalue"] == pytest.approx(top, rel=2e-2)
    assert row["residual"] <= 2e-2 * top


def test_the_branches_differ_in_order_alone():
    trunk = Trunk(small, TRAIN, CONFIG, seed=1)
    start = trunk.at(1)
    before = copy.deepcopy(start)
    first, second, again = (branch(start, TRAIN, CONFIG, i, seed=1) for i in (1, 2, 1))
    assert same(first, again) and not same(first, second)
    assert same(start.model, before.model)
    assert all(torch.equal(v, before.optimizer_state[k]) for k, v in start.optimizer_state.items())


def test_the_trunk_is_trained_once_and_only_as_far_as_asked():
    epochs = []
    trunk = Trunk(
        small, TRAIN, CONFIG, seed=1, progress=lambda what, done, total: epochs.append(done)
    )
    at1, at3, at3_again = trunk.at(1), trunk.at(3), trunk.at(3)
    assert epochs == [1, 2, 3]
    assert same(at3.model, at3_again.model) and at3.model is not at3_again.model
    assert same(trunk.at(1).model, at1.model)  # going back trains anew
    assert same(trunk.at(0).model, initialize(small(), 1))
    whole = small()
    train(whole, TRAIN, CONFIG, seed=1)
    assert same(trunk.at(4).model, whole)


def test_an_interrupted_trunk_starts_again_rather_than_go_on_wrongly():
    def interrupt(what, done, total):
        if done == 2 and not interrupted:
            interrupted.append(1)
            raise KeyboardInterrupt

    interrupted = []
    trunk = Trunk(small, TRAIN, CONFIG, seed=1, progress=interrupt)
    trunk.at(1)
    with pytest.raises(KeyboardInterrupt):
        trunk.at(3)
    assert same(trunk.at(3).model, Trunk(small, TRAIN, CONFIG, seed=1).at(3).model)


def test_units_are_stored_and_resumed(result):
    stored = {"k0": result.table.where(k=0)}
    stored["k0"] = Table({n: v for n, v in stored["k0"].items()})
    made, told = [], []

    def task(name, compute):
        if name not in stored:
            made.append(name)
            stored[name] = compute()
        return stored[name]

    again = linear_mode_connectivity(
        small,
        TRAIN,
        CONFIG,
        epochs=(0, 2, 4),
        settings=LineSettings(5),
        eval_data=TEST,
        seed=7,
        task=task,
        progress=lambda *what: told.append(what),
    )
    assert made == ["k2", "k4"]
    for name in result.table.columns:
        assert again.table[name].tolist() == result.table[name].tolist()
    assert ("trunk", 2, 2) in told and not any(what.startswith("k = 0") for what, *_ in told)
    assert ("k = 2, branch 2", 4, 4) in told and ("k = 4, line", 5, 5) in told


def test_a_line_between_a_network_and_itself_is_flat():
    model = initialize(small("none"), 3)
    line = measure_line(model, copy.deepcopy(model), TRAIN, LineSettings(4, 30, 20))
    assert len(set(line["loss"])) == 1
    # Each point's search begins at the one before, and ends within the tolerance of 1e-2.
    assert line["eigenvalue"].tolist() == pytest.approx([line["eigenvalue"][0]] * 4, rel=1e-3)
    objective = Objective(model, "cross_entropy", TRAIN.tensors(30))
    assert line["loss"][0] == objective.loss()
    curvature = Objective(model, "cross_entropy", TRAIN.tensors(20))
    top = top_eigenvalues(HessianOperator(curvature), k=1, tol=1e-2, seed=0)
    assert line["eigenvalue"][0] == pytest.approx(float(top.values[0]), rel=1e-5)


def test_the_ends_are_met_exactly():
    a, b = initialize(small("none"), 1), initialize(small("none"), 2)
    line = measure_line(a, b, TRAIN, LineSettings(3))
    for model, loss in ((a, line["loss"][0]), (b, line["loss"][-1])):
        assert loss == Objective(model, "cross_entropy", TRAIN.tensors()).loss()


def test_a_line_that_overflows_keeps_its_other_points():
    a = initialize(small("none"), 1)
    b = copy.deepcopy(a)
    with torch.no_grad():
        for p in b.parameters():
            p.mul_(1e20)
    with pytest.warns(RuntimeWarning, match=r"measure_line: .* not finite at 2 of 3 points"):
        line = measure_line(a, b, TRAIN, LineSettings(3, None, 10))
    assert line["loss"][1:].tolist() == [math.inf] * 2 and math.isfinite(line["loss"][0])
    assert np.isnan(line["accuracy"]).tolist() == [False, True, True]
    assert line["converged"].tolist() == [1, 0, 0] and math.isfinite(line["eigenvalue"][0])
    row = summarize(Table({"k": [0] * 3, **line})).rows()[0]
    assert row["barrier"] == row["loss_instability"] == math.inf
    assert math.isnan(row["eigenvalue_instability"])


def test_models_can_be_named():
    result = linear_mode_connectivity(
        "digits-cnn", TRAIN, TrainConfig(epochs=0), epochs=[0], settings=LineSettings(3, None, 10)
    )
    assert result.table.num_rows == 3
    model = initialize(build("digits-cnn"), 0)
    objective = Objective(model, "cross_entropy", TRAIN.tensors())
    assert result.table["loss"][0] == objective.loss()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1], 0),
        ([1, math.inf, 2], math.inf),
        ([2, 5, 4], 2 / 3),
        ([4, 1, 2], 1 / 3),
        ([1, 3, 1], 2),
        ([0.5, 0.5, 0.5], 0),
    ],
)
def test_instability_is_the_relative_rise(values, expected):
    assert instability(values) == pytest.approx(expected)


def test_instability_without_a_scale_is_nan():
    assert math.isnan(instability([0, 1, 0])) and math.isnan(instability([-1, 1, 0.5]))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_instability_of_no_path_is_refused(values):
    with pytest.raises(ValueError, match="at least 2 finite numbers"):
        instability(values)


def test_a_summary_takes_the_worst_point():
    table = Table(
        {
            "k": [3] * 3,
            "point": [0, 0.5, 1],
            "loss": [1.0, 4.0, 3.0],
            "test_accuracy": [0.9, 0.5, 0.7],
            "eigenvalue": [2.0, 3.0, 2.0],
        }
    )
    row = summarize(table).rows()[0]
    assert row["k"] == 3 and row["barrier"] == 2
    assert row["loss_instability"] == 1 and row["eigenvalue_instability"] == 0.5
    assert row["error_barrier"] == pytest.approx(0.5 - 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": ()}, "epochs: expected different numbers from 0 to 4, at least one"),
        ({"epochs": (1, 1)}, "epochs: expected different"),
        ({"epochs": (5,)}, "epochs: expected different"),
        ({"epochs": (-1,)}, "epochs: expected an integer"),
        ({"points": 2}, "points: expected an integer of at least 3"),
        ({"tol": 0}, "tol"),
        ({"loss_examples": 81}, "loss_examples: expected at most 80"),
        ({"curvature_examples": 0}, "curvature_examples"),
        ({"model": "vgg"}, "model name: expected one of"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(change, message):
    def told(*what):
        raise AssertionError("training began")

    change = dict(change)
    lines = {name: change.pop(name) for name in tuple(change) if hasattr(LineSettings, name)}
    arguments = {"model": small, "data": TRAIN, "config": CONFIG, "progress": told, **change}
    with pytest.raises(ValueError, match=message):
        linear_mode_connectivity(**arguments, settings=LineSettings(**lines))


def test_networks_of_different_architectures_are_refused():
    with pytest.raises(ValueError, match="b: expected a network with the parameters of a"):
        measure_line(small("none"), small("batch"), TRAIN)
