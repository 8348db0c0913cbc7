"""Objective: model, loss and data as a function of one parameter vector.

Start with `_objective`, whose base classes are `_mean_loss` (mean over all data, shared among
ranks), `_functional_model` (a batch) and `_parameter_vector`. `_validation` is what is checked when
an objective is made. Relies on `distributed`, `_torch` and `_utils`.
"""

from .._torch.graph_checks import NonFiniteLossError
from ._architecture_cache import LRUCache, objective_key
from ._live_model import StaleStatisticsWarning
from ._modules import copied, plain_name, wrapped_name
from ._normalization import norm_layers
from ._objective import Objective, require_objective
from ._parameters import as_real, model_lock

__all__ = [
    "LRUCache",
    "NonFiniteLossError",
    "Objective",
    "StaleStatisticsWarning",
    "as_real",
    "copied",
    "model_lock",
    "norm_layers",
    "objective_key",
    "plain_name",
    "require_objective",
    "wrapped_name",
]
