"""Tangents, forces and insertion against cases worked by hand."""

import math

import numpy as np
import pytest
import torch

from entropic_fast.paths._elastic_band import band_gradients, improved_tangents, insertions

# Backward vector (2, 0), forward vector (0, 1).
BEND = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("energies", "direction"),
    [
        ((0.0, 1.0, 2.0), (0.0, 1.0)),  # ascending: toward the higher neighbor, ahead
        ((2.0, 1.0, 0.0), (2.0, 0.0)),  # descending: behind
        ((0.0, 5.0, 2.0), (2 * 3.0, 5.0)),  # maximum, the later neighbor higher: 5 f + 3 b
        ((2.0, 5.0, 0.0), (2 * 5.0, 3.0)),  # maximum, the earlier higher: 3 f + 5 b
        ((4.0, 1.0, 6.0), (2 * 3.0, 5.0)),  # minimum: up 5, down 3, the later higher
        ((6.0, 1.0, 4.0), (2 * 5.0, 3.0)),
        ((3.0, 5.0, 3.0), (2.0, 1.0)),  # symmetric extremum: equal weights
        ((1.0, 1.0, 1.0), (2.0, 1.0)),  # flat: the bisector
        ((1.0, 1.0, 2.0), (0.0, 1.0)),  # a step ahead only
        ((2.0, 1.0, 1.0), (2.0, 0.0)),
    ],
)
def test_tangents_are_those_of_henkelman_and_jonsson(energies, direction):
    got = improved_tangents(BEND, torch.tensor(energies, dtype=torch.float64))
    want = torch.tensor([direction], dtype=torch.float64)
    torch.testing.assert_close(got, want / want.norm())


def test_tiny_energy_differences_do_not_change_the_tangent():
    energies = torch.tensor([0.0, 5.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(
        improved_tangents(BEND, 1e-200 * energies), improved_tangents(BEND, energies)
    )


def test_coinciding_pivots_have_a_finite_tangent():
    band = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    tangents = improved_tangents(band, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert tangents[1].tolist() == [0.0, 0.0]  # no direction at all
    assert tangents[2].tolist() == [1.0, 0.0]
    torch.testing.assert_close(tangents[0], torch.full((2,), math.sqrt(0.5)))


def test_a_rigid_band_moves_across_its_tangents_only():
    generator = torch.Generator().manual_seed(0)
    pivots = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    gradients = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    tangents = improved_tangents(pivots, torch.randn(6, generator=generator).double())
    across = band_gradients(pivots, gradients, tangents)
    assert float((across * tangents).sum(1).abs().max()) < 1e-14
    removed = gradients - across
    for row, tangent in zip(removed, tangents, strict=True):
        torch.testing.assert_close(row, row.dot(tangent) * tangent)


def test_springs_pull_a_pivot_toward_the_longer_side():
    pivots = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    tangents = torch.tensor([[1.0, 0.0]])
    gradient = torch.tensor([[7.0, 2.0]])
    got = band_gradients(pivots, gradient, tangents, springs=0.5)
    # Descent: minus (3 - 1) * 0.5 along the tangent is a move forward.
    assert got.tolist() == [[-1.0, 2.0]]


def profile(losses_between):
    """Losses 0 at pivots 0, 4, 8, ...; given values at the three points between."""
    values, pivot = [0.0], [True]
    for three in losses_between:
        values += [*three, 0.0]
        pivot += [False, False, False, True]
    return np.linspace(0, 1, len(values)), values, pivot


def test_insertion_takes_the_worst_point_of_each_gap_above_the_threshold():
    s, losses, pivot = profile([(0.1, 0.19, 0.1), (0.3, 0.5, 1.0), (0.25, 0.2, 0.0)])
    assert insertions(s, losses, pivot, 0.2, room=9) == [s[7], s[9]]


def test_insertion_measures_the_excess_over_the_interpolated_loss():
    # A steep slope, linear between its pivots, needs none; a bump upon it does.
    s = np.linspace(0, 1, 9)
    losses = 10 * s
    pivot = np.arange(9) % 4 == 0
    assert insertions(s, losses, pivot, 0.2, room=9) == []
    losses[2] += 2.1
    assert insertions(s, losses, pivot, 0.2, room=9) == [0.25]
    losses[2] -= 4.2  # below the line: nothing missed
    assert insertions(s, losses, pivot, 0.2, room=9) == []


def test_insertion_keeps_to_the_room_there_is_worst_first():
    s, losses, pivot = profile([(0.4, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.6)])
    assert insertions(s, losses, pivot, 0.2, room=2) == [s[6], s[11]]
    assert insertions(s, losses, pivot, 0.2, room=0) == []
    assert insertions(s, losses, pivot, 0.2, room=-3) == []


def test_insertion_needs_points_between_pivots_and_a_range():
    assert insertions([0, 0.5, 1], [0, 1, 0], [1, 1, 1], 0.2, room=5) == []
    assert insertions([0, 0.5, 1], [2, 2, 2], [1, 0, 1], 0.2, room=5) == []


def test_insertion_takes_an_infinite_loss_first_and_others_by_the_finite_range():
    s, pivot = np.linspace(0, 1, 7), [1, 0, 1, 0, 1, 0, 1]
    losses = [0.0, 5.0, 0.0, np.inf, 0.0, 0.1, 0.0]
    assert insertions(s, losses, pivot, 0.2, room=1) == [s[3]]
    assert insertions(s, losses, pivot, 0.2, room=5) == [s[1], s[3]]
    assert insertions(s, [np.inf] * 7, pivot, 0.2, room=5) == []
    assert insertions(s, [0.0, 1.0, np.inf, 1.0, 0.0, 9.0, 0.0], pivot, 0.2, room=1) == [s[5]]
