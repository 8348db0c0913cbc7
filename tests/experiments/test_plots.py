"""What the figures draw of several rows of numbers."""

import numpy as np
import pytest
from scipy import stats

from entropic_fast.experiments import plots


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_band_of_students_interval_from_three_rows_on(rows):
    values = np.random.default_rng(rows).normal(size=(rows, 4))
    _, (ax,) = plots.panels(1, 1)
    plots.mean_and_points(ax, np.arange(4.0), values, "#000000")
    assert np.array_equal(ax.lines[0].get_ydata(), values.mean(0))
    assert [line.get_ydata().tolist() for line in ax.lines[1:]] == values.tolist()
    assert len(ax.collections) == (rows > 2)
    for band in ax.collections:
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(9)}
        half = stats.sem(values, axis=0) * stats.t.ppf(0.975, rows - 1)
        for side in (values.mean(0) - half, values.mean(0) + half):
            assert corners >= {(float(x), round(float(y), 9)) for x, y in enumerate(side)}


def test_the_axis_spans_the_points_however_wide_the_band():
    values = np.array([[0.0, 1.0], [0.1, 1.0], [0.9, 1.2]])
    _, (ax,) = plots.panels(1, 1)
    plots.mean_and_points(ax, np.array([0.0, 1.0]), values, "#000000")
    low, high = ax.get_ylim()
    assert -0.1 < low < 0.0 and 1.2 < high < 1.3
