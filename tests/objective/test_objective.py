"""Objective: one flat vector in, exact means out; everything that does not fit refused."""

import copy

import pytest
import torch
from cases import CASES, Case, by_name, plain_gradient, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import entropic_fast as ef
from entropic_fast.objective import NonFiniteLossError, Objective


def classification(n: int = 9, features: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % 3


def batch_norm_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


# -- theta ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradient_are_those_of_the_module(case: Case):
    model, inputs, targets = case.build()
    obj = case.objective()
    expected = nn.functional.cross_entropy(model(inputs), targets)
    assert obj.loss() == pytest.approx(float(expected.detach()), rel=1e-12)
    assert relative_error(obj.gradient(), plain_gradient(model, inputs, targets)) < 1e-13


def test_tied_parameters_are_one_and_frozen_ones_none():
    tied, _, _ = by_name("tied weight").build()
    obj = by_name("tied weight").objective()
    assert obj.num_params == sum(p.numel() for p in tied.parameters()) == 16 + 4 + 4 + 15
    frozen = by_name("frozen weight").objective()
    assert frozen.num_params == 5 + 15 + 3
    assert "0.weight" not in frozen.parameter_names


def test_theta_is_in_the_order_of_named_parameters_and_holds_no_buffer():
    model = batch_norm_model()
    obj = Objective(model, "cross_entropy", classification())
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(obj.parameters_vector(), expected)
    parts = obj.split(expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parts[name], parameter)


def test_the_objective_and_the_model_do_not_touch_each_other():
    model = batch_norm_model().train()
    before = copy.deepcopy(model.state_dict())
    obj = Objective(model, "cross_entropy", classification())
    loss = obj.loss()
    obj.gradient()
    obj.recalibrated()
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model[1].running_mean.add_(1)
    assert obj.loss() == loss
    obj.parameters_vector().zero_()
    assert obj.loss() == loss


def test_load_into_gives_the_models_own_loss():
    obj = Objective(batch_norm_model(0), "cross_entropy", classification())
    theta = obj.parameters_vector() + 0.1
    moved = obj.recalibrated(theta)
    other = batch_norm_model(1)
    moved.load_into(other, theta)
    x, y = classification()
    loss = nn.functional.cross_entropy(other.eval()(x), y)
    assert float(loss.detach()) == pytest.approx(moved.loss(theta), rel=1e-12)


@pytest.mark.parametrize("other", [nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 3))])
def test_load_into_another_architecture_is_refused(other: nn.Module):
    obj = Objective(nn.Linear(4, 3).double(), "cross_entropy", classification())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="model: expected parameter 'weight' of shape"):
        obj.load_into(other, obj.parameters_vector())
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], r"expected a tensor of shape \[15\], got shape \[14\]"),
        (lambda t: t[None], r"expected a tensor of shape \[15\]"),
        (lambda t: t.float(), r"expected torch\.float64"),
        (lambda t: t.long(), "expected a floating-point tensor"),
        (lambda t: t * float("nan"), "expected finite values only"),
        (lambda t: t.tolist(), "expected a tensor"),
    ],
)
def test_points_that_do_not_fit_are_refused(change, message):
    obj = Objective(nn.Linear(4, 3).double(), "cross_entropy", classification())
    for function in (obj.loss, obj.gradient, obj.example_losses, obj.evaluate):
        with pytest.raises(ValueError, match="theta: " + message):
            function(change(obj.parameters_vector()))


# -- means ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 32, 33, 100])
def test_a_short_last_batch_weighs_what_it_holds(size: int):
    whole = by_name("group norm").objective(33, batch_size=33)
    obj = by_name("group norm").objective(33, batch_size=size)
    assert obj.loss() == pytest.approx(whole.loss(), rel=1e-13)
    assert torch.allclose(obj.gradient(), whole.gradient(), atol=1e-14)
    assert obj.evaluate() == pytest.approx(whole.evaluate(), rel=1e-13)


def test_evaluate_counts_right_answers():
    x = torch.eye(3).repeat(2, 1)
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    y = torch.tensor([0, 1, 2, 0, 1, 0])
    loss, accuracy = Objective(model, "cross_entropy", (x, y), batch_size=4).evaluate()
    assert accuracy == 5 / 6
    assert loss == pytest.approx(float(nn.functional.cross_entropy(x, y)))
    regression = Objective(model, "mse", (x, x))
    with pytest.raises(ValueError, match="a classifier"):
        regression.evaluate()


def test_mse_is_a_mean_over_the_outputs_of_an_example():
    x = torch.tensor([[1.0, 2.0]])
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    assert Objective(model, "mse", (x, torch.tensor([[0.0, 4.0]]))).loss() == 2.5


