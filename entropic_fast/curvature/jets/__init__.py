"""Directional derivatives of first and second order through the graph of a network."""

from .capture import NotCapturedError
from .engine import JetEngine

__all__ = ["JetEngine", "NotCapturedError"]
