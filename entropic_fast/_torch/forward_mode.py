"""torch's forward mode, one thread at a time.

Its levels belong to the process (torch 2.13 and 2.15): a thread that leaves its level removes it
from all others, whose calls then raise or return wrong numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

# To be held by all code that runs or traces forward mode; acquired before a model's lock.
forward_lock = threading.RLock()


def jvp(function: Callable[..., Any], points: Any, directions: Any) -> Any:
    """`torch.func.jvp`: the function's values and their derivatives along directions."""
    with forward_lock:
        return torch.func.jvp(function, points, directions)