def test_cross_entropy_takes_probabilities_and_dense_labels():
    x, y = classification()
    model = nn.Linear(4, 3).double()
    hard = Objective(model, "cross_entropy", (x, y))
    soft = Objective(model, "cross_entropy", (x, nn.functional.one_hot(y, 3).double()))
    assert soft.loss() == pytest.approx(hard.loss(), rel=1e-13)
    dense = Objective(
        nn.Conv1d(4, 3, 1).double(),
        "cross_entropy",
        (x[:, :, None].repeat(1, 1, 2), y[:, None].repeat(1, 2)),
    )
    assert dense.example_losses().shape == (9,)


def test_float32_and_float64_agree():
    obj = by_name("attention").objective(dtype=torch.float32)
    double = obj.double()
    assert double.dtype == torch.float64 and obj.dtype == torch.float32
    assert double.loss() == pytest.approx(obj.loss(), rel=1e-6)
    assert relative_error(obj.gradient(), double.gradient()) < 1e-5
    soft = Objective(
        nn.Linear(4, 3), "cross_entropy", (torch.randn(5, 4), torch.rand(5, 3).softmax(1))
    )
    assert soft.double().loss() == pytest.approx(soft.loss(), rel=1e-6)


def test_with_data_keeps_the_model_and_forgets_the_data():
    obj = by_name("tied weight").objective()
    x, y = classification(5, seed=2)
    other = obj.with_data((x, y), batch_size=2)
    fresh = Objective(by_name("tied weight").build()[0], "cross_entropy", (x, y))
    assert other.num_examples == 5
    assert other.loss() == pytest.approx(fresh.loss(), rel=1e-13)


# -- normalization -------------------------------------------------------------------------


def test_recalibrated_statistics_are_weighted_means_over_the_batches():
    x, y = classification(10)
    model = batch_norm_model()
    obj = Objective(model, "cross_entropy", (x, y), batch_size=4)
    theta = obj.parameters_vector() * 0.7
    features = nn.functional.linear(x, obj.split(theta)["0.weight"], obj.split(theta)["0.bias"])
    parts = features.split(4)
    mean = sum(len(p) * p.mean(0) for p in parts) / 10
    var = sum(len(p) * p.var(0) for p in parts) / 10
    new = obj.recalibrated(theta)
    assert torch.allclose(new.buffers["1.running_mean"], mean, atol=1e-14)
    assert torch.allclose(new.buffers["1.running_var"], var, atol=1e-14)
    assert torch.equal(obj.buffers["1.running_mean"], model[1].running_mean)
    four = obj.recalibrated(theta, max_examples=4)
    assert torch.allclose(four.buffers["1.running_mean"], parts[0].mean(0), atol=1e-14)


def test_recalibration_does_not_depend_on_what_was_there():
    obj = Objective(batch_norm_model(), "cross_entropy", classification())
    once = obj.recalibrated(obj.parameters_vector() + 1)
    twice = once.recalibrated()
    fresh = obj.recalibrated()
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(twice.buffers[name], fresh.buffers[name])


def test_a_model_without_statistics_is_recalibrated_already():
    obj = by_name("group norm").objective()
    assert not obj.has_running_statistics and obj.recalibrated() is obj


def test_batch_statistics_are_those_of_training():
    x, y = classification(9)
    model = batch_norm_model()
    obj = Objective(model, "cross_entropy", (x, y), norm="batch", batch_size=5)
    model.train()
    losses = [
        nn.functional.cross_entropy(model(a), b, reduction="sum")
        for a, b in zip(x.split(5), y.split(5), strict=True)
    ]
    assert obj.loss() == pytest.approx(float(sum(losses).detach()) / 9, rel=1e-12)
    twin = Objective(batch_norm_model(), "cross_entropy", (x, y), batch_size=5).with_norm("batch")
    assert twin.loss() == obj.loss()
    with pytest.raises(ValueError, match="depend on that example alone"):
        twin.require_single_examples()


def test_a_single_example_has_no_batch_statistics():
    x, y = classification(9)
    with pytest.raises(ValueError, match="batch_size: expected at least 2 examples"):
        Objective(batch_norm_model(), "cross_entropy", (x, y), norm="batch", batch_size=4).loss()
    running = Objective(batch_norm_model(), "cross_entropy", (x, y), batch_size=4)
    with pytest.raises(ValueError, match="batch_size: expected at least 2 examples"):
        running.recalibrated()


def test_norm_layers_without_statistics_are_refused_in_running_mode():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="norm: expected running statistics in every BatchNorm"):
        Objective(model.double(), "cross_entropy", classification())
    Objective(model.double(), "cross_entropy", classification(), norm="batch").loss()


