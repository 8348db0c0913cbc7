"""Threads that share an objective, or the settings of the process, do not disturb one another."""

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from entropic_fast._torch.full_precision import full_precision
from entropic_fast.curvature import HessianOperator, gradient_norms
from entropic_fast.curvature.per_example._vmap_fallback import no_slow_loops
from entropic_fast.objective import Objective


def in_threads(work: Callable[[], None], count: int = 3) -> None:
    """Run it in several threads at once; raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Meeting(nn.Module):
    """Lets another thread in between reading its two layers, if one can come."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.pause = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        if self.pause:
            threading.Event().wait(0.002)
        return self.second(h)


def test_threads_share_an_objective_at_different_points():
    torch.manual_seed(0)
    model = Meeting().double()
    obj = Objective(model, "mse", (torch.randn(6, 4), torch.randn(6, 3)))
    points = [obj.parameters_vector() * scale for scale in (0.5, 1.0, 2.0)]
    expected = [(obj.loss(p), obj.gradient(p), gradient_norms(obj, p)) for p in points]
    obj.module.pause = True

    def work() -> None:
        for _ in range(5):
            for point, (loss, gradient, norms) in zip(points, expected, strict=True):
                assert obj.loss(point) == loss
                assert torch.equal(obj.gradient(point), gradient)
                assert torch.equal(gradient_norms(obj, point), norms)

    in_threads(work)


def test_statistics_are_gathered_while_other_threads_evaluate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    obj = Objective(model, "mse", (torch.randn(60, 4), torch.randn(60, 3)), batch_size=2)
    loss, buffers = obj.loss(), obj.recalibrated().buffers

    def work() -> None:
        for _ in range(3):
            again = obj.recalibrated().buffers
            assert all(torch.equal(again[name], value) for name, value in buffers.items())
            assert obj.loss() == loss

    in_threads(work)


def test_settings_stay_until_the_last_thread_leaves_and_are_restored():
    before = torch.backends.mha.get_fastpath_enabled(), len(warnings.filters)
    first_left, second_in = threading.Event(), threading.Event()

    def second() -> None:
        with full_precision(), no_slow_loops():
            second_in.set()
            first_left.wait(10)
            inside.append((torch.backends.mha.get_fastpath_enabled(), len(warnings.filters)))

    inside: list[tuple[bool, int]] = []
    thread = threading.Thread(target=second)
    with full_precision(), no_slow_loops():
        thread.start()
        assert second_in.wait(10)
    first_left.set()
    thread.join()
    assert inside == [(False, before[1] + 1)]
    assert (torch.backends.mha.get_fastpath_enabled(), len(warnings.filters)) == before


@pytest.mark.parametrize("shared", [True, False], ids=["one operator", "operators of their own"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_curvature_in_threads_is_that_of_one_thread(activation, shared):
    def build() -> HessianOperator:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double()
        data = (torch.randn(20, 4), torch.arange(20) % 3)
        return HessianOperator(Objective(model, "cross_entropy", data))

    one, *others = (build() for _ in range(5))
    vectors = torch.randn(one.shape[0], 3, dtype=torch.float64)
    product, forms = one @ vectors, one.quadratic_forms(vectors)

    def work() -> None:
        operator = one if shared else others.pop()
        for _ in range(15):
            assert torch.allclose(operator @ vectors, product, rtol=1e-12, atol=1e-14)
            assert torch.allclose(operator.quadratic_forms(vectors), forms, rtol=1e-12)

    in_threads(work, 4)
