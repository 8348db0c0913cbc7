"""Keys of models: equal for models alike, different for anything that a forward pass may read."""

from __future__ import annotations

import collections
import enum
import functools
import gc
import sys
import threading
import types
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from entropic_fast._torch.architecture_key import _walk as architecture
from entropic_fast._torch.architecture_key import key_of
from entropic_fast._torch.architecture_key._code_names import reads_of

SCALE, TABLE, WEIGHTS = 1.0, {"scale": 1.0}, torch.ones(2)
settings = types.ModuleType("settings_of_a_test")
settings.scale, settings.deeper = 1.0, types.SimpleNamespace(scale=1.0)


class Pair(NamedTuple):
    a: float
    b: Any = None


@dataclass(frozen=True)
class Config:
    width: int = 3
    extra: Any = None


@dataclass(slots=True)
class Slots:
    width: int = 3


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def method(self, x: Tensor) -> Tensor:
        return x * self.value


class Net(nn.Module):
    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.layer, self.value = nn.Linear(2, 2), value

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def key(model: nn.Module) -> architecture.Key | None:
    return key_of(model, given=[*model.parameters(), *model.buffers()])


def scaled_by(value: Any):
    def scaled(x: Tensor) -> Tensor:
        return x * value

    return scaled


def default(value: Any):
    def scaled(x: Tensor, scale: Any = value) -> Tensor:
        return x * scale

    return scaled


def keyword(value: Any):
    def scaled(x: Tensor, *, scale: Any = value) -> Tensor:
        return x * scale

    return scaled


def decorated(value: Any):
    @functools.wraps(Holder.method)
    def wrapper(*args: Any) -> Tensor:
        return scaled_by(value)(*args)

    return wrapper


def without_gradient(value: Any):
    return torch.no_grad()(scaled_by(value))


def attributed(value: Any):
    def function(x: Tensor) -> Tensor:
        return x * function.scale

    function.scale = value
    return function


def nested(value: Any):
    return lambda x: (lambda y: y * value)(x)


def unregistered(value: float) -> list[nn.Module]:
    layer = nn.Linear(2, 2, bias=False)
    nn.init.constant_(layer.weight, value)
    return [layer]


def recursive(value: Any) -> list[Any]:
    items = [value]
    items.append(items)
    return items


