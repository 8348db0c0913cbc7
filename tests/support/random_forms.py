"""Random forms of batches, models that take them, and containers of outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from random_pieces import Draw
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, TensorDataset

Columns = dict[str, Tensor]  # what a model takes: "x" and perhaps "scale"
Batches = list[tuple[Columns, Any]]  # with targets


@dataclass
class Pair:
    x: Any
    scale: Any


@dataclass
class Single:
    x: Any


class Named(NamedTuple):
    logits: Any
    hidden: Any


@dataclass
class Parts:
    logits: Any
    hidden: Any


# -- models by how they are called ------------------------------------------------------------


class Called(nn.Module):
    """A model that computes `inner(x, scale)`; its forward takes them in some form."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @staticmethod
    def arguments(columns: Columns) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of a call with these."""
        return (), dict(columns)


class One(Called):
    def forward(self, x: Tensor) -> Any:
        return self.inner(x, None)


class Two(Called):
    def forward(self, x: Tensor, scale: Tensor) -> Any:
        return self.inner(x, scale)


class Optional(Called):
    def forward(self, x: Tensor, scale: Tensor | None = None, labels: Any = None) -> Any:
        assert labels is None
        return self.inner(x, scale)


class Keywords(Called):
    def forward(self, *, x: Tensor, scale: Tensor | None = None) -> Any:
        return self.inner(x, scale)


class AnyKeywords(Called):
    def forward(self, **columns: Tensor) -> Any:
        return self.inner(columns["x"], columns.get("scale"))


class OneDict(Called):
    def forward(self, batch: Columns) -> Any:
        return self.inner(batch["x"], batch.get("scale"))

    @staticmethod
    def arguments(columns: Columns) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (dict(columns),), {}


class Nested(Called):
    def forward(self, x: Tensor, rest: dict[str, Any]) -> Any:
        return self.inner(x, rest["deep"][0].get("scale"))

    @staticmethod
    def arguments(columns: Columns) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (columns["x"], {"deep": [{"scale": columns["scale"]}]}), {}


class OfDataclass(Called):
    def forward(self, item: Any) -> Any:
        return self.inner(item.x, getattr(item, "scale", None))

    @staticmethod
    def arguments(columns: Columns) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((Pair if "scale" in columns else Single)(**columns),), {}


# Each form: the model that takes it, and the inputs of a batch; None for a dict with its labels.
Inputs = Callable[[Columns], Any]
ONE: dict[str, tuple[type[Called], Inputs | None]] = {
    "a tensor": (One, lambda c: c["x"]),
    "a list of one tensor": (One, lambda c: [c["x"]]),
    "a dict beside labels": (One, lambda c: dict(c)),
    "a dict with labels": (One, None),
    "a dict with labels, keywords": (Keywords, None),
    "a dict with labels, any keywords": (AnyKeywords, None),
    "a dict with labels, optional arguments": (Optional, None),
    "a dict for one argument": (OneDict, lambda c: dict(c)),
    "a dataclass": (OfDataclass, lambda c: Single(**c)),
}
TWO: dict[str, tuple[type[Called], Inputs | None]] = {
    "a tuple of inputs": (Two, lambda c: (c["x"], c["scale"])),
    "a list of inputs": (Optional, lambda c: [c["x"], c["scale"]]),
    "(a, b, targets)": (Two, lambda c: (c["x"], c["scale"])),
    "a dict beside labels": (Two, lambda c: {"unused": c["scale"][:, 0], **c}),
    "a dict with labels": (Two, None),
    "a dict with labels, keywords": (Keywords, None),
    "a dict with labels, any keywords": (AnyKeywords, None),
    "a dict with labels, optional arguments": (Optional, None),
    "a dict for one argument": (OneDict, lambda c: dict(c)),
    "nested": (Nested, lambda c: (c["x"], {"deep": [{"scale": c["scale"]}]})),
    "a dataclass": (OfDataclass, lambda c: Pair(**c)),
}


@dataclass(frozen=True)
class Form:
    """A form of batches: the class of the model, and how inputs and data are packed."""

    name: str
    model: type[Called]
    inputs: Inputs | None
    numpy: bool
    source: str
    batch_size: int | None
    label: str

    def batch(self, columns: Columns, targets: Any) -> Any:
        """One batch, as the data have it."""
        if self.inputs is None:
            found: Any = {**columns, self.label: targets}
        elif self.name == "(a, b, targets)":
            found = (*self.inputs(columns), targets)
        elif self.source == "index":
            found = (self.inputs(columns), targets, torch.arange(len(columns["x"])))
        else:
            found = (self.inputs(columns), targets)
        return arrays(found) if self.numpy else found

    def data(self, batches: Batches) -> tuple[Any, dict[str, Any]]:
        """Data of an Objective, with what says how it is cut."""
        if len(batches) > 1:
            return [self.batch(*batch) for batch in batches], {}
        columns, targets = batches[0]
        size = {} if self.batch_size is None else {"batch_size": self.batch_size}
        if self.source == "Dataset":
            return Rows(columns, targets, self), size
        if self.source == "DataLoader":
            return DataLoader(Rows(columns, targets, self), self.batch_size or 3), {}
        if self.source == "TensorDataset":
            return TensorDataset(*columns.values(), targets), size
        return self.batch(columns, targets), size


class Rows(Dataset[Any]):
    """Examples one by one, as (inputs, targets), or as dicts with their labels."""

    def __init__(self, columns: Columns, targets: Any, form: Form) -> None:
        self.columns, self.targets, self.form = columns, targets, form

    def __len__(self) -> int:
        return len(self.columns["x"])

    def __getitem__(self, i: int) -> Any:
        columns = {name: column[i] for name, column in self.columns.items()}
        targets = tree_map(lambda t: t[i], self.targets)
        if self.form.inputs is None:
            return {**columns, self.form.label: targets}
        if self.form.name == "(a, b, targets)":
            return (*self.form.inputs(columns), targets)
        return self.form.inputs(columns), targets


def arrays(value: Any) -> Any:
    """The same with NumPy arrays for tensors."""
    if isinstance(value, Pair):
        return Pair(arrays(value.x), arrays(value.scale))
    if isinstance(value, Single):
        return Single(arrays(value.x))
    return tree_map(lambda t: t.numpy() if isinstance(t, Tensor) else t, value)


def random_form(draw: Draw, two: bool, plain_targets: bool) -> Form:
    """A form of batches for a model of one input, or two."""
    kinds = TWO if two else ONE
    name = draw.one(*kinds)
    model, inputs = kinds[name]
    sources = ["tensors", "tensors"]
    if name != "a dataclass" and name != "a dict beside labels":
        sources += ["Dataset", "DataLoader"]
    if name == "a tensor" or (name == "(a, b, targets)" and plain_targets):
        sources += ["TensorDataset"] if plain_targets else []
    if name == "a tensor":
        sources += ["index", "index"]
    source = draw.one(*sources)
    numpy = source == "tensors" and draw.chance(0.25)
    label = (
        draw.one("labels", "label", "targets", "y")
        if name != "a dict with labels, optional arguments"
        else "labels"
    )
    draw.note(f"batch: {name}")
    if source != "tensors":
        draw.note(f"batch: {source}")
    if numpy:
        draw.note("batch: NumPy")
    size = draw.one(None, 1, 2, 3, 50)
    return Form(name, model, inputs, numpy, source, size, label)


# -- outputs ----------------------------------------------------------------------------------

PACKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda out, hidden: (out, hidden),
    "list": lambda out, hidden: [hidden, out],
    "dict": lambda out, hidden: {"hidden": hidden, "logits": out, "cache": None},
    "namespace": lambda out, hidden: SimpleNamespace(logits=out, hidden=hidden, past=(None, 3)),
    "dataclass": Parts,
    "named tuple": Named,
}
PLACES: dict[str, tuple[str | int, ...]] = {  # names of the first part
    "tuple": (0, -2),
    "list": (1,),
    "dict": ("logits",),
    "namespace": ("logits",),
    "dataclass": ("logits",),
    "named tuple": ("logits", 0),
}


def unpacked(kind: str, output: Any) -> tuple[Tensor, Tensor]:
    """What was packed."""
    if kind == "tuple":
        return output[0], output[1]
    if kind == "list":
        return output[1], output[0]
    if kind == "dict":
        return output["logits"], output["hidden"]
    return output.logits, output.hidden
