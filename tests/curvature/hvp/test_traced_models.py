"""Models that do something besides their layers as they run: tables, caches, masks.

Each is compared with two backward passes by torch's autograd, and its scores with one backward
pass an example.
"""

import pytest
import torch
from torch import Tensor, nn

from entropic_fast.curvature import GGNOperator, HessianOperator, score_matrix
from entropic_fast.curvature._crosscheck import coarsest_dtype
from entropic_fast.curvature.per_example._engine import PerExampleGradEngine
from entropic_fast.objective import Objective


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x)), x))

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h


class EmptyCache(Net):
    """Joins what there is to caches that hold nothing yet, as tensors of any rank can be."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        keys = torch.cat([torch.tensor([], dtype=h.dtype), h[:, None, :2]], dim=-2)
        values = torch.cat([h[:, None, 2:], torch.empty(0), h[:, None, :2]], dim=2)
        counts = torch.cat([torch.empty(0, dtype=torch.int64), (h > 0).sum(1, keepdim=True)], 1)
        return values[:, 0] * (1 + keys.sum((1, 2))[:, None]) + counts


class EmptyRank1(Net):
    """Empty tensors that are joined to others of their rank."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        scale = torch.cat([h.new_zeros(0), self.first.bias, torch.empty(0)])
        return torch.cat([h[:, :0], h * scale, h[:, 6:]], 1)


class Angles(Net):
    """A table that no parameter is part of, computed without gradient, and one detached."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            angles = torch.outer(x[:, 0], torch.arange(6, dtype=x.dtype)).to(h.device)
            table = torch.zeros_like(angles)
            table[:, 1:] = angles.cos()[:, 1:]
        return h * table + x.detach().sum(1, keepdim=True).data


class SignsWithoutGradient(Net):
    """Comparisons have no derivative, with gradients or without."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            positive = h > 0.1
        return torch.where(positive, h, 0.3 * h * h)


class SetWithoutGradient(Net):
    """A table that holds features, written without gradient."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            table = torch.ones(x.shape[0], 6, dtype=x.dtype)
            table[:, 2] = h[:, 1]
        return h * table


class Pooled(Net):
    """Means over one axis that lies next to the examples, as from a sequence of positions."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool1d(h.view(-1, 2, 3).transpose(1, 2), 1)
        images = h.view(-1, 1, 2, 3).permute(0, 3, 1, 2)
        return h * (pooled + nn.functional.adaptive_avg_pool2d(images, 1)[..., 0]).mean(1)


class Means(nn.Module):
    """The mean over positions that a mask leaves, cheaper where it leaves all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:  # [n, positions, 3 and the mask]
        h, mask = torch.tanh(self.first(x[..., :3])), x[..., 3] > 0.5
        if not torch.compiler.is_compiling() and mask.all():
            return self.last(h.mean(1))
        h = h.masked_fill(~mask[..., None], 0).sum(1)
        return self.last(h / mask.sum(1, keepdim=True))


class OtherMeans(Means):
    """Computes something else where it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x[..., :3]))
        if torch.compiler.is_compiling():
            return self.last(1.1 * h.sum(1))
        return self.last(h.sum(1) * (1.0 if x.isfinite().all() else 0.5))


def flat() -> Tensor:
    return torch.randn(7, 4, dtype=torch.float64)


def masked(left_out: int) -> Tensor:
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    x[..., 3] = 1
    x[: (1 if left_out else 0), 1 : 1 + left_out, 3] = 0
    return x


CASES = {
    "empty cache": (EmptyCache, flat, True),
    "empty tensors of rank 1": (EmptyRank1, flat, True),
    "table without gradient": (Angles, flat, True),
    "comparison without gradient": (SignsWithoutGradient, flat, True),
    "features without gradient": (SetWithoutGradient, flat, False),
    "means with channels last": (Pooled, flat, True),
    "mask that leaves all": (Means, lambda: masked(0), True),
    "mask that leaves some": (Means, lambda: masked(2), True),
    "other where traced": (OtherMeans, lambda: masked(2), False),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[Objective, bool]:
    make, data, by_graph = CASES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, x = make().double(), data()
    return Objective(model, "cross_entropy", (x, torch.arange(len(x)) % 3)), by_graph


def test_products_are_those_of_two_backward_passes(case):
    obj, by_graph = case
    for theta in (obj.parameters_vector(), 1.5 * obj.parameters_vector()):
        leaf = theta.clone().requires_grad_()
        ((_, inputs, targets),) = obj.batches()
        loss = obj.losses(leaf, inputs, targets).mean()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        v = torch.linspace(-1, 1, len(leaf), dtype=torch.float64)
        (expected,) = torch.autograd.grad(gradient, leaf, v)
        operator = HessianOperator(obj, theta)
        assert (operator.method == "graph") == by_graph, operator.method
        assert (GGNOperator(obj, theta).method == "graph") == by_graph
        torch.testing.assert_close(operator @ v, expected, rtol=1e-10, atol=1e-14)


def test_scores_are_those_of_a_backward_pass_an_example(case):
    obj, _ = case
    inputs, targets = obj.tensors()
    leaf = obj.parameters_vector().requires_grad_()
    losses = obj.losses(leaf, inputs, targets)
    expected = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(score_matrix(obj), torch.stack(expected), rtol=1e-10, atol=1e-14)


def test_scores_of_means_with_channels_last_go_by_layer_rules():
    obj = Objective(Pooled().double(), "cross_entropy", (flat(), torch.arange(7) % 3))
    assert PerExampleGradEngine(obj).covered_by_layer_rule == set(obj.parameter_names)


@pytest.mark.parametrize("left_out", [0, 2])
def test_scores_of_a_model_that_looks_at_its_mask_go_by_layer_rules(left_out: int):
    x = masked(left_out)
    obj = Objective(Means().double(), "cross_entropy", (x, torch.arange(5) % 3))
    assert PerExampleGradEngine(obj).covered_by_layer_rule == set(obj.parameter_names)
    assert not torch.compiler.is_compiling()


class Computes(Net):
    """In a dtype of its own between the layers."""

    def __init__(self, between) -> None:
        super().__init__()
        self._between = between

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return self._between(h, x).to(x.dtype)


def in_half(h: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return nn.functional.linear(h, torch.eye(6))


@pytest.mark.parametrize(
    ("between", "dtype"),
    [
        (lambda h, x: h, torch.float64),
        (lambda h, x: h.float().square().mean(1, keepdim=True).rsqrt() * h, torch.float32),
        (lambda h, x: h * x.float().sum(1, keepdim=True).cos(), torch.float64),
        (in_half, torch.bfloat16),
    ],
)
def test_rounding_is_that_of_the_dtype_in_which_the_model_computes(between, dtype):
    """Two ways to a derivative of a float64 model may differ by float32's, as in Llama."""
    model = Computes(between).double()
    x = flat()
    if between is in_half:
        model, x = model.float(), x.float()
    obj = Objective(model, "cross_entropy", (x, torch.arange(7) % 3))
    assert coarsest_dtype(obj, obj.point(None), obj.tensors()[0]) == dtype
    assert HessianOperator(obj).method == "graph"
    score_matrix(obj)
