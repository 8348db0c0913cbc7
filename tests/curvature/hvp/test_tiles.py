"""Tiles: how examples that come in batches are put together, shape by shape."""

import gc
from dataclasses import dataclass
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from entropic_fast.curvature import GGNOperator, HessianOperator, JacobianOperator, autograd_only
from entropic_fast.curvature.hvp import _engine as engines
from entropic_fast.curvature.hvp import _tiles as tiling
from entropic_fast.objective import Objective

OPERATORS = [HessianOperator, GGNOperator]


class PerPosition(nn.Module):
    """A class for each token, whatever the length."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 4)

    def forward(self, t: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(t))).sum(1)


def token_batches(*shapes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randint(5, shape), torch.randint(4, shape[:1])) for shape in shapes]


def agree(operator, obj: Objective) -> None:
    """A product by the rules is that of autograd."""
    with autograd_only():
        other = operator(obj)
    one = operator(obj)
    v = torch.linspace(-1, 1, obj.num_params, dtype=obj.dtype)
    assert torch.allclose(one @ v, other @ v, rtol=1e-11, atol=1e-13)
    if operator is not JacobianOperator:
        forms = one.quadratic_forms(v[:, None])
        assert torch.allclose(forms, other.quadratic_forms(v[:, None]), rtol=1e-11)


def test_batches_of_a_loader_are_put_together_into_tiles():
    torch.manual_seed(0)
    x, y = torch.randn(1000, 4, dtype=torch.float64), torch.arange(1000) % 3
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    obj = Objective(model, "cross_entropy", loader)
    engine = HessianOperator(obj)._engine
    tiles = list(engine.tiles())
    assert sum(len(tile.inputs) for tile in tiles) < 1000 + len(tiles)
    assert torch.equal(torch.cat([tile.batch.inputs for tile in tiles]), x)
    assert torch.equal(torch.cat([tile.batch.targets for tile in tiles]), y)
    v = torch.randn(obj.num_params, dtype=torch.float64)
    whole = HessianOperator(Objective(model, "cross_entropy", (x, y)))
    assert torch.allclose(HessianOperator(obj) @ v, whole @ v, rtol=1e-12)


@pytest.mark.parametrize("tile", [1, 3, 5, 64])
def test_regrouped_examples_are_all_there_in_order(tile):
    batches = token_batches((2, 4), (3, 4), (4, 4), (1, 7), (2, 4), (5, 4))
    obj = Objective(PerPosition().double(), "cross_entropy", batches)
    found = list(tiling._regrouped(obj.batches, tile))
    assert tiling._longest_run(obj) == 9
    assert [b.start for b in found] == [0, *torch.tensor([len(b.inputs) for b in found]).cumsum(0)][
        :-1
    ]
    assert max(len(b.inputs) for b in found) == min(tile, 9)
    got = torch.cat([b.inputs.flatten() for b in found])
    assert torch.equal(got, torch.cat([t.flatten() for t, _ in batches]))
    assert torch.equal(torch.cat([b.targets for b in found]), torch.cat([y for _, y in batches]))


@pytest.mark.parametrize("operator", [*OPERATORS, JacobianOperator])
def test_sequences_of_other_lengths_have_tiles_of_their_own(operator):
    batches = token_batches((3, 4), (2, 4), (2, 7), (4, 3))
    agree(operator, Objective(PerPosition().double(), "cross_entropy", batches))


class DetachesLong(PerPosition):
    def forward(self, t: Tensor) -> Tensor:
        h = self.table(t)
        h = h.detach() if t.shape[1] > 5 else h
        return self.out(torch.tanh(h)).sum(1)


@pytest.mark.parametrize("operator", [*OPERATORS, JacobianOperator])
def test_a_later_shape_that_cannot_be_captured_goes_to_autograd(operator):
    batches = token_batches((3, 4), (3, 7))
    obj = Objective(DetachesLong().double(), "cross_entropy", batches)
    assert operator(obj).method == "autograd: the model calls Tensor.detach"
    agree(operator, obj)


def test_every_shape_is_compared_with_autograd(monkeypatch):
    obj = Objective(
        PerPosition().double(), "cross_entropy", token_batches((3, 4), (3, 4), (3, 7), (2, 5))
    )
    seen = []
    agrees = HessianOperator._agrees

    def counted(self, engine, sample):
        seen.append(sample.inputs.shape[1])
        return agrees(self, engine, sample)

    monkeypatch.setattr(HessianOperator, "_agrees", counted)
    assert HessianOperator(obj).method == HessianOperator(obj).method == "graph"
    assert seen == [4, 7, 5]


def test_many_shapes_are_captured_once(monkeypatch):
    captures = []
    capture = engines.capture

    def counted(*args):
        captures.append(args)
        return capture(*args)

    monkeypatch.setattr(engines, "capture", counted)
    batches = token_batches(*((2, length) for length in range(1, 13)))
    obj = Objective(PerPosition().double(), "cross_entropy", batches)
    v = torch.ones(obj.num_params, dtype=torch.float64)
    H = HessianOperator(obj)
    H @ v, H @ v, HessianOperator(obj) @ v
    assert len(captures) == 12


def test_inputs_of_too_many_shapes_go_to_autograd(monkeypatch):
    monkeypatch.setattr(tiling, "SHAPES", 2)
    batches = token_batches((2, 1), (2, 2), (2, 3))
    H = HessianOperator(Objective(PerPosition().double(), "cross_entropy", batches))
    assert H.method == "autograd: inputs come in more than 2 shapes"


@dataclass
class Unhashable:
    """A loss that is equal to others, so that it has no hash."""

    power: int = 2

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.sum(1) - targets) ** self.power


class Unreferable:
    """A loss to which nothing refers weakly."""

    __slots__ = ()

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.sum(1) - targets) ** 2


@pytest.mark.parametrize("loss", [Unhashable(), Unreferable()], ids=["unhashable", "slots"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_loss_may_be_any_callable(operator, loss):
    obj = Objective(PerPosition().double(), loss, token_batches((3, 4)))
    assert operator(obj).method == "graph"
    agree(operator, obj)


def test_interpreters_keep_no_loss_alive():
    loss = Unhashable()
    obj = Objective(PerPosition().double(), loss, token_batches((3, 4)))
    interpreter = next(iter(HessianOperator(obj)._engine._interpreters.values()))
    ((kind, _),) = interpreter.checked._verified
    assert kind[0] == "hessian" and (kind, loss) in interpreter.checked
    assert (kind, Unhashable(power=3)) not in interpreter.checked
    gone, model = ref(loss), obj.module  # whose interpreters stay
    del loss, obj
    gc.collect()
    assert gone() is None and len(model.table.weight) == 5 and not interpreter.checked._verified


@pytest.mark.parametrize("derive", [Objective.double, lambda obj: obj.with_norm("batch")])
def test_objectives_derived_again_need_no_new_capture(derive, monkeypatch):
    captures = []
    capture = engines.capture
    monkeypatch.setattr(engines, "capture", lambda *args: captures.append(1) or capture(*args))
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    obj = Objective(model, "cross_entropy", (torch.randn(8, 4), torch.arange(8) % 3))
    ways = [HessianOperator(derive(obj)).method for _ in range(3)]
    assert ways == ["graph"] * 3 and len(captures) == 1
    again = derive(obj)
    assert again.module is not obj.module and again.dtype == derive(obj).dtype
