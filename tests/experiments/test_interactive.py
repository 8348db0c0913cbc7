"""Panels of drawn figures as Plotly charts."""

import json

import numpy as np
import pytest

from entropic_fast.experiments import _plotly as interactive
from entropic_fast.experiments.figures import _style as plots


def chart_of(draw):
    with plots.look():
        figure, (ax,) = plots.panels(1, 1)
        draw(ax)
        (chart,) = interactive.charts(figure)
    json.loads(interactive.as_json(chart))
    return chart


def test_lines_keep_their_numbers_labels_and_looks():
    def draw(ax):
        ax.plot([0, 1, 2], [3, np.nan, 5], "s--", color="#0072B2", label="one")
        ax.plot([0, 1], [1, 2], color="k")
        ax.set_xlabel("updates")
        ax.set_title("A   a title", loc="left")

    chart = chart_of(draw)
    one, other = chart["data"]
    assert (one["x"], one["y"]) == ([0.0, 1.0, 2.0], [3.0, None, 5.0])
    assert (one["mode"], one["name"], one["line"]["dash"]) == ("lines+markers", "one", "dash")
    assert one["line"]["color"] == "#0072b2" and one["marker"]["symbol"] == "square"
    assert other["line"]["color"] == "ink" and other["showlegend"] is False
    assert chart["title"] == "A   a title"
    assert chart["layout"]["xaxis"]["title"]["text"] == "updates"


def test_error_bars_are_those_drawn():
    def draw(ax):
        ax.errorbar([1, 2], [10, 20], [[1, 2], [3, 4]], fmt="o", label="e", capsize=2)

    (trace,) = chart_of(draw)["data"]
    assert (trace["x"], trace["y"], trace["name"]) == ([1.0, 2.0], [10.0, 20.0], "e")
    assert trace["error_y"]["array"] == pytest.approx([3, 4])
    assert trace["error_y"]["arrayminus"] == pytest.approx([1, 2])


@pytest.mark.parametrize("both", [False, True])
def test_error_bars_across_are_not_taken_for_those_along(both):
    def draw(ax):
        ax.errorbar([1, 2], [10, 20], [3, 4] if both else None, [0.1, 0.2], fmt="o")

    (trace,) = chart_of(draw)["data"]
    assert trace["error_x"]["array"] == pytest.approx([0.1, 0.2])
    assert trace["error_x"]["arrayminus"] == pytest.approx([0.1, 0.2])
    assert ("error_y" in trace) == both
    if both:
        assert trace["error_y"]["array"] == pytest.approx([3, 4])


def test_bands_levels_and_second_axes():
    def draw(ax):
        ax.fill_between([0, 1, 2], [0, 0, 0], [1, 2, 1], color="#D55E00", alpha=0.25, lw=0)
        ax.plot([0, 2], [0, 1])
        ax.axhline(0.5, color="0.6")
        twin = ax.twinx()
        twin.plot([0, 2], [100, 200], label="other")

    chart = chart_of(draw)
    band, line, other = chart["data"]
    assert band["fill"] == "toself" and band["opacity"] == 0.25 and max(band["y"]) == 2
    assert line["y"] == [0.0, 1.0]
    assert (other["yaxis"], other["y"]) == ("y2", [100.0, 200.0])
    assert chart["layout"]["yaxis2"]["side"] == "right"
    assert [shape["y0"] for shape in chart["layout"]["shapes"]] == [0.5]


def test_logarithmic_axes_and_those_plotly_does_not_have():
    def draw(ax):
        ax.plot([0, 1, 100], [1, 10, 100])
        ax.set_yscale("log")
        ax.set_ylim(1, 100)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xticks([0, 1, 100], ["zero", "one", "hundred"])

    chart = chart_of(draw)
    layout = chart["layout"]
    assert layout["yaxis"]["type"] == "log" and layout["yaxis"]["range"] == pytest.approx([0, 2])
    assert layout["xaxis"]["ticktext"] == ["zero", "one", "hundred"]
    assert layout["xaxis"]["tickvals"] == pytest.approx(chart["data"][0]["x"], rel=1e-5)
    assert chart["data"][0]["y"] == [1.0, 10.0, 100.0]


def test_meshes_and_colored_points():
    def draw(ax):
        x, y = np.meshgrid([0.0, 1.0, 2.0], [0.0, 1.0])
        ax.pcolormesh(x, y, np.arange(6.0).reshape(2, 3))
        ax.scatter([0, 1], [1, 0], c=[0, 1])

    mesh, points = chart_of(draw)["data"]
    assert mesh["type"] == "heatmap" and mesh["z"] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert mesh["x"] == pytest.approx([0, 1, 2]) and mesh["y"] == pytest.approx([0, 1])
    assert points["mode"] == "markers" and len(set(points["marker"]["color"])) == 2


def test_a_panel_without_axes_is_left_out_and_text_cannot_end_a_script():
    with plots.look():
        figure, (plain, schematic) = plots.panels(1, 2)
        plain.plot([0], [0], label="</script><b>")
        schematic.plot([0], [0])
        schematic.axis("off")
        (chart,) = interactive.charts(figure)
    assert "<" not in interactive.as_json(chart)
    assert json.loads(interactive.as_json(chart))["data"][0]["name"] == "</script><b>"