# How a value is held, and two values that differ.
HELD: dict[str, tuple[Any, Any, Any]] = {
    "float": (lambda v: v, 0.5, 0.5 + 1e-16 * 2),
    "zero": (lambda v: v, 0.0, -0.0),
    "whole or not": (lambda v: v, 1, 1.0),
    "bool or whole": (lambda v: v, True, 1),
    "complex": (lambda v: v, 1j, -1j),
    "str": (lambda v: v, "mean", "sum"),
    "bytes or str": (lambda v: v, b"a", "a"),
    "none": (lambda v: v, None, False),
    "dtype": (lambda v: v, torch.float32, torch.float64),
    "device": (lambda v: v, torch.device("cpu"), torch.device("meta")),
    "slice": (lambda v: v, slice(1), slice(2)),
    "list": (lambda v: v, [1, 2], [2, 1]),
    "list or tuple": (lambda v: v, [1], (1,)),
    "nesting": (lambda v: v, [[1], 2], [[1, 2]]),
    "length": (lambda v: v, [1], [1, None]),
    "dict": (lambda v: v, {"a": 1}, {"a": 2}),
    "order of a dict": (lambda v: v, {"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "default of a dict": (lambda v: collections.defaultdict(v), int, list),
    "set": (lambda v: v, {1, 2}, {1, 3}),
    "named tuple": (lambda v: Pair(v), 0.5, 2.0),
    "frozen dataclass": (lambda v: Config(v), 3, 4),
    "within a dataclass": (lambda v: Config(extra={"a": [v]}), 3, 4),
    "slots": (lambda v: Slots(v), 3, 4),
    "namespace": (lambda v: types.SimpleNamespace(a=v), 3, 4),
    "enumeration": (lambda v: v, Color.RED, Color.BLUE),
    "array": (lambda v: v, np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    "number of NumPy": (lambda v: v, np.float64(1), np.float32(1)),
    "tensor": (lambda v: v, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    "tensor or parameter": (lambda v: [v], torch.ones(2), nn.Parameter(torch.ones(2))),
    "layout of a tensor": (lambda v: v, torch.ones(3, 2), torch.ones(2, 3).T),
    "class": (lambda v: v, nn.ReLU, nn.GELU),
    "object": (Holder, 0.5, 2.0),
    "method": (lambda v: Holder(v).method, 0.5, 2.0),
    "method of an array": (lambda v: np.array([v]).dot, 0.5, 2.0),
    "closure": (scaled_by, 0.5, 2.0),
    "closure over a tensor": (scaled_by, torch.ones(1), torch.zeros(1)),
    "default": (default, 0.5, 2.0),
    "keyword default": (keyword, 0.5, 2.0),
    "decorated": (decorated, 0.5, 2.0),
    "decorated by torch": (without_gradient, 0.5, 2.0),
    "attribute of a function": (attributed, 0.5, 2.0),
    "function within a function": (nested, 0.5, 2.0),
    "partial": (lambda v: functools.partial(torch.mul, other=v), 0.5, 2.0),
    "cached": (lambda v: functools.lru_cache(scaled_by(v)), 0.5, 2.0),
    "operation": (lambda v: v, torch.ops.aten.sin.default, torch.ops.aten.cos.default),
    "function of torch": (lambda v: v, torch.sin, torch.cos),
    "method of Tensor": (lambda v: v, torch.Tensor.sin, torch.Tensor.cos),
    "layers not registered": (unregistered, 0.5, 2.0),
    "holds itself": (recursive, 0.5, 2.0),
    "one twice": (lambda v: [v, v] if v else [Holder(1), Holder(1)], Holder(1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_an_attribute_holds_counts(name: str):
    hold, one, other = HELD[name]
    first, again, different = (key(Net(hold(value))) for value in (one, one, other))
    assert first is not None and first == again and hash(first) == hash(again)
    assert different is not None and different != first


@pytest.mark.parametrize(
    "value",
    [
        torch.Generator(),
        threading.Lock(),
        iter([1]),
        sys,
        settings,
        np.array([object()]),
        torch.ones(2).to_sparse(),
        {1.5, 2.5},
        ref(Holder),
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_understood_gives_no_key(value: Any):
    found = key(Net(value))
    assert found is None or value is sys


def test_parameters_are_compared_by_their_looks_alone():
    assert key(Net()) == key(Net())
    assert key_of(Net()) != key_of(Net())  # values count where they are not given
    wide, half = Net(), Net()
    wide.layer, half.layer = nn.Linear(2, 3), half.layer.half()
    assert len({key(model) for model in (Net(), wide, half)}) == 3


def test_a_parameter_held_as_an_attribute_too_gives_no_key():
    """The forward pass may read it there, where nothing else can be put in its place."""
    for early in (False, True):
        model = Net()
        if early:
            model.other = nn.Identity()
            model.other.held = [model.layer.weight]
            model.layer = model.__dict__["_modules"].pop("layer")
        else:
            model.value = [model.layer.weight]
        assert key(model) is None


def test_ties_count():
    def model(tied: bool) -> nn.Module:
        layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        if tied:
            layers[1].weight = layers[0].weight
        return layers

    assert key(model(True)) == key(model(True)) != key(model(False))


def test_hooks_count_with_how_they_are_called():
    def hook(*args: Any) -> None:
        return None

    def model(**options: bool) -> nn.Module:
        found = Net()
        found.layer.register_forward_hook(hook, **options)
        return found

    keys = [key(model(**options)) for options in ({}, {"with_kwargs": True}, {"always_call": True})]
    assert len({*keys, key(Net())}) == 4 and keys[0] == key(model())
    handle = nn.modules.module.register_module_forward_hook(hook)
    handle.remove()


def test_modes_count():
    assert key(Net()) == key(Net()) != key(Net().eval())


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm],
)
def test_parametrized_layers_are_alike(wrap):
    def model() -> nn.Module:
        return nn.Sequential(wrap(nn.Linear(2, 2)), nn.Tanh())

    assert key(model()) == key(model()) is not None


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_parametrization_counts():
    def model(factor: float) -> nn.Module:
        layer = nn.Linear(2, 2)
        parametrize.register_parametrization(layer, "weight", Times(factor))
        return layer

    assert key(model(0.5)) == key(model(0.5)) != key(model(2.0))


def reads_a_number(x: Tensor) -> Tensor:
    return x * SCALE


def reads_through_another(x: Tensor) -> Tensor:
    return reads_a_number(x)


def reads_a_table(x: Tensor) -> Tensor:
    return x * TABLE["scale"]


def reads_a_tensor(x: Tensor) -> Tensor:
    return x * WEIGHTS


def reads_a_module(x: Tensor) -> Tensor:
    return x * settings.scale


def reads_deeper(x: Tensor) -> Tensor:
    return x * settings.deeper.scale


def reads_within(x: Tensor) -> list[Any]:
    return [(lambda: SCALE * item)() for item in x]


def reads_torch(x: Tensor) -> Tensor:
    return torch.nn.functional.relu(x)


@pytest.mark.parametrize(
    ("function", "where", "name", "value"),
    [
        (reads_a_number, globals(), "SCALE", 2.0),
        (reads_through_another, globals(), "SCALE", 2.0),
        (reads_within, globals(), "SCALE", 2.0),
        (reads_a_table, TABLE, "scale", 2.0),
        (reads_a_tensor, globals(), "WEIGHTS", torch.zeros(2)),
        (reads_a_module, vars(settings), "scale", 2.0),
        (reads_deeper, vars(settings.deeper), "scale", 2.0),
        (reads_torch, vars(torch.nn.functional), "relu", torch.sigmoid),
        (reads_a_number, globals(), "SCALE", None),
    ],
)
def test_what_code_reads_of_modules_counts(monkeypatch, function, where, name, value):
    before = key(Net(function))
    assert before is not None
    monkeypatch.setitem(where, name, value)
    assert key(Net(function)) != before
    monkeypatch.undo()
    assert key(Net(function)) == before


def test_a_name_that_is_not_there_yet_counts(monkeypatch):
    before = key(Net(reads_a_number))
    monkeypatch.delitem(globals(), "SCALE")
    assert key(Net(reads_a_number)) != before


def test_a_module_read_as_a_whole_gives_no_key():
    assert key(Net(lambda x: getattr(settings, "sc" + "ale") * x)) is None

    def imports(x: Tensor) -> Tensor:
        import hidden_gpus

        return x * len(hidden_gpus.HIDDEN)

    assert key(Net(imports)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", lambda self, x: x), ("new", 1), ("forward", lambda self, x: x)],
)
def test_what_is_changed_in_a_class_counts(monkeypatch, name: str, value: Any):
    target = Net if name == "forward" else Holder
    model = Net(Holder(1))
    before = key(model)
    monkeypatch.setattr(target, name, value, raising=False)
    assert key(model) != before
    monkeypatch.undo()
    assert key(model) == before


def test_classes_of_one_name_differ_by_what_they_do():
    def made(value: float) -> nn.Module:
        class Made(Net):
            factor = value

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * self.factor

        return Made()

    assert key(made(0.5)) == key(made(0.5)) != key(made(2.0))


def test_code_that_looks_the_same_but_was_written_twice_is_not_the_same():
    one, other = lambda x: x + 1, lambda x: x + 1
    assert key(Net(one)) != key(Net(other))


def test_keys_keep_nothing_alive():
    model = Net(scaled_by(Holder(torch.ones(2))))
    found, gone = key(model), [ref(model), ref(model.value), ref(model.layer.weight)]
    del model
    gc.collect()
    assert found is not None and [one() for one in gone] == [None] * 3


def test_keys_of_what_is_gone_are_no_longer_equal():
    def made() -> architecture.Key | None:
        scope: dict[str, Any] = {}
        exec("def function(x):\n    return x", scope)
        return key(Net(scope["function"]))

    one, other = made(), made()
    gc.collect()
    assert one is not None and one != other


def test_too_much_gives_no_key(monkeypatch):
    monkeypatch.setattr(architecture, "LARGE", 100)
    assert key(Net(torch.ones(30))) is None and key(Net(torch.ones(20))) is not None
    monkeypatch.setattr(architecture, "LIMIT", 100)
    assert key(Net(list(range(200)))) is None
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert key(Net(deep)) is None


def test_what_does_not_take_being_looked_at_gives_no_key():
    class Bad:
        @property
        def __dict__(self) -> Any:
            raise TypeError("not to be looked at")

    assert key(Net(Bad())) is None


def test_values_of_lasting_tensors_are_read_once(monkeypatch):
    digests = []
    digest = architecture._digest
    monkeypatch.setattr(architecture, "_digest", lambda t: digests.append(1) or digest(t))
    model = Net()
    frozen = [model.layer.weight]
    for count in (1, 1):
        key_of(model, given=[model.layer.bias], lasting=frozen)
        assert len(digests) == count
    key_of(model, given=[model.layer.bias])
    assert len(digests) == 2


def test_what_code_reads():
    def function(x: Tensor) -> Any:
        import os.path

        return torch.sin(x), settings.deeper.scale, [SCALE for _ in x], os.path

    found = reads_of(function.__code__)
    assert {("torch", "sin"), ("settings", "deeper", "scale"), ("SCALE",)} <= set(found.names)
    assert found.imports == ("os.path",)
