"""One capture serves all objectives of an architecture, and none that computes something else."""

from __future__ import annotations

import copy
import functools
import gc
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from entropic_fast.curvature import GGNOperator, HessianOperator, JacobianOperator, autograd_only
from entropic_fast.curvature.hvp import _engine as engines
from entropic_fast.curvature.hvp import _interpreter_cache as cache
from entropic_fast.objective import Objective

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
Y = torch.arange(6) % 3


@pytest.fixture
def captures(monkeypatch):
    """Captures so far, one entry each."""
    found = []
    capture = engines.capture
    monkeypatch.setattr(engines, "capture", lambda *args: found.append(1) or capture(*args))
    return found


@pytest.fixture
def comparisons(monkeypatch):
    """Comparisons with autograd so far."""
    found = []
    agrees = HessianOperator._agrees
    monkeypatch.setattr(HessianOperator, "_agrees", lambda *args: found.append(1) or agrees(*args))
    return found


def objective(model: nn.Module, loss="cross_entropy", data=(X, Y)) -> Objective:
    return Objective(model.double(), loss, data)


def assert_right(obj: Objective, way: str = "graph") -> None:
    v = torch.linspace(1, -1, obj.num_params, dtype=torch.float64)
    operator = HessianOperator(obj)
    assert operator.method.startswith(way), operator.method
    with autograd_only():
        expected = HessianOperator(obj) @ v
    assert torch.allclose(operator @ v, expected, rtol=1e-9, atol=1e-12)


class Kind(Enum):
    TANH = 1
    SINE = 2


@dataclass
class Settings:
    scale: float = 1.0
    kind: Kind = Kind.TANH
    sizes: list[int] = field(default_factory=lambda: [4, 5])


GLOBAL = 1.0
NESTED = types.SimpleNamespace(scale=1.0)


class Changeable(nn.Module):
    """All that a forward pass may read beside parameters."""

    factor = 1.0

    def __init__(self, **changes) -> None:
        super().__init__()
        torch.manual_seed(changes.pop("seed", 0))
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.plain = torch.ones(5)
        self.scale, self.settings, self.options = 1.0, Settings(), {"power": 1, "names": ("a", "b")}
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        for name, value in changes.items():
            setattr(self, name, value)

    def helper(self, x: Tensor) -> Tensor:
        return x * self.factor

    def forward(self, x: Tensor) -> Tensor:
        h = self.helper(self.act(self.first(x) * self.scale)) * self.settings.scale
        if self.settings.kind is Kind.SINE:
            h = torch.sin(h)
        h = h ** self.options["power"] * GLOBAL * NESTED.scale
        return self.second(h * self.frozen.exp() + self.plain)

    def double(self) -> Changeable:
        self.plain = self.plain.double()
        return super().double()


def sine_of(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.sin(scale * x)


def with_defaults(x: Tensor, scale: float = 1.0) -> Tensor:
    return torch.tanh(x * scale)


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x)

    def method(self, x: Tensor) -> Tensor:
        return self(x)


def hooked(scale: float, *, before: bool = False) -> Changeable:
    model = Changeable()
    if before:
        model.second.register_forward_pre_hook(lambda layer, args: (args[0] * scale,))
    else:
        model.first.register_forward_hook(lambda layer, args, out: out * scale)
    return model


def patched(scale: float) -> Changeable:
    model = Changeable()
    model.helper = types.MethodType(lambda self, x: torch.tanh(scale * x), model)
    return model


def patched_forward(scale: float) -> Changeable:
    model = Changeable()
    model.forward = types.MethodType(lambda self, x: self.second(self.first(x) ** 2 * scale), model)
    return model


def sized(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip((4, *widths), (*widths, 3), strict=True)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())])


