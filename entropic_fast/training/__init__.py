"""Data, the paper's networks, training, and linear mode connectivity.

Start with `train`; `data` and `models` hold what it trains, `minima` stores results. Relies on
`objective` and `curvature`.
"""

from ._config import EpochRecord, TrainConfig, Trained, TrainState, learning_rate
from ._train import Evaluation, evaluate, train
from .lmc import (
    LineSettings,
    LMCResult,
    Trunk,
    branch,
    instability,
    linear_mode_connectivity,
    measure_line,
)

__all__ = [
    "EpochRecord",
    "Evaluation",
    "LMCResult",
    "LineSettings",
    "TrainConfig",
    "TrainState",
    "Trained",
    "Trunk",
    "branch",
    "evaluate",
    "instability",
    "learning_rate",
    "linear_mode_connectivity",
    "measure_line",
    "train",
]
