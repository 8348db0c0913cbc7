"""The entropic force on projected SGD: prediction, measured drift, and their comparison.

Start with `_point_force` (prediction) and `_drift` (measurement); docs/figures/force.md derives the
formulas. Relies on `curvature` and `dynamics.projected_sgd`.
"""

from ._comparison import (
    ForceComparison,
    ForceFit,
    compare_force,
    comparison_table,
    drift_shares,
    fit_force,
    shuffled_curvature,
    slope_with_errors,
)
from ._drift import Drift, measure_drift, noiseless_drift
from ._point_force import ForceSettings, PointForce, point_force
from ._temperature import Temperature, effective_temperature
from ._weight_norm_growth import RadialShare, radial_share, scale_invariant_rows

__all__ = [
    "measure_drift",
    "noiseless_drift",
    "Drift",
    "point_force",
    "ForceSettings",
    "PointForce",
    "compare_force",
    "comparison_table",
    "drift_shares",
    "fit_force",
    "shuffled_curvature",
    "slope_with_errors",
    "ForceComparison",
    "ForceFit",
    "effective_temperature",
    "Temperature",
    "radial_share",
    "scale_invariant_rows",
    "RadialShare",
]
