"""Results in a notebook: every number with its error, markup escaped, plots that are drawn."""

import math
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import pyplot

import entropic_fast as ef
from entropic_fast._utils import notebook as display
from entropic_fast.dynamics import DivergenceError
from entropic_fast.paths import NEBResult, path_losses, saddle
from entropic_fast.training.lmc import summarize


def cells(html: str) -> list[list[str]]:
    """The text of every row of the first table, from an XML parser, which refuses stray markup."""
    table = ElementTree.fromstring(f"<div>{html}</div>").find("table")
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def drawing(html: str) -> ElementTree.Element:
    svg = "{http://www.w3.org/2000/svg}"
    (found,) = ElementTree.fromstring(f"<div>{html}</div>").findall(f"{svg}svg")
    return found


def lines(svg: ElementTree.Element) -> list[ElementTree.Element]:
    """Groups of plotted lines; axes, ticks and grid have names of their own."""
    return [
        group
        for axes in svg.iter()
        if axes.get("id", "").startswith("axes_")
        for group in axes
        if group.get("id", "").startswith("line2d_")
    ]


@pytest.fixture(scope="module")
def problem():
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    torch.manual_seed(0)
    for parameter in model.double().parameters():
        torch.nn.init.normal_(parameter)
    obj = ef.Objective(model, "cross_entropy", (x, (x[:, 0] > 0).long()))
    theta = obj.parameters_vector()
    return obj, ef.linear_path(theta, 0.5 * theta, pivots=3)


def test_an_estimate_shows_its_error():
    assert cells(ef.Estimate(2.5, 0.25, 16)._repr_html_())[1:] == [
        ["value", "2.5"],
        ["standard error", "0.25"],
        ["samples", "16"],
    ]
    assert ["error of quadrature", "0.125"] in cells(ef.Estimate(1.0, 0, 2, 0.125)._repr_html_())


def test_eigenpairs_show_their_residuals():
    pairs = ef.top_eigenvalues(torch.diag(torch.tensor([3.0, 1.0, -2.0])), k=2)
    rows = cells(pairs._repr_html_())
    assert [row[1] for row in rows[1:]] == ["3", "1"] or [
        float(row[1]) for row in rows[1:]
    ] == pytest.approx([3, 1], rel=1e-4)
    assert [float(row[2]) for row in rows[1:]] == pytest.approx(pairs.residuals.tolist(), rel=1e-4)
    assert "not converged" not in pairs._repr_html_()
    unfinished = ef.Eigenpairs(pairs.values, pairs.vectors, pairs.residuals, 7, False)
    assert "7 products, not converged" in unfinished._repr_html_()


@pytest.mark.parametrize("probes", [1, 3])
def test_a_density_shows_its_trace_and_curve(problem, probes):
    obj, _ = problem
    operator = ef.HessianOperator(obj)
    density = ef.spectral_density(operator, ef.DensitySettings(probes=probes, steps=20))
    html = density._repr_html_()
    found = dict(cells(html)[1:])
    trace = density.trace(lambda nodes: nodes)
    assert found["trace"] == display.with_error(trace.value, trace.std_error)
    assert float(found["largest node"]) == pytest.approx(float(density.nodes.max()), rel=1e-5)
    assert int(found["eigenvalues"]) == obj.num_params
    assert len(lines(drawing(html))) == 1


def test_a_path_shows_its_length():
    path = ef.Path(torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]))
    found = dict(cells(path._repr_html_())[1:])
    assert (found["length"], found["distance between the ends"]) == ("7", "5")
    assert found["positions of the pivots"] == "0, 0.429, 1"
    assert (found["pivots"], found["parameters"]) == ("3", "2")


def test_a_minimum_energy_path_shows_its_saddle_and_profile(problem):
    obj, path = problem
    losses = path_losses(obj, path, points=3)
    none = ef.Table({"step": []})
    html = NEBResult(path, losses, none, none, saddle(losses))._repr_html_()
    found = dict(cells(html)[1:])
    assert float(found["saddle's loss"]) == pytest.approx(saddle(losses).loss, rel=1e-5)
    svg = drawing(html)
    assert len(lines(svg)) == 3  # the loss, its pivots and the saddle
    assert {"pivots", "saddle"} <= {text.strip() for text in svg.itertext()}


