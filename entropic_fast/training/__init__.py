"""Data, the paper's networks, training, and linear mode connectivity.

Start with `minima`, which trains the networks of a run; `data` and `models` are what it trains.
Relies on `objective`, `curvature` and `paths`.
"""
