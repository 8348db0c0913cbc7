"""How batches are read, as inputs and targets, and how a model is called with the inputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from ..._utils import checks, trees
from ..._utils.trees import Tree

# Where a dict keeps its labels, in the order of Hugging Face and of common datasets.
LABELS = ("labels", "label", "label_ids", "targets", "target", "y")

_FORMS = "(inputs, targets), where each may be a tensor, a dict or a tuple, or a dict with labels"


class BatchFormat:
    """How a model takes a batch, by the signature of its forward.

    - a dict: its labels (under one of LABELS) are the targets, the keys that forward accepts are
      keyword arguments; a forward of one argument takes the dict itself. Without labels the targets
      are the entire dict, for a loss of the user's.
    - (inputs, targets): a tuple or list of inputs are positional arguments, if forward accepts so
      many.
    - (a, b, targets) for a forward of two inputs; (inputs, targets, index) for a forward of one: an
      integer index per example is dropped.

    Args:
        model: whose forward is inspected.
        labels_of: makes the targets of inputs without labels; None if the loss needs labels.

    >>> form = BatchFormat(nn.Linear(2, 1))
    >>> x, y = form.split([torch.ones(3, 2), torch.zeros(3), torch.arange(3)])
    >>> tuple(x.shape), tuple(y.shape)
    ((3, 2), (3,))
    """

    def __init__(self, model: nn.Module, labels_of: Callable[[Tree], Tensor] | None = None) -> None:
        self.labels_of = labels_of
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):  # a forward without one, in C
            parameters = [inspect.Parameter("x", inspect.Parameter.POSITIONAL_ONLY)]
        kinds = inspect.Parameter
        self._positional = [
            p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        self._keywords = {
            p.name: p
            for p in parameters
            if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        }
        self._any_positional = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        self._any_keyword = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        self._required = [
            p.name
            for p in parameters
            if p.default is p.empty
            and p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        ]

    # -- calls -----------------------------------------------------------------------------

    def arguments(self, inputs: Tree) -> tuple[tuple[Tree, ...], dict[str, Tree]]:
        """Positional and keyword arguments of the model."""
        if isinstance(inputs, Mapping) and self._takes_keywords(inputs):
            return (), dict(inputs)
        plain = isinstance(inputs, tuple | list) and not hasattr(inputs, "_fields")
        if plain and self._takes_positional(len(inputs)):
            return tuple(inputs), {}
        return (inputs,), {}

    def advice(self, inputs: Tree) -> str:
        """Why a model may fail on inputs that were read from a batch, for a message."""
        names = ", ".join(self._required)
        if isinstance(inputs, Mapping) and not self._takes_keywords(inputs):
            keys = ", ".join(repr(str(key)[:16]) for key in list(inputs)[:3])
            return (
                f"the dict was passed as it is, as its keys {keys} are not the arguments of "
                f"forward ({names}): rename them, or pass (inputs, targets)"
            )
        if isinstance(inputs, Tensor) and len(self._required) > 1:
            return (
                f"forward takes {names}, and a pair is read as (inputs, targets): pass "
                "((a, b), targets)"
            )
        return ""

    def _takes_positional(self, count: int) -> bool:
        if count == 1:  # a forward of one argument may take a list of one tensor
            return len(self._positional) == 1 or self._any_positional
        most = float("inf") if self._any_positional else len(self._positional)
        return len(self._required) <= count <= most

    def _takes_keywords(self, inputs: Mapping[str, Tree]) -> bool:
        return all(isinstance(key, str) for key in inputs) and set(self._required) <= set(
            self._accepted(inputs)
        )

    def _accepted(self, keys: Any) -> list[str]:
        return [key for key in keys if self._any_keyword or key in self._keywords]

    # -- batches ---------------------------------------------------------------------------

    def split(self, item: Any) -> tuple[Tree, Tree]:
        """Inputs and targets of a batch, with the tensors as they came.

        Raises:
            ValueError: a batch in none of the forms above, or in two of them at once.
        """
        if isinstance(item, Mapping):
            return self._split_dict(dict(item))
        if self.labels_of is not None and isinstance(item, Tensor | np.ndarray):
            inputs = as_tree("inputs", item)
            return inputs, self.labels_of(inputs)
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise checks.invalid("data", f"batches that are {_FORMS}", checks.describe(item))
        if len(item) == 2:
            return self._inputs(item[0]), as_tree("targets", item[1])
        return self._split_many(item)

    def _inputs(self, value: Any) -> Tree:
        if isinstance(value, Mapping):
            value = self._for_forward(dict(value))
        return as_tree("inputs", value)

    def _for_forward(self, values: dict[str, Any]) -> dict[str, Any]:
        """Without the keys that forward does not accept, where it is called with keywords."""
        accepted = self._accepted(values)
        return {key: values[key] for key in accepted} if self._takes_keywords(values) else values

    def _split_dict(self, item: dict[str, Any]) -> tuple[Tree, Tree]:
        label_keys = [key for key in LABELS if key in item and key not in self._required]
        label_keys = [key for key in label_keys if item[key] is not None]
        if len(label_keys) > 1:
            raise checks.invalid(
                "data",
                "labels under one key of a batch",
                f"several: {', '.join(map(repr, label_keys))}",
                "pass batches (inputs, targets) with what the loss needs as targets",
            )
        inputs = {key: value for key, value in item.items() if key not in label_keys}
        kept = self._inputs(inputs)
        if not label_keys:
            return kept, kept if self.labels_of is None else self.labels_of(kept)
        return kept, as_tree(f"labels {label_keys[0]!r}", item[label_keys[0]])

    def _split_many(self, item: Any) -> tuple[Tree, Tree]:
        count, last = len(item), item[-1]
        several = len(self._required) <= count - 1 and (
            self._any_positional or count - 1 <= len(self._positional)
        )
        index = _is_row(last) and not _is_fractional(last)
        indexed = count == 3 and index and len(self._required) <= 1
        got = f"a batch of {count}: {checks.describe(item)}"
        if several and indexed:
            raise checks.invalid(
                "data",
                "batches whose parts are known: forward takes one input or several",
                got,
                "pass ((a, b), targets) for two inputs, or (inputs, targets) without the index",
            )
        if indexed:
            return self._inputs(item[0]), as_tree("targets", item[1])
        if several:
            return as_tree("inputs", tuple(item[:-1])), as_tree("targets", last)
        raise checks.invalid(
            "data",
            f"batches that are {_FORMS}",
            got,
            "pass ((a, b), targets) for several inputs; weights of examples belong to the targets, "
            "(inputs, (targets, weights)), for a loss of your own",
        )


def _is_row(value: Any) -> bool:
    """Whether it is one number per example."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 1
    return isinstance(value, list) and all(np.ndim(item) == 0 for item in value[:1])


