"""Langevin dynamics of independent particles, and the model potentials of figure 1.

Start with `_simulate`. Relies on the kernels of `ops.langevin`.
"""
