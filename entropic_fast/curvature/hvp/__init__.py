"""Hessian-vector products and quadratic forms through the captured graph of a network.

Start with `_engine` (products of an objective, tile by tile), then `_interpreter` (values and
tangents of a graph) and `_capture`. docs/design/hvp.md explains the method. JVP rules of single
operations are in `_jvp_rules` and `_convolution`, fused regions in `_fusion` and `transformer`; an
activation that torch cannot differentiate twice goes into `_decompositions`. Relies on `objective`
and `ops`.
"""

from ._capture_checks import GraphCaptureError
from ._engine import HVPEngine, OutputLoss

__all__ = ["HVPEngine", "GraphCaptureError", "OutputLoss"]
