"""Directional derivatives of first and second order through the graph of a network."""

from .engine import JetEngine
from .hidden import NotCapturedError

__all__ = ["JetEngine", "NotCapturedError"]