def test_a_trajectory_shows_what_moved(problem):
    obj, path = problem
    starts = [0.3, 0.3, 0.6]
    run = ef.relax(obj, path, starts, ef.ProjectedSGD(0.1, 4, project_every=2, steps=6))
    html = run._repr_html_()
    rows = cells(html)[1:]
    assert [row[:4] for row in rows] == [["0.3", "0.1", "2", "0"], ["0.6", "0.1", "1", "0"]]
    moved = run.position[:2, -1] - run.position[:2, 0]
    error = float(moved.std()) / math.sqrt(2)
    assert rows[0][4] == display.with_error(float(moved.mean()), error)
    assert rows[1][4].endswith("± nan")  # one replica has no error
    assert len(lines(drawing(html))) == 3
    assert "sgd, B = 4, projected every 2, 6 updates" in html


def test_a_trajectory_that_diverged_is_shown(problem):
    obj, path = problem
    with pytest.raises(DivergenceError) as caught:
        ef.relax(
            obj, path, 0.5, ef.ProjectedSGD(1e9, 4, project_every=2, steps=6, max_distance=0.1)
        )
    (row,) = cells(caught.value.partial._repr_html_())[1:]
    assert row[2:] == ["1", "1", "-"]


def test_a_long_trajectory_of_many_replicas_stays_small(problem):
    obj, path = problem
    run = ef.relax(obj, path, 0.5, ef.ProjectedSGD(0.1, 4, project_every=1, steps=2), replicas=1)
    parts = {
        name: getattr(run, name)[:, :1].expand(1000, 3000)
        for name in ("position", "distance", "loss", "full_loss")
    }
    many = {name: getattr(run, name).expand(1000) for name in ("lr", "ids", "diverged_at")}
    kept = {name: getattr(run, name) for name in ("optimizer", "batch_size", "seed", "backend")}
    big = ef.Trajectory(
        **parts, **many, **kept, project_every=1, steps=torch.arange(3000), dataset_losses={}
    )
    html = big._repr_html_()
    assert len(lines(drawing(html))) == display.MOST_LINES
    assert len(html) < 300_000


def test_linear_mode_connectivity_shows_instabilities():
    rows = [
        {"k": k, "point": t, "loss": 1.0 + k * t * (1 - t), "eigenvalue": 2.0}
        for k in (0, 4)
        for t in (0.0, 0.5, 1.0)
    ]
    table = ef.Table.from_rows(rows)
    html = ef.LMCResult(table, summarize(table))._repr_html_()
    assert cells(html)[0][:2] == ["k", "loss_instability"]
    assert cells(html)[2][:3] == ["4", "1", "0"]
    assert "3 points each" in html


def test_markup_in_names_and_values_is_text():
    for html in (
        ef.Table({"<script>": ["a&b <img src=x>"]})._repr_html_(),
        display.table(["<b>"], [["<i>"]], "<u>"),
    ):
        assert not {"script", "img", "b", "i", "u"} & {
            node.tag for node in ElementTree.fromstring(html).iter()
        }
    assert cells(ef.Table({"<b>": ["<i>"]})._repr_html_()) == [["<b>"], ["<i>"]]


def test_a_long_table_shows_its_ends():
    rows = cells(ef.Table({"i": np.arange(1000), "x": np.zeros(1000)})._repr_html_())
    assert len(rows) == display.MOST_ROWS + 2
    assert rows[1][0] == "0" and rows[-1][0] == "999"
    assert rows[display.MOST_ROWS // 2 + 1] == [f"… {1000 - display.MOST_ROWS} more rows …"]
    assert cells(ef.Table({"a": [], "b": []})._repr_html_()) == [["a", "b"]]


def test_drawing_leaves_pyplot_alone():
    before = pyplot.get_fignums()
    first, second = (display.plot(lambda ax: ax.plot([0, 1], [0, 1])) for _ in range(2))
    assert pyplot.get_fignums() == before
    assert first == second  # of the same numbers the same text
    assert "<?xml" not in first and "DOCTYPE" not in first and "<script" not in first


def test_matplotlib_is_imported_for_plots_alone():
    code = (
        "import sys, torch, entropic_fast as ef; ef.Estimate(1.0, 0.1, 4)._repr_html_(); "
        "ef.Path(torch.eye(2))._repr_html_(); print('matplotlib' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"
