"""Directional derivatives of first and second order through the graph of a network."""
