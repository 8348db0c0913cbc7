"""Paths between minima: polylines, straight lines, minimum energy paths."""

from .path import Path, linear_path

__all__ = ["Path", "linear_path"]
