"""AutoNEB on surfaces whose saddles are known, its minibatches, its resumption, its errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from entropic_fast import DivergenceError
from entropic_fast._utils.atomic_io import DamagedFileError
from entropic_fast.objective import Objective
from entropic_fast.paths import (
    AutoNEBConfig,
    NEBState,
    Path,
    annealed,
    auto_neb,
    barrier,
    linear_path,
    path_losses,
)
from entropic_fast.paths._auto_neb import minibatches


class Coordinates(nn.Module):
    """A model whose output is its parameter vector, for every example."""

    def __init__(self, size=2):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return self.theta.expand(len(x), -1)


def surface(energy, size=2):
    """The objective whose loss at theta is energy(theta)."""
    data = (torch.zeros(1, 1), torch.zeros(1))
    return Objective(Coordinates(size), lambda out, _: energy(out), data)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def mueller_brown(point):
    """Mueller and Brown, Theor. Chim. Acta 53, 75 (1979); in units of 100."""
    x, y = point[:, :1], point[:, 1:]
    dx, dy = x - tensor(1.0, 0.0, -0.5, -1.0), y - tensor(0.0, 0.5, 1.5, 1.0)
    exponent = (
        tensor(-1.0, -1.0, -6.5, 0.7) * dx**2
        + tensor(0.0, 0.0, 11.0, 0.6) * dx * dy
        + tensor(-10.0, -10.0, -6.5, 0.7) * dy**2
    )
    return (tensor(-2.0, -1.0, -1.7, 0.15) * torch.exp(exponent)).sum(1)


# Its stationary points, as published.
DEEP, SHALLOW = tensor(-0.558224, 1.441726), tensor(0.623499, 0.028038)
SADDLE, SADDLE_ENERGY = tensor(-0.822002, 0.624313), -0.40664844
SECOND_SADDLE = tensor(0.212487, 0.292988)
MIDDLE = tensor(-0.050011, 0.466694)


def double_well(point):
    """Minima (-1, 0) and (1, 0); the valley y = 1 - x^2 between them has its top at (0, 1)."""
    x, y = point[:, 0], point[:, 1]
    return (x**2 - 1) ** 2 + 4 * (y - 1 + x**2) ** 2


def plain(**settings):
    return AutoNEBConfig(**{"momentum": 0.0, "weight_decay": 0.0, **settings})


def test_the_path_of_mueller_and_brown_passes_its_saddles():
    obj = surface(mueller_brown)
    config = plain(pivots=21, cycles=annealed(2, 120, 0.03, 0.02))
    result = auto_neb(obj, DEEP, SHALLOW, config)
    for point in (SADDLE, SECOND_SADDLE, MIDDLE):
        assert result.path.project(point)[2] < 0.02
    s = result.saddle
    assert s.loss == pytest.approx(SADDLE_ENERGY, abs=2e-3)
    assert float((result.path.point(s.position) - SADDLE).norm()) < 0.03
    assert s.bracket[0] < result.path.project(SADDLE)[0] < s.bracket[1]
    line = barrier(path_losses(obj, linear_path(DEEP, SHALLOW), points=99))
    assert barrier(result.losses).over_mean < 0.75 * line.over_mean


def steepest_descent(energy, top, along):
    """The minimum energy path through a saddle: down both sides, integrated by SciPy."""

    def velocity(_, position):
        leaf = torch.tensor(position[None], requires_grad=True)
        return -torch.autograd.grad(energy(leaf).sum(), leaf)[0][0].numpy()

    sides = [
        solve_ivp(
            velocity,
            (0, 20),
            np.array(top) + sign * 1e-5 * np.array(along),
            method="LSODA",
            rtol=1e-8,
            atol=1e-10,
            max_step=0.1,
        ).y.T
        for sign in (-1, 1)
    ]
    return Path(torch.tensor(np.concatenate([sides[0][::-1], sides[1]])))


@pytest.mark.parametrize("springs", [math.inf, 1.0])
def test_the_path_converges_to_steepest_descent_from_the_saddle(springs):
    exact = steepest_descent(double_well, (0.0, 1.0), (1.0, 0.0))
    assert float((exact.pivots[[0, -1]] - tensor(-1, 0, 1, 0).view(2, 2)).abs().max()) < 1e-6
    errors = []
    for pivots in (9, 17):
        config = plain(pivots=pivots, max_pivots=pivots, cycles=[(200, 0.03)], springs=springs)
        path = auto_neb(surface(double_well), tensor(-1, 0), tensor(1, 0), config).path
        errors.append(float(exact.project(path.pivots)[2].max()))
        middle = path.pivots[pivots // 2]
        assert float((middle - tensor(0, 1)).norm()) < 1e-6
        gaps = path.pivots.diff(dim=0).norm(dim=1)
        assert float(gaps.max() / gaps.min()) < 1.05
    # Upwind tangents are of first order in the spacing.
    assert errors[0] < 0.02 and errors[1] < 0.65 * errors[0]


def test_the_saddle_estimate_sharpens_as_pivots_are_inserted():
    errors = []
    for room in (6, 15):
        config = plain(
            pivots=6, max_pivots=room, cycles=annealed(4, 60, 0.03, 0.02), insert_threshold=0.01
        )
        result = auto_neb(surface(mueller_brown), DEEP, SHALLOW, config)
        assert result.path.num_pivots <= room
        errors.append(abs(result.saddle.loss - SADDLE_ENERGY))
    assert result.path.num_pivots > 10
    assert errors[1] < 0.2 * errors[0]


def test_inserted_pivots_are_counted_and_never_after_the_last_cycle():
    config = plain(pivots=3, max_pivots=6, cycles=[(20, 0.02)] * 4)
    result = auto_neb(surface(mueller_brown), DEEP, SHALLOW, config)
    cycles = result.cycles
    assert cycles["pivots"].tolist() == [
        3,
        *(cycles["pivots"][:-1] + cycles["inserted"][:-1]).tolist(),
    ]
    assert cycles["inserted"][-1] == 0 and sum(cycles["inserted"]) == 3
    assert result.path.num_pivots == 6
    assert result.history["pivots"].tolist() == np.repeat(cycles["pivots"], 20).tolist()


def test_the_ends_do_not_move():
    result = auto_neb(
        surface(double_well), tensor(-1, 0.1), tensor(1, 0.2), plain(pivots=4, cycles=[(30, 0.05)])
    )
    assert result.path.pivots[0].tolist() == [-1.0, 0.1]
    assert result.path.pivots[-1].tolist() == [1.0, 0.2]


def test_weight_decay_descends_the_regularized_surface():
    # Across y: 2 (y - 1)^2 + c y^2 / 2 is least at y = 4 / (4 + c).
    obj = surface(lambda p: (p[:, 0] ** 2 - 1) ** 2 + 2 * (p[:, 1] - 1) ** 2)
    config = plain(pivots=3, max_pivots=3, cycles=[(100, 0.1)], weight_decay=4.0)
    path = auto_neb(obj, tensor(-1, 0.5), tensor(1, 0.5), config).path
    assert path.pivots[1, 1] == pytest.approx(0.5)
    config = plain(pivots=3, max_pivots=3, cycles=[(100, 0.1)])
    path = auto_neb(obj, tensor(-1, 0.5), tensor(1, 0.5), config).path
    assert path.pivots[1, 1] == pytest.approx(1)


def test_momentum_is_that_of_sgd():
    # One interior pivot in a valley that is quadratic across: the pivot is plain SGD in y.
    obj = surface(lambda p: (p[:, 0] ** 2 - 1) ** 2 + 0.5 * (p[:, 1] - 1) ** 2)
    config = plain(pivots=3, max_pivots=3, cycles=[(7, 0.3)], momentum=0.5)
    path = auto_neb(obj, tensor(-1, 0), tensor(1, 0), config).path
    y = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([y], lr=0.3, momentum=0.5)
    for _ in range(7):
        y.grad = y.detach() - 1
        sgd.step()
    assert path.pivots[1].tolist() == pytest.approx([0.0, float(y.detach())], abs=1e-12)


# -- minibatches -------------------------------------------------------------------------------


def noisy_wells(examples=12):
    """A double well whose examples each shift y: x is the shift, the data are its index."""
    shifts = torch.linspace(-0.2, 0.2, examples, dtype=torch.float64)[:, None]

    def loss(out, targets):
        return (out[:, 0] ** 2 - 1) ** 2 + 2 * (out[:, 1] - 1 + out[:, 0] ** 2 + targets) ** 2

    return Objective(Coordinates(), loss, (torch.arange(examples)[:, None], shifts[:, 0]))


def test_all_pivots_of_a_step_see_the_same_examples(monkeypatch):
    obj = noisy_wells(12)
    seen = []
    original = Objective.losses

    def spy(self, theta, inputs, targets):
        seen.append(tuple(inputs[:, 0].tolist()))
        return original(self, theta, inputs, targets)

    config = plain(pivots=5, max_pivots=5, cycles=[(6, 0.01), (6, 0.01)], batch_size=5)
    monkeypatch.setattr(Objective, "losses", spy)
    auto_neb(obj, tensor(-1, 0), tensor(1, 0), config, on_cycle=lambda _: seen.append("dense"))
    # Dense evaluations take whole batches of 12; steps take 5 examples.
    steps = [s for s in seen if len(s) == 5 and s != "dense"]
    assert len(steps) == 12 * 5
    by_step = [set(steps[i : i + 5]) for i in range(0, len(steps), 5)]
    assert all(len(group) == 1 for group in by_step)
    batches = [next(iter(group)) for group in by_step]
    assert len(set(batches)) == 12
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert not set(first) & set(second)  # two whole batches a pass, without repetition


def test_minibatches_depend_on_seed_and_cycle_only():
    def first(n, **key):
        steps = minibatches(10, 3, **{"seed": 0, "cycle": 0, **key})
        return [tuple(index.tolist()) for index in itertools.islice(steps, n)]

    assert first(8)[:5] == first(5)
    assert first(5) != first(5, seed=1) and first(5) != first(5, cycle=1)
    assert next(minibatches(3, 3, 0, 0)) is None and next(minibatches(3, None, 0, 0)) is None


def test_a_batch_of_everything_is_the_full_gradient():
    obj = noisy_wells(7)
    paths = [
        auto_neb(
            obj,
            tensor(-1, 0),
            tensor(1, 0),
            plain(pivots=4, cycles=[(10, 0.05)], batch_size=size, seed=seed),
        ).path.pivots
        for size, seed in ((None, 0), (7, 1), (99, 2))
    ]
    assert torch.equal(paths[0], paths[1]) and torch.equal(paths[0], paths[2])


def test_a_seed_gives_one_path_and_another_seed_another():
    config = {"pivots": 5, "max_pivots": 7, "cycles": [(15, 0.05)] * 2, "batch_size": 4}
    ends = tensor(-1, 0), tensor(1, 0)
    first, again = (auto_neb(noisy_wells(), *ends, plain(**config)) for _ in range(2))
    other = auto_neb(noisy_wells(), *ends, plain(**config, seed=1))
    assert torch.equal(first.path.pivots, again.path.pivots)
    assert first.history.rows() == again.history.rows()
    assert not torch.equal(first.path.pivots, other.path.pivots)


# -- resumption --------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path):
    config = AutoNEBConfig(
        pivots=4,
        max_pivots=8,
        cycles=annealed(3, 12, 0.05, 0.01),
        batch_size=5,
        insert_threshold=0.02,
    )
    ends = tensor(-1, 0), tensor(1, 0)
    states = []
    whole = auto_neb(noisy_wells(), *ends, config, on_cycle=states.append)
    assert [state.cycle for state in states] == [1, 2, 3]
    for state in states:
        file = tmp_path / f"{state.cycle}.safetensors"
        state.save(file)
        resumed = auto_neb(noisy_wells(), *ends, config, resume=NEBState.load(file))
        assert torch.equal(resumed.path.pivots, whole.path.pivots)
        assert resumed.losses.rows() == whole.losses.rows()
        assert resumed.history.rows() == whole.history.rows()
        assert resumed.cycles.rows() == whole.cycles.rows()
        assert resumed.saddle == whole.saddle


def test_a_state_of_another_run_is_refused(tmp_path):
    config = plain(pivots=4, cycles=[(2, 0.05)] * 2)
    ends = tensor(-1, 0), tensor(1, 0)
    states = []
    auto_neb(noisy_wells(), *ends, config, on_cycle=states.append)
    with pytest.raises(ValueError, match="same settings"):
        auto_neb(noisy_wells(), *ends, plain(pivots=4, cycles=[(3, 0.05)] * 2), resume=states[0])
    with pytest.raises(ValueError, match="same minima"):
        auto_neb(noisy_wells(), tensor(-1, 0.5), ends[1], config, resume=states[0])


def test_a_damaged_state_is_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    states = []
    auto_neb(
        noisy_wells(),
        tensor(-1, 0),
        tensor(1, 0),
        plain(cycles=[(1, 0.05)]),
        on_cycle=states.append,
    )
    states[0].save(file)
    manifest = (tmp_path / "state.json").read_text()
    for old, new in (('"momentum"', '"mass"'), ("neb-state/1", "neb-state/0")):
        (tmp_path / "state.json").write_text(manifest.replace(old, new))
        with pytest.raises(DamagedFileError, match="AutoNEB"):
            NEBState.load(file)
    (tmp_path / "state.json").write_text(manifest)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="truncated"):
        NEBState.load(file)


def test_progress_is_reported_after_each_step():
    seen = []
    config = plain(pivots=3, cycles=[(2, 0.05), (3, 0.01)])
    result = auto_neb(
        noisy_wells(), tensor(-1, 0), tensor(1, 0), config, on_step=lambda *step: seen.append(step)
    )
    assert [step[:2] for step in seen] == [(i, 5) for i in range(1, 6)]
    assert [step[2] for step in seen] == result.history.rows()


# -- errors ------------------------------------------------------------------------------------


def test_divergence_names_pivot_cycle_and_rate():
    config = plain(pivots=5, cycles=[(5, 0.01), (50, 30.0)])
    with pytest.raises(DivergenceError, match=r"pivot [123] of 5.*cycle 1 .*rate 30"):
        auto_neb(surface(double_well), tensor(-1, 0), tensor(1, 0), config)


def test_an_end_with_a_nan_loss_is_named():
    obj = surface(lambda p: (p[:, 0] - 0.1 * p[:, 1]).sqrt())
    with pytest.raises(DivergenceError, match=r"pivot 0 of 9.*finite loss, got nan"):
        auto_neb(obj, tensor(-1, 0), tensor(1, 0), plain(cycles=[(1, 0.01)]))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (tensor(0, 0), tensor(0, 0), "another point"),
        (tensor(0, 0), tensor(0, 0, 1), r"b: .*\[2\]"),
        (tensor(0, math.nan), tensor(1, 1), "a: .*finite"),
        (torch.zeros(2), tensor(1, 1), "float64"),
    ],
)
def test_ends_that_do_not_fit_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        auto_neb(surface(double_well), a, b, plain())


def test_a_training_objective_of_another_model_is_refused():
    with pytest.raises(ValueError, match="train_obj"):
        auto_neb(
            surface(double_well),
            tensor(-1, 0),
            tensor(1, 0),
            plain(),
            train_obj=surface(double_well, size=3),
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"pivots": 2},
        {"pivots": 9, "max_pivots": 8},
        {"cycles": ()},
        {"cycles": [(0, 0.1)]},
        {"cycles": [(10, -0.1)]},
        {"cycles": [10, 0.1]},
        {"batch_size": 0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"springs": 0.0},
        {"springs": math.nan},
        {"insert_threshold": 0.0},
        {"eval_points": 0},
        {"recalibration_examples": 0},
        {"seed": -1},
        {"cycles": [(10, math.inf)]},
        {"pivots": 5.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AutoNEBConfig(**settings)


def test_the_default_schedule_is_the_papers():
    cycles = AutoNEBConfig().cycles
    assert len(cycles) == 4 and cycles[0][1] == 0.1 and cycles[-1][1] == 1e-3