def _is_fractional(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return np.asarray(value).dtype.kind not in "iu"


def as_tree(where: str, value: Any) -> Tree:
    """A tree of tensors from tensors, arrays and their containers, without None in dicts."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            raise checks.invalid(where, "numbers", f"an array of dtype {value.dtype}")
        if (
            value.dtype.kind in "iu" and value.dtype.itemsize > 1
        ):  # as labels and indices have to be
            return torch.from_numpy(value.astype(np.int64))
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if isinstance(value, Mapping):
        return {
            key: as_tree(f"{where}[{key!r}]", item)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, tuple | list):
        items = [as_tree(f"{where}[{i}]", item) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            field.name: as_tree(f"{where}.{field.name}", getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
        return trees.registered(dataclasses.replace(value, **changes))
    raise checks.invalid(
        where,
        "tensors or NumPy arrays, in dicts, lists, tuples or dataclasses",
        checks.describe(value),
        "convert it to a tensor whose first axis counts the examples, or leave it out",
    )


def require_one_length(inputs: Tree, targets: Tree, one_batch: bool = False) -> int:
    """The common length of the first axis of all tensors; of the targets alone for `one_batch`."""
    named = [
        (what + keystr(path), leaf)
        for what, tree in (("inputs", inputs), ("targets", targets))
        for path, leaf in tree_flatten_with_path(tree)[0]
    ]
    if not any(name.startswith("inputs") for name, _ in named):
        raise checks.invalid("data", "at least one input", f"inputs {checks.describe(inputs)}")
    counted = [leaf for name, leaf in named if not one_batch or name.startswith("targets")]
    lengths = {leaf.shape[:1] for leaf in counted}
    if len(lengths) == 1 and () not in lengths:
        return len(counted[0])
    shown = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in named[:8])
    raise checks.invalid(
        "data",
        "inputs [N, ...] and targets [N, ...] of one length",
        shown,
        "repeat what all examples share, once per example, or register it as a buffer of the "
        "model; for one graph, say, whose edges are not counted by examples, pass coupled=True",
    )