def tied(is_tied: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    if is_tied:
        model[2].weight = model[0].weight
    return model


def frozen(part: str) -> nn.Module:
    model = Changeable()
    getattr(model, part).requires_grad_(False)
    return model


# What differs: two values, each made into a model.
DIFFERENT: dict[str, tuple[Callable[..., nn.Module], object, object]] = {
    "a number": (lambda v: Changeable(scale=v), 0.5, 2.0),
    "numbers nearly alike": (lambda v: Changeable(scale=v), 1.0, 1.0 + 1e-7),
    "a lambda's closure": (lambda v: Changeable(act=sine_of(v)), 0.5, 2.0),
    "a lambda": (lambda v: Changeable(act=v), lambda x: x.sin(), lambda x: x.cos()),
    "a function": (lambda v: Changeable(act=v), torch.sin, torch.sigmoid),
    "a module as activation": (lambda v: Changeable(act=v), nn.SiLU(), nn.GELU()),
    "arguments of a module": (
        lambda v: Changeable(act=v), nn.GELU(approximate="tanh"), nn.GELU(approximate="none"),
    ),
    "a partial function": (
        lambda v: Changeable(act=functools.partial(with_defaults, scale=v)), 0.5, 2.0,
    ),
    "a callable object": (lambda v: Changeable(act=Scaled(v)), 0.5, 2.0),
    "a bound method": (lambda v: Changeable(act=Scaled(v).method), 0.5, 2.0),
    "an entry of a dict": (lambda v: Changeable(options={"power": v}), 1, 2),
    "an attribute of a dataclass": (lambda v: Changeable(settings=Settings(scale=v)), 0.5, 2.0),
    "an enumeration": (lambda v: Changeable(settings=Settings(kind=v)), Kind.TANH, Kind.SINE),
    "a frozen parameter": (
        lambda v: Changeable(frozen=nn.Parameter(torch.full((5,), v), requires_grad=False)),
        0.5,
        1.5,
    ),
    "a plain tensor": (lambda v: Changeable(plain=torch.full((5,), v)), 0.5, 1.5),
    "a forward hook": (hooked, 0.5, 2.0),
    "a hook before": (functools.partial(hooked, before=True), 0.5, 2.0),
    "a method put in place": (patched, 0.5, 2.0),
    "a forward put in place": (patched_forward, 0.5, 2.0),
    "the width of a layer": (lambda v: sized(v), 4, 6),
    "the number of layers": (lambda v: sized(*v), (5, 5), (5,)),
    "tied parameters": (tied, True, False),
    "what is frozen": (frozen, "first", "second"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_models_that_differ_share_nothing(name: str, captures):
    make, one, other = DIFFERENT[name]
    for count, value in enumerate((one, other, one), 1):
        obj = objective(make(value))
        assert_right(obj)
        assert len(captures) == min(count, 2)


class Other(Changeable):
    def helper(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def test_a_subclass_with_another_method_shares_nothing(captures):
    for model in (Changeable(), Other(), Changeable(), Other()):
        assert_right(objective(model))
    assert len(captures) == 2


def test_what_code_reads_of_its_module_and_class_counts(captures, monkeypatch):
    def changed(target: object, name: str, value: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert_right(objective(Changeable()))

    assert_right(objective(Changeable()))
    changed(NESTED, "scale", 0.5)
    changed(Changeable, "factor", 3.0)
    changed(Changeable, "helper", lambda self, x: x.exp())
    changed(nn.Linear, "forward", lambda self, x: functional.linear(x, self.weight.sin()))
    monkeypatch.setitem(globals(), "GLOBAL", 0.5)
    assert_right(objective(Changeable()))
    assert len(captures) == 6


def test_the_default_dtype_counts(captures):
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * torch.full((3,), 1 / 3)

    assert_right(objective(Made()))
    torch.set_default_dtype(torch.float64)
    try:
        assert_right(objective(Made()))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(captures) == 2


class Hidden(nn.Module):
    """Reads a setting that no key holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        import os

        scale = float(os.environ["ENTROPIC_FAST_TEST_SCALE"])
        return torch.tanh(self.layer(x)) * scale


def test_outputs_that_differ_are_found_where_the_key_is_the_same(captures, monkeypatch):
    for scale in ("0.5", "2.0", "2.0"):
        monkeypatch.setenv("ENTROPIC_FAST_TEST_SCALE", scale)
        assert_right(objective(Hidden()))
    assert len(captures) == 2


class Detaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        import os

        h = torch.tanh(self.layer(x))
        if "ENTROPIC_FAST_TEST_DETACH" in os.environ:
            h = h.detach()
        return self.last(h)


def test_hidden_derivatives_are_found_where_the_key_is_the_same(monkeypatch):
    assert_right(objective(Detaching()))
    monkeypatch.setenv("ENTROPIC_FAST_TEST_DETACH", "1")
    assert_right(objective(Detaching()), "autograd: the model calls Tensor.detach")


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.view(-1, 2, 2))[0][:, -1])


ALIKE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "changeable": (Changeable, (4,)),
    "lambda": (lambda: Changeable(act=sine_of(0.5)), (4,)),
    "hook": (lambda: hooked(0.5), (4,)),
    "callable object": (lambda: Changeable(act=Scaled(0.5)), (4,)),
    "normalization": (resnet, (1, 4, 4)),
    "recurrent": (Recurrent, (4,)),
    "weight normalization": (weight_normed, (4,)),
    "transformer": (lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        nn.Flatten(), nn.Linear(8, 3),
    ), (8,)),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_models_alike_are_captured_and_compared_once(name: str, captures, comparisons):
    make, shape = ALIKE[name]
    for seed in range(3):
        torch.manual_seed(seed)
        model = make().double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand_like(buffer))
        data = torch.randn(6, *shape, dtype=torch.float64), Y
        assert_right(objective(model, data=data))
    assert len(captures) == len(comparisons) == 1


def test_another_loss_kind_or_data_is_compared_anew(captures, comparisons):
    def changed(loss="cross_entropy", data=(X, Y)):
        before = len(captures), len(comparisons)
        assert_right(objective(sized(5), loss, data))
        return len(captures) - before[0], len(comparisons) - before[1]

    assert changed() == (1, 1)
    assert changed() == (0, 0)
    assert changed(nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)) == (0, 1)
    assert changed(nn.CrossEntropyLoss(reduction="none", label_smoothing=0.2)) == (0, 1)
    assert changed(nn.CrossEntropyLoss(reduction="none", label_smoothing=0.2)) == (0, 0)
    assert changed(lambda out, y: (out[:, 0] - y) ** 2) == (0, 1)
    assert changed(data=(X, functional.one_hot(Y).double())) == (0, 1)
    assert changed(data=(X[:5], Y[:5])) == (1, 1)
    assert changed() == (0, 0)
    for operator in (GGNOperator, JacobianOperator):
        assert operator(objective(sized(5))).method == "graph"
    assert changed() == (0, 0)


def test_other_dtypes_share_nothing(captures):
    model = sized(5)
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        obj = Objective(copy.deepcopy(model).to(dtype), "cross_entropy", (X, Y))
        v = torch.linspace(1, -1, obj.num_params, dtype=dtype)
        with autograd_only():
            expected = HessianOperator(obj) @ v
        assert torch.allclose(HessianOperator(obj) @ v, expected, rtol=rtol, atol=rtol)
    assert len(captures) == 2


def test_a_reason_against_capture_is_shared(captures):
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.layer.weight.detach().sum()

    for _ in range(2):
        assert_right(objective(Detached()), "autograd: the model calls Tensor.detach")
    assert len(captures) == 1


def test_no_model_is_kept_alive():
    gone = []
    for _ in range(3):
        model = Changeable(act=sine_of(0.5))
        obj = objective(model)
        operator = HessianOperator(obj)
        assert operator.method == "graph"
        gone += [ref(model), ref(obj.module), ref(obj.module.frozen), ref(obj), ref(model.act)]
        del model, obj, operator
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)
    assert cache.interpreters


def test_no_refused_model_is_kept_alive():
    model = Changeable(act=lambda x: x.detach())
    obj = objective(model)
    assert HessianOperator(obj).method.startswith("autograd")
    gone = [ref(model), ref(obj.module)]
    del model, obj
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_few_interpreters_are_kept(monkeypatch):
    monkeypatch.setattr(cache.interpreters, "most", 2)
    for width in (2, 3, 4):
        assert_right(objective(sized(width)))
    assert len(cache.interpreters) == 2


def test_a_model_without_key_is_captured_by_itself(captures):
    for _ in range(2):
        model = sized(5)
        model.generator = iter(())  # not understood
        try:
            copy.deepcopy(model)
        except TypeError:
            pytest.skip("cannot be copied")
        assert_right(objective(model))
    assert len(captures) == 2
