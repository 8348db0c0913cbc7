"""Which kind of data was given: the examples themselves, batches of them, or a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from ..._utils import checks, trees
from ._batch_format import as_tree


def is_one_batch(data: Any) -> bool:
    """Whether data are the examples themselves, not batches; rejects an ambiguous tuple of two."""
    if isinstance(data, Mapping) and not isinstance(data, Dataset):
        return True
    if not isinstance(data, tuple | list) or not data:
        return False
    if any(is_array(item) for item in data):
        return True
    if isinstance(data, list) or len(data) != 2:
        return False
    if _alike(*data):
        raise checks.invalid(
            "data",
            "(inputs, targets), or a list of batches",
            f"a tuple of two that may be either: {checks.describe(data)}",
            "pass a list [batch, batch], or inputs and targets in a dict each",
        )
    return True


def is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _alike(first: Any, second: Any) -> bool:
    """Whether two structures could be batches of one loader."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return set(first) == set(second)
    containers = isinstance(first, tuple | list) and isinstance(second, tuple | list)
    if not containers or len(first) != len(second) or len(first) < 2:
        return False
    try:
        forms = {trees.example_form(as_tree("data", list(item))) for item in (first, second)}
    except ValueError:
        return False
    return len(forms) == 1


def holds_examples(data: Any) -> bool:
    """Whether data that are no torch Dataset hold single examples by index, as Hugging Face's."""
    if isinstance(data, str | bytes | list | tuple | Tensor | DataLoader):
        return False
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data)):
        return False
    try:
        return any(np.ndim(leaf) == 0 for leaf in tree_leaves(data[0]))
    except Exception:  # what cannot be indexed so is read by iteration
        return False
