"""The cost model against the arithmetic of what processes do, and its plans."""

import pytest
import torch
from rich.console import Console

import entropic_fast as ef
from entropic_fast.experiments._costs import (
    PASSES,
    Machine,
    count_operations,
    expected_cost,
    measure,
    work_of,
)
from entropic_fast.profile import ProfileSettings, plan_profile
from entropic_fast.profile import _plan as profile_plan
from entropic_fast.profile._subject import Subject
from entropic_fast.profile._tasks import tasks

SHAPE = {"examples": 100, "parameters": 1000}


@pytest.mark.parametrize("quantity", PASSES)
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_all_examples_are_somebodys_and_one_process_sends_nothing(quantity, processes):
    one, shared = (work_of(quantity, **SHAPE, processes=w) for w in (1, processes))
    assert one.sent == one.messages == 0
    assert one.gradients <= processes * shared.gradients <= one.gradients * 1.1 + 10
    assert (shared.sent > 0) == (shared.messages > 0) == (processes > 1)


def test_the_gram_matrix_costs_what_its_blocks_do():
    # Of 4 processes with 25 rows each: their own block's half, and those with 1.5 others.
    work = work_of("gram", **SHAPE, processes=4)
    assert work.multiplications == 25 * (100 + 25) / 2 * 1000
    rows, matrix = 4 * 25 * 1000, 8 * 100**2
    assert work.sent == pytest.approx(2 * rows + 2 * matrix * 3 / 4, rel=0.01)
    assert work.memory == matrix + 3 * rows
    alone = work_of("gram", **SHAPE)
    assert alone.multiplications == 100 * 200 / 2 * 1000  # half of E^2, and its diagonal's half


def test_work_adds_up_and_takes_time_by_each_speed():
    machine = Machine(gradient=2.0, multiply=10.0, bandwidth=5.0, latency=3.0, operations=7.0)
    a = work_of("gradient", **SHAPE, processes=2)
    b = work_of("forms", **SHAPE, columns=3, processes=2)
    both = a.times(2) + b
    assert both.gradients == 2 * a.gradients + b.gradients
    assert both.memory == max(a.memory, b.memory)
    cost = both.on(machine)
    assert cost.seconds == pytest.approx(
        2 * a.on(machine).seconds + expected_cost("forms", machine, **SHAPE, columns=3,
                                                  processes=2).seconds
    )  # fmt: skip
    assert cost.seconds == both.gradients * 2 + both.sent / 5 + both.messages * 3
    assert cost.operations == 7 * both.gradients


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantity": "spectra"}, "quantity: expected one of"),
        ({"quantity": "loss", "examples": 0}, "examples: expected an integer of at least 1"),
        ({"quantity": "loss", "processes": 0}, "processes: expected an integer"),
        ({"quantity": "forms", "columns": 0}, "columns: expected an integer"),
    ],
)
def test_other_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        work_of(**{**SHAPE, **arguments})


def subject(path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    obj = ef.Objective(net, "cross_entropy", (torch.randn(40, 4), torch.arange(40) % 3))
    end = obj.parameters_vector() + 1 if path else None
    return Subject.of(obj, end, ProfileSettings(examples=20))


def test_operations_are_those_of_the_matrix_products():
    obj = subject(False).full
    # Forwards 2 n (4 5 + 5 3); backwards the same for weights, and for the second layer's input.
    assert count_operations(obj.gradient) == 2 * 40 * (35 + 35 + 15)
    assert measure(obj).operations == 2 * (35 + 35 + 15)


@pytest.mark.parametrize("path", [False, True])
def test_a_profiles_plan_has_every_task_and_less_work_for_each_of_more(path):
    one = profile_plan.works(subject(path))
    assert one.keys() == {task.name for task in tasks(subject(path))}
    four = profile_plan.works(subject(path), processes=4)
    assert all(four[name].gradients < one[name].gradients for name in one)
    machine = measure(subject(path).subset)
    cost = profile_plan.total(subject(path), machine, 1)
    assert cost.gradients == pytest.approx(sum(w.gradients for w in one.values()))
    assert cost.memory == max(w.memory for w in one.values()) and cost.seconds > 0


def test_a_plan_shows_processes_and_computes_nothing(capsys):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    plan_profile(net, (torch.randn(30, 4), torch.arange(30) % 3), console=Console(width=150))
    out = capsys.readouterr().out
    for word in ("processes", "operations", "bytes sent", "messages", "memory", "P = 15", "E = 30"):
        assert word in out
