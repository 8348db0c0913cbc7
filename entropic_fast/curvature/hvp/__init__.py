"""Directional derivatives of first and second order through the graph of a network."""

from ._capture_checks import GraphCaptureError
from ._engine import HVPEngine

__all__ = ["HVPEngine", "GraphCaptureError"]
