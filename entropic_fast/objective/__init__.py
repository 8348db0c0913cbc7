"""Objective: model, loss and data as a function of one parameter vector.

Start with `_objective`; `losses` holds the losses in closed form, `_validation` what is checked
when an objective is made. Relies on `distributed` for sums over several processes.
"""

from ._objective import NonFiniteLossError, Objective

__all__ = ["NonFiniteLossError", "Objective"]
