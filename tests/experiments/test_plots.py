"""What the figures draw of several rows of numbers."""

import numpy as np
import pytest
from scipy import stats

from entropic_fast._utils.table import Table
from entropic_fast.experiments.claims._intervals import unconverged_text
from entropic_fast.experiments.figures import _style as plots
from entropic_fast.profile._report import _eigenvalues, _shown


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


def test_what_is_not_converged_is_marked_at_the_number():
    table = Table({"s": [0.0, 0.5, 1.0], "value": [1.0, 3.0, 2.0], "met": [1, 0, 1]})
    _, (ax,) = plots.panels(1, 1)
    plots.mark_unconverged(ax, table, "s", "value", "met")
    plots.mark_unconverged(ax, table, "s", "value", "a column of newer runs")
    (cross,) = ax.lines
    assert (cross.get_xdata().tolist(), cross.get_ydata().tolist()) == ([0.5], [3.0])
    assert ax.get_legend().get_texts()[0].get_text() == "not converged"
    assert unconverged_text(table, "met") == "; 1 of 3 values not converged"
    row = {"point": "A", "hessian_trace": 1.0, "hessian_trace_std_error": 0.1}
    row |= {"top_eigenvalue": 3.0, "top_eigenvalue_residual": 0.2, "top_eigenvalue_converged": 0}
    row |= {"negative_mass": 0.1, "negative_mass_std_error": 0.1}
    assert _shown(row)["largest eigenvalue"] == "3 ± 0.2, not converged"
    assert _shown(row | {"top_eigenvalue_converged": 1})["largest eigenvalue"] == "3 ± 0.2"
    found = {"which": ["largest"] * 2, "rank": [1, 2], "eigenvalue": [3.0, 1.0]}
    found |= {"residual": [0.1, 0.5], "converged": [True, False], "all_converged": [False] * 2}
    cells = _eigenvalues(Table({"point": ["A", "A"], **found}))
    assert [c["residual"] for c in cells] == ["0.1", "0.5, not converged"]