def test_instance_norm_never_mixes_examples():
    for norm in ("running", "batch"):
        model = by_name("instance norm").build()[0]
        _, x, y = by_name("instance norm").build()
        assert Objective(model, "cross_entropy", (x, y), norm=norm).separable


class Centered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0))


def test_models_that_mix_examples_are_rejected_with_the_example():
    with pytest.raises(ValueError, match=r"for example 0 in a batch of 9 but .* for it alone"):
        Objective(Centered(), "cross_entropy", classification(9))
    alone = Objective(Centered(), "cross_entropy", classification(1))
    alone.require_single_examples()  # one example has no other to depend on
    with pytest.raises(ValueError, match="for it alone"):
        alone.with_data(classification())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6])
def test_examples_that_interact_are_found_whatever_the_size_of_the_loss(
    scale: float, dtype: torch.dtype
):
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * (outputs - targets).square().mean(1)

    x, y = torch.randn(9, 4, dtype=dtype), torch.randn(9, 3, dtype=dtype)
    with pytest.raises(ValueError, match="for it alone"):
        Objective(Centered().to(dtype), loss, (x, y)).require_single_examples()
    Objective(nn.Linear(4, 3).to(dtype), loss, (x, y)).require_single_examples()


def test_losses_that_are_all_rounding_are_no_interaction():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 30))
    x = torch.randn(300, 40)
    for batch in (1, 7, 300):  # targets made in batches of another size
        y = torch.cat([model(part).detach() for part in x.split(batch)])
        assert Objective(model, "mse", (x, y)).separable
        labels = y.argmax(1)
        sure = nn.Sequential(model, Scaled(20.0))
        assert Objective(sure, "cross_entropy", (x, labels)).separable


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("alike", [3, 8])
def test_first_examples_that_are_alike_hide_no_interaction(alike: int):
    x, y = classification()
    x[:alike] = x[0]
    with pytest.raises(ValueError, match="for it alone"):
        Objective(AboutTheMean(), "cross_entropy", (x, y)).require_single_examples()


class AboutTheMean(Centered):
    """The output of an example among its likes is that of the example alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + x.mean(0))


# -- refusals ------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), 0.5)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).detach()


class Checkpointed(nn.Module):
    """Computed again in the backward pass; nothing but the numbers tells with which bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def shifted(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.linear.weight.T.detach() + self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.shifted, x, use_reentrant=False)


