"""Claims of figure 9."""

from __future__ import annotations

import numpy as np

from ...._utils.table import Table
from ...claims import FAILS, HOLDS, OURS, UNDECIDED, Claim, verdict
from ...claims._intervals import floats, mean_interval, normal_interval


def bad_minimum(minima: Table, loss: Table, curvature: Table, relaxation: Table) -> list[Claim]:
    """Figure 9: a minimum that generalizes badly is sharper, joined, and driven away from."""
    normal, bad = (minima.where(minimum=name).rows()[0] for name in ("normal", "bad"))
    right = np.array([normal["test_accuracy"], bad["test_accuracy"]], dtype=float)
    lost = float(right[0] - right[1])
    variance = right * (1 - right) / max(1, int(bad["test_images"]))
    worse = normal_interval(lost, float(np.sqrt(variance.sum())))
    trace, error = floats(curvature["hessian_trace"]), floats(curvature["hessian_trace_std_error"])
    ratio = trace[-1] / trace[0]
    relative = float(np.hypot(error[0] / trace[0], error[-1] / trace[-1]))
    sharper = normal_interval(ratio, ratio * relative)
    path, line = (floats(loss.where(kind=k)["loss"]) for k in ("path", "line"))
    excess, barrier = (x.max() - max(x[0], x[-1]) for x in (path, line))
    # Replicas of other starts see the same noise, so only those of the nearest start are a sample.
    nearest = float(np.max(relaxation["start"]))
    tracks = sorted(relaxation.where(start=nearest).group_by("run").items())
    ends = [floats(rows["position"])[[0, -1]] for _, rows in tracks]
    drift = np.array([first - last for first, last in ends if np.isfinite(last)])
    low, high = mean_interval(drift)
    # A line without a notable barrier connects them as well as any path.
    share = excess / barrier if barrier > max(line[0], line[-1]) else np.nan
    return [
        Claim(
            "9",
            "the bad minimum generalizes worse",
            "a minimum that also fits wrong labels errs more on test images",
            "test accuracy lost",
            lost,
            *worse,
            verdict(*worse, 0.0),
            f"test accuracy {normal['test_accuracy']:.3f} and {bad['test_accuracy']:.3f}; on the "
            f"images of the loss {normal['kept_accuracy']:.3f} and {bad['kept_accuracy']:.3f}",
            OURS,
        ),
        Claim(
            "9",
            "the bad minimum is joined to a normal one",
            "a path of low loss leads to it (under a tenth of the straight line's barrier)",
            "barrier along the path / barrier of the straight line",
            share,
            np.nan,
            np.nan,
            UNDECIDED if not np.isfinite(share) else HOLDS if share < 0.1 else FAILS,
            f"barriers {excess:.3g} and {barrier:.3g} nats; decides nothing where the line's is "
            f"under the higher end's loss, {max(line[0], line[-1]):.3g}",
            OURS,
        ),
        Claim(
            "9A",
            "the bad minimum is sharper",
            "the trace of the Hessian is larger at the bad minimum",
            "Hessian trace at the bad minimum / at the normal one",
            ratio,
            *sharper,
            verdict(*sharper, 1.0),
            f"{trace[0]:.3g} and {trace[-1]:.3g}, at most {trace.max():.3g} between",
            OURS,
        ),
        Claim(
            "9C",
            "SGD leaves the bad minimum",
            "from beside the bad minimum, projected SGD drifts along the path toward the normal "
            "one, by descent and noise together",
            f"mean displacement toward the normal minimum, from s = {nearest:g}",
            float(drift.mean()) if len(drift) else np.nan,
            low,
            high,
            verdict(low, high, 0.0),
            f"{len(drift)} of {len(ends)} replicas, which did not diverge; one pair of minima",
            OURS,
            {"replicas": len(ends)},
        ),
    ]
