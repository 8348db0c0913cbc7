"""Which parameters go by rule, and that no use of a parameter escapes."""

import pytest
import torch
from cases import CASES, Case, by_name, plain_scores, relative_error
from torch import Tensor, nn
from torch.nn import functional

from entropic_fast.curvature import gradient_norms, score_gram, score_matrix
from entropic_fast.curvature.per_example._engine import FastPathMismatchError, PerExampleGradEngine
from entropic_fast.curvature.per_example.layer_rules import Sink
from entropic_fast.curvature.per_example.layer_rules.linear import OuterProductGrad
from entropic_fast.objective import NonFiniteLossError, Objective
from entropic_fast.objective.data import Batch

# Cases that no rule covers whole: the parameters left to copies an example.
COPIES = {
    "raw parameter": {"scale", "temperature"},
}
UNTRACEABLE = {"data-dependent branch", "lstm"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameters_go_by_rule_unless_they_cannot(case: Case):
    engine = PerExampleGradEngine(case.objective())
    assert engine.traceable == (case.name not in UNTRACEABLE)
    assert engine.batched == COPIES.get(case.name, set())
    if engine.traceable:
        assert engine.covered_by_layer_rule | engine.batched == set(engine.obj.parameter_names)


class Model(nn.Module):
    """Two linear layers with a twist in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.raw = nn.Parameter(torch.randn(4))
        self.double()


class Penalty(Model):
    """A weight is a layer's and also part of an expression of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) * self.a.weight.square().sum()


class Scaled(Model):
    """A layer's function on a weight that is computed from the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(functional.linear(x, self.a.weight * self.raw, self.a.bias)))


class Transposed(Model):
    """The same weight forwards and transposed, as in a tied autoencoder."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.linear(torch.tanh(self.a(x)), self.a.weight.t()))


class SharedBias(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(functional.linear(x, self.a.weight, self.raw))
        return self.b(functional.linear(h, self.a.weight.detach(), self.raw))


class Positions(Model):
    """A layer applied to a table that no example changes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(x + self.a(torch.eye(4, dtype=x.dtype)).sum(0) * self.raw))


class WeightAsInput(Model):
    """A weight is the input of another layer's function."""

    def forward(self, x: Tensor) -> Tensor:
        both = functional.linear(self.a.weight, self.b.weight)  # [4, 3]
        return self.b(torch.tanh(x @ both @ x.new_ones(3, 4)))


class Nested(Model):
    """A transform of the model's own around a layer."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.stack([x, 2 * x], 1)  # [N, 2, 4]
        h = torch.vmap(self.a, in_dims=1, out_dims=1)(pairs)
        return self.b(torch.tanh(h).sum(1))


class Unused(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.a(x)  # its output goes nowhere
        return self.b(x)


class Detached(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) + self.b(x).detach()


class Overwritten(Model):
    """Outputs of layers, and views of them, changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[:, 0].mul_(2)
        h += x
        return self.b(h.relu_()).mul_(0.5)


class Frames(Model):
    """Axes before the last, flattened with the examples and taken apart again."""

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 4]
        h = torch.tanh(self.a(x.reshape(-1, 4)))
        return self.b(h.view(-1, 3, 4).sum(1))


class TimeFirst(Model):
    """Examples on the second axis, as many as there are steps: [T, N, D] with T = N."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.transpose(0, 1)))  # [T, N, D]
        return self.b((h * self.raw).cumsum(0)[-1])


TWISTS = [
    (Penalty, (4,)),
    (Scaled, (4,)),
    (Transposed, (4,)),
    (SharedBias, (4,)),
    (Positions, (4,)),
    (WeightAsInput, (4,)),
    (Nested, (4,)),
    (Unused, (4,)),
    (Detached, (4,)),
    (Overwritten, (4,)),
    (Frames, (3, 4)),
    (TimeFirst, (5, 4)),
]


def twisted(kind: type[Model], shape: tuple[int, ...]) -> tuple[Model, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    return kind(), x, torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    ("kind", "shape"), TWISTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_no_use_of_a_parameter_escapes(kind: type[Model], shape: tuple[int, ...]):
    model, x, y = twisted(kind, shape)
    parameters = list(model.parameters())
    expected = []
    for i in range(5):
        loss = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        found = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        expected.append(torch.cat([g.flatten() for g in found]))
    scores = torch.stack(expected)
    obj = Objective(model, "cross_entropy", (x, y))
    assert relative_error(score_matrix(obj), scores) < 1e-14
    assert relative_error(gradient_norms(obj), scores.square().sum(1)) < 1e-13
    assert relative_error(score_gram(obj), scores @ scores.T) < 1e-13


def test_axes_are_known_and_not_guessed():
    for kind, shape in ((Frames, (3, 4)), (TimeFirst, (5, 4))):
        model, x, y = twisted(kind, shape)
        assert {"a.weight", "b.weight"} <= PerExampleGradEngine(
            Objective(model, "cross_entropy", (x, y))
        ).covered_by_layer_rule


def test_parameters_that_nothing_depends_on_have_zero_scores():
    model, x, y = twisted(Unused, (4,))
    scores = score_matrix(Objective(model, "cross_entropy", (x, y)))
    assert not scores[:, :20].any() and scores[:, 20:].any()


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch):
    right = OuterProductGrad.write_columns

    def wrong(self, begin, end, out):
        right(self, begin, end, out)
        out.mul_(1.05)

    monkeypatch.setattr(OuterProductGrad, "write_columns", wrong)
    with pytest.raises(FastPathMismatchError, match=r"'0\.weight' differ by"):
        PerExampleGradEngine(by_name("dropout").objective())


def test_the_check_is_made_once_for_a_model(monkeypatch: pytest.MonkeyPatch):
    obj = by_name("dropout").objective()
    PerExampleGradEngine(obj)
    calls = []
    monkeypatch.setattr(PerExampleGradEngine, "_check", lambda self: calls.append(self))
    x, y = obj.tensors()
    PerExampleGradEngine(obj, obj.parameters_vector() + 1)
    PerExampleGradEngine(obj.with_data((x[:3], y[:3])))
    assert not calls
    PerExampleGradEngine(by_name("dropout").objective())
    assert len(calls) == 1


class Switching(Model):
    """Takes another way once the switch is on: what was known of it no longer holds."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        factor = self.a.weight.sum() if Switching.on else 1.0
        return self.b(torch.tanh(self.a(x)) * factor)


@pytest.mark.parametrize("strategy", ["memory", "disk", "recompute"])
def test_every_chunk_is_read_anew(strategy: str, monkeypatch: pytest.MonkeyPatch):
    model, x, y = twisted(Switching, (4,))
    monkeypatch.setattr(Switching, "on", False)
    obj = Objective(model, "cross_entropy", [(x[:2], y[:2]), (x[2:], y[2:])])
    engine = PerExampleGradEngine(obj)
    assert "a.weight" in engine.covered_by_layer_rule

    run = PerExampleGradEngine.run

    def run_and_switch(self: PerExampleGradEngine, batch: Batch, sink: Sink) -> Tensor:
        Switching.on = Switching.on or batch.start > 0
        return run(self, batch, sink)

    monkeypatch.setattr(PerExampleGradEngine, "run", run_and_switch)
    gram = score_gram(obj, strategy=strategy)
    assert Switching.on and "a.weight" in engine.batched
    rows = []
    for i in range(5):
        # With records the whole is done again after the switch; blocks are done once.
        Switching.on = i >= 2 or strategy != "recompute"
        loss = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        found = torch.autograd.grad(
            loss, list(model.parameters()), materialize_grads=True, allow_unused=True
        )
        rows.append(torch.cat([g.flatten() for g in found]))
    scores = torch.stack(rows)
    assert relative_error(gram, scores @ scores.T) < 1e-13


def test_a_loss_that_is_not_finite_changes_no_way():
    model, x, y = twisted(Frames, (3, 4))
    obj = Objective(model, "cross_entropy", (x, y))
    engine = PerExampleGradEngine(obj)
    bad = x.clone()
    bad[3] = float("nan")
    with pytest.raises(NonFiniteLossError, match="example 3"):
        score_matrix(obj.with_data((bad, y)))
    assert engine.traceable


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunks_of_any_size_agree(case: Case):
    obj = case.objective(7, batch_size=None)
    whole, engine = plain_scores(case), PerExampleGradEngine(obj)
    for size in (1, 3, 7):
        rows = torch.zeros_like(whole)
        for batch in obj.batches(batch_size=size):
            parts = engine.split(rows[batch.start : batch.start + len(batch.inputs)])
            engine.run(batch, lambda name, piece, parts=parts: parts[name].copy_(piece.rows()))
        assert relative_error(rows, whole) < 1e-13