class Offloaded(nn.Module):
    """Other hooks on saved tensors, which compute nothing again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return torch.tanh(self.linear(x))


def test_activations_kept_elsewhere_are_no_obstacle():
    model, (x, y) = Offloaded(), classification()
    gradient = Objective(model, "cross_entropy", (x, y)).gradient()
    assert relative_error(gradient, plain_gradient(model, x, y)) < 1e-13


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), x


def _mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(4, 3).double().requires_grad_(False), "at least one parameter"),
        (lambda: nn.Linear(4, 0).double(), "at least one parameter"),
        (_mixed, "parameters of one dtype"),
        (lambda: nn.Linear(4, 3, device="meta"), "values, got 'weight' on the meta device"),
        (Noisy, "the same outputs for the same inputs"),
        (Detached, "a loss that depends on the trainable parameters"),
        (Checkpointed, "activations kept for the backward pass, got torch.utils.checkpoint"),
        (Pair, "output: expected the name or index of the part .* with the parts 0, 1"),
        (lambda: nn.Linear(5, 3).double(), "data: expected inputs that the model takes"),
        (lambda: nn.LazyLinear(3), "initialized parameters, got a lazy one, 'weight'"),
        (lambda: torch.relu, "an nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Initializing zero-element")
def test_models_that_do_not_fit_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        Objective(model(), "cross_entropy", classification())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("hinge", "loss: expected one of 'cross_entropy', 'mse', 'bce', .*got 'hinge'"),
        ("mse", r"targets: expected the outputs' shape \[8, 3\], got \[8\]"),
        (lambda out, y: out.sum(), r"loss: expected one loss an example, shape \[8\]"),
        (lambda out, y: out, "loss: expected one loss an example"),
    ],
)
def test_losses_that_do_not_fit_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        Objective(nn.Linear(4, 3).double(), loss, classification())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 3]), r"labels in 0 .. 2 .*, got 3 for example 2"),
        (torch.tensor([0, -1, 2]), "got -1 for example 1"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), "class numbers of dtype int64"),
        (torch.tensor([0.0, 1.0, 2.0]), "whole class numbers"),
        (torch.zeros(3, 1, dtype=torch.int64), "one class number for each output"),
        (torch.zeros(2, dtype=torch.int64), "of one length"),
    ],
)
def test_labels_that_do_not_fit_are_refused(targets: Tensor, message: str):
    x, _ = classification(3)
    with pytest.raises(ValueError, match=message):
        Objective(nn.Linear(4, 3).double(), "cross_entropy", (x, targets))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_example_and_the_point(value: float):
    x, y = classification(9)
    x[7, 1] = value
    obj = Objective(nn.Linear(4, 3).double(), "cross_entropy", (x, y), batch_size=4)
    for function in (obj.loss, obj.gradient, obj.example_losses, obj.evaluate):
        with pytest.raises(
            NonFiniteLossError, match=r"example 7 at a point of norm \d.*its inputs are not finite"
        ):
            function()


def test_unknown_norm_mode_is_refused():
    with pytest.raises(ValueError, match="norm: expected one of 'running', 'batch'"):
        Objective(nn.Linear(4, 3).double(), "cross_entropy", classification(), norm="eval")


def test_rare_noise_is_refused_by_the_generator_it_draws_from():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return nn.functional.dropout(self.linear(x), 1e-6, training=True)

    with pytest.raises(ValueError, match="noise in evaluation mode from dropout"):
        Objective(Rare(), "cross_entropy", (torch.randn(4, 3), torch.tensor([0, 1, 1, 0])))


def test_inference_mode_is_refused_by_name_and_no_grad_does_not_matter():
    model, data = nn.Linear(4, 3).double(), classification(5)
    with torch.no_grad():
        obj = Objective(model, "cross_entropy", data)
    assert obj.gradient().norm() > 0
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got torch\.inference_mode"):
        Objective(model, "cross_entropy", data)


class Positions(torch.nn.Module):
    """Instance normalization whose gradient arrives with its channels last."""

    def __init__(self, dims):
        super().__init__()
        convolution = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
        norm = (torch.nn.InstanceNorm1d, torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d)[dims - 1]
        self.first, self.norm = convolution(2, 4, 3, padding=1), norm(4, affine=True)
        self.middle, self.last = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)

    def forward(self, x):
        positions = self.norm(self.first(x)).flatten(2).transpose(1, 2)  # [N, T, C]
        mixed = self.middle(positions.transpose(0, 1).reshape(-1, 4)).view(-1, len(x), 5)
        return self.last(torch.tanh(mixed.transpose(0, 1)).mean(1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradients_through_instance_normalization_are_right_in_any_layout(dims, n):
    torch.manual_seed(dims)
    net = Positions(dims).double()
    x = torch.randn(n, 2, *(6, 3, 4)[:dims], dtype=torch.float64)
    obj = ef.Objective(net, "cross_entropy", (x, torch.arange(n) % 3))
    theta, step = obj.parameters_vector(), 1e-6
    steps = step * torch.eye(len(theta), dtype=torch.float64)
    differences = [(obj.loss(theta + e) - obj.loss(theta - e)) / (2 * step) for e in steps]
    expected = torch.tensor(differences, dtype=torch.float64)
    torch.testing.assert_close(obj.gradient(theta), expected, rtol=0, atol=1e-7)
    scores = ef.score_matrix(obj, theta)
    torch.testing.assert_close(scores.mean(0), obj.gradient(theta), rtol=0, atol=1e-12)
    v = torch.randn(len(theta), dtype=torch.float64)
    along = (obj.gradient(theta + 1e-5 * v) - obj.gradient(theta - 1e-5 * v)) / 2e-5
    operator = ef.HessianOperator(obj, theta)
    torch.testing.assert_close(operator @ v, along, rtol=1e-6, atol=1e-6)
    assert operator.method == "graph"


def test_one_property_decides_where_accuracy_is_a_column():
    x, y = classification()
    linear = nn.Linear(4, 3).double()
    tokens = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double()
    cases = [
        (Objective(linear, "cross_entropy", (x, y)), True),
        (Objective(linear, nn.CrossEntropyLoss(), (x, y)), True),
        (Objective(linear, nn.CrossEntropyLoss(), (x, nn.functional.one_hot(y).double())), False),
        (Objective(linear, lambda a, b: nn.functional.cross_entropy(a, b, reduction="none"),
                   (x, y)), False),
        (Objective(tokens, "next_token", (y.view(3, 3), y.view(3, 3))), False),
        (Objective(linear, "mse", (x, x[:, :3])), False),
    ]  # fmt: skip
    for obj, expected in cases:
        assert obj.is_classifier is expected
        theta = obj.parameters_vector()
        table = ef.path_losses(obj, ef.linear_path(theta, theta + 1), points=0)
        point = ef.curvature_profile(
            obj, ef.linear_path(theta, theta + 1), points=[0.0], quantities=("loss",)
        )
        assert ("accuracy" in table) is ("accuracy" in point) is expected
