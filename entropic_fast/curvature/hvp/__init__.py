"""Directional derivatives of first and second order through the graph of a network."""

from ._capture_checks import NotCapturedError
from ._engine import JetEngine

__all__ = ["JetEngine", "NotCapturedError"]
