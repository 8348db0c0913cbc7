"""torch's own losses: value, gradient and curvature are those of torch's mean over all data."""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entropic_fast.curvature import (
    GGNOperator,
    HessianOperator,
    autograd_only,
    curvature_at,
    fisher_trace,
    ggn_trace,
    score_matrix,
    with_sampled_labels,
)
from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path, path_losses

N, C = 7, 3
Loss = Callable[[Tensor, Tensor], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network(last: nn.Module | None = None, outputs: int = C) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)]
        return nn.Sequential(*layers, *([last] if last else [])).double()


def hessian(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian by double backward.  # [P], [P, P]"""
    parameters = list(model.parameters())

    def flat(gradients: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([g.reshape(-1) for g in gradients])

    gradient = flat(torch.autograd.grad(loss(), parameters, create_graph=True))
    rows = [
        flat(torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True))
        for g in gradient
    ]
    return gradient.detach(), torch.stack(rows)


WEIGHT = torch.tensor([1.0, 5.0, 0.3], dtype=torch.float64)
CLASSES = torch.tensor([0, 2, -100, 1, 1, -100, 2])
BINARY = (randn(N, C, seed=2) > 0).double()
PROBABILITIES = randn(N, C, seed=3).softmax(1)
POSITIVE = torch.rand(N, C, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
LOG_SOFTMAX, SIGMOID = nn.LogSoftmax(1), nn.Sigmoid()

CASES: dict[str, tuple[nn.Module, Tensor, nn.Module | None]] = {
    "weights and ignored": (nn.CrossEntropyLoss(weight=WEIGHT), CLASSES, None),
    "ignored": (nn.CrossEntropyLoss(), CLASSES, None),
    "another ignored": (nn.CrossEntropyLoss(ignore_index=1), CLASSES.clamp(min=0), None),
    "smoothing": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), CLASSES, None),
    "soft targets": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), PROBABILITIES, None),
    "cross-entropy sum": (nn.CrossEntropyLoss(WEIGHT, reduction="sum"), CLASSES, None),
    "nll": (nn.NLLLoss(WEIGHT), CLASSES, LOG_SOFTMAX),
    "nll sum": (nn.NLLLoss(WEIGHT, reduction="sum"), CLASSES, LOG_SOFTMAX),
    "bce": (nn.BCEWithLogitsLoss(), BINARY, None),
    "bce of integers": (nn.BCEWithLogitsLoss(), BINARY.long(), None),
    "bce of soft labels": (nn.BCEWithLogitsLoss(WEIGHT, pos_weight=1 + WEIGHT), POSITIVE, None),
    "bce sum": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT, reduction="sum"), BINARY, None),
    "bce of probabilities": (nn.BCELoss(WEIGHT), BINARY, SIGMOID),
    "mse": (nn.MSELoss(), randn(N, C, seed=5), None),
    "mse sum": (nn.MSELoss(reduction="sum"), randn(N, C, seed=5), None),
    "l1": (nn.L1Loss(), randn(N, C, seed=5), None),
    "smooth l1": (nn.SmoothL1Loss(beta=0.5), 3 * randn(N, C, seed=5), None),
    "huber": (nn.HuberLoss(delta=0.7), 3 * randn(N, C, seed=5), None),
    "poisson": (nn.PoissonNLLLoss(full=True), 4 * POSITIVE, None),
    "poisson of rates": (nn.PoissonNLLLoss(log_input=False), 4 * POSITIVE, nn.Softplus()),
    "kl": (nn.KLDivLoss(), PROBABILITIES, LOG_SOFTMAX),
    "kl batchmean": (nn.KLDivLoss(reduction="batchmean"), PROBABILITIES, LOG_SOFTMAX),
    "kl of logarithms": (
        nn.KLDivLoss(reduction="batchmean", log_target=True),
        PROBABILITIES.log(),
        LOG_SOFTMAX,
    ),
    "soft margin": (nn.SoftMarginLoss(), 2 * BINARY - 1, None),
    "multi-label soft margin": (nn.MultiLabelSoftMarginLoss(WEIGHT), BINARY, None),
    "hinge embedding": (nn.HingeEmbeddingLoss(), 2 * BINARY - 1, None),
    "multi-margin": (nn.MultiMarginLoss(), CLASSES.clamp(min=0), None),
    "multi-margin squared": (
        nn.MultiMarginLoss(p=2, margin=0.7, weight=WEIGHT),
        CLASSES.clamp(min=0),
        None,
    ),
    "multi-label margin": (
        nn.MultiLabelMarginLoss(),
        torch.tensor([[0, -1, 1], [1, 2, -1], [0, 1, 2], [2, -1, 0], [-1, 1, 0], [0, 2, -1]] * 2)[
            :N
        ],
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_hessian_are_those_of_torch_over_all_data(name: str):
    loss, targets, last = CASES[name]
    model, x = network(last), randn(N, 4)
    obj = Objective(model, loss, (x, targets), batch_size=3)
    floating = targets.to(torch.float64) if "bce" in name else targets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nn.KLDivLoss about its mean
        expected = float(loss(model(x), floating))
        gradient = torch.autograd.grad(loss(model(x), floating), list(model.parameters()))
        gradient = torch.cat([g.reshape(-1) for g in gradient])
        once = isinstance(loss, nn.MultiMarginLoss | nn.MultiLabelMarginLoss)
        matrix = None if once else hessian(model, lambda: loss(model(x), floating))[1]
    assert obj.loss() == pytest.approx(expected, rel=1e-13)
    torch.testing.assert_close(obj.gradient(), gradient, rtol=1e-11, atol=1e-13)
    eye = torch.eye(obj.num_params, dtype=torch.float64)
    operator = HessianOperator(obj)
    product = operator @ eye
    assert operator.method == "graph"
    if matrix is None:
        matrix = differences(obj, eye)
    torch.testing.assert_close(product, matrix, rtol=1e-9, atol=1e-9 if once else 1e-12)
    with autograd_only():
        torch.testing.assert_close(HessianOperator(obj) @ eye, product, rtol=1e-9, atol=1e-12)
    scores = score_matrix(obj)
    torch.testing.assert_close(scores.mean(0), obj.gradient(), rtol=1e-9, atol=1e-12)
    gauss_newton = GGNOperator(obj) @ eye
    trace = ggn_trace(obj).value
    assert trace == pytest.approx(float(gauss_newton.trace()), rel=1e-9, abs=1e-13)
    torch.testing.assert_close(HessianOperator(obj).quadratic_forms(eye), product.diagonal())


def differences(obj: Objective, eye: Tensor) -> Tensor:
    theta, step = obj.parameters_vector(), 1e-6
    columns = [(obj.gradient(theta + step * e) - obj.gradient(theta - step * e)) for e in eye]
    return torch.stack(columns, 1) / (2 * step)


def test_batches_of_other_lengths_count_their_positions():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(tokens))).transpose(1, 2)

    model = Model().double()
    generator = torch.Generator().manual_seed(0)
    data = []
    for n, length in ((3, 6), (2, 4), (1, 1)):
        labels = torch.randint(5, (n, length), generator=generator)
        labels[torch.rand(n, length, generator=generator) < 0.4] = -100
        data.append((torch.randint(9, (n, length), generator=generator), labels))
    flat = [(model(x).transpose(1, 2).flatten(0, 1), y.flatten()) for x, y in data]
    outputs, labels = (torch.cat(parts) for parts in zip(*flat, strict=True))
    for loss in (nn.CrossEntropyLoss(torch.rand(5)), nn.CrossEntropyLoss(label_smoothing=0.1)):
        expected = F.cross_entropy(
            outputs,
            labels,
            None if loss.weight is None else loss.weight.double(),
            label_smoothing=loss.label_smoothing,
        )
        assert Objective(model, loss, data).loss() == pytest.approx(expected.item(), rel=1e-13)
    numbers = [(x, randn(len(x), 5, x.shape[1])) for x, _ in data]
    together = torch.cat([(model(x) - y).flatten() for x, y in numbers])
    obj = Objective(model, nn.MSELoss(), numbers)
    assert obj.loss() == pytest.approx(together.square().mean().item(), rel=1e-13)


def test_other_data_have_constants_of_their_own():
    x, model = randn(N, 4), network()
    loss = nn.CrossEntropyLoss(WEIGHT)
    obj = Objective(model, loss, (x, CLASSES))
    other = obj.with_data((x[:2], CLASSES[:2]))
    assert other.loss() == pytest.approx(loss(model(x[:2]), CLASSES[:2]).item(), rel=1e-13)
    assert obj.loss() == pytest.approx(loss(model(x), CLASSES).item(), rel=1e-13)
    # A sample keeps the losses of its examples.
    kept = obj.sampled(x[:2], CLASSES[:2]).example_losses()
    assert torch.equal(kept, obj.example_losses()[:2])


def test_data_in_which_nothing_counts_are_refused():
    ignored = torch.full((N,), -100)
    with pytest.raises(ValueError, match="targets: expected at least one target that counts"):
        Objective(network(), nn.CrossEntropyLoss(), (randn(N, 4), ignored))


@pytest.mark.parametrize(
    ("function", "loss", "targets"),
    [
        (F.cross_entropy, nn.CrossEntropyLoss(), CLASSES),
        (partial(F.cross_entropy, weight=WEIGHT), nn.CrossEntropyLoss(WEIGHT), CLASSES),
        (F.mse_loss, nn.MSELoss(), randn(N, C)),
        (partial(F.huber_loss, delta=0.3), nn.HuberLoss(delta=0.3), randn(N, C)),
        (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss(), BINARY),
    ],
)
def test_functions_of_torch_are_their_modules(function: Loss, loss: nn.Module, targets: Tensor):
    data = randn(N, 4), targets
    assert Objective(network(), function, data).loss() == Objective(network(), loss, data).loss()


def test_a_gaussian_takes_a_known_or_a_predicted_variance():
    loss = nn.GaussianNLLLoss(full=True)
    mean, target = randn(N, C), randn(N, C, seed=1)
    from entropic_fast.objective.losses._elementwise import GaussianNLL

    for variance in (POSITIVE + 0.1, POSITIVE[:, :1], POSITIVE[:, 0], 1e-9 * POSITIVE):
        expected = loss(mean, target, variance)
        ours = GaussianNLL(loss)
        assert ours((mean, variance), target).mean() == pytest.approx(expected.item(), rel=1e-13)
        assert ours(mean, (target, variance)).mean() == pytest.approx(expected.item(), rel=1e-13)
    assert GaussianNLL(loss)((mean, -POSITIVE), target).isnan().all()


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "message"),
    [
        (nn.MSELoss(), 1, randn(N), r"the outputs' shape \[7, 1\], got \[7\].*unsqueeze\(1\)"),
        (nn.HuberLoss(), 1, randn(N), r"use targets.unsqueeze\(1\)"),
        (nn.PoissonNLLLoss(reduction="none"), 1, POSITIVE[:, 0], r"use targets.unsqueeze\(1\)"),
        ("mse", 1, randn(N), r"use targets.unsqueeze\(1\)"),
        ("bce", 1, BINARY[:, 0], r"use targets.unsqueeze\(1\)"),
        ("bce", C, CLASSES.clamp(min=0), "one-hot targets, or nn.CrossEntropyLoss"),
        ("bce", C, BINARY - 2 * BINARY.roll(1, 0), "in 0 .. 1, got -. for example .; for labels"),
        (nn.BCEWithLogitsLoss(torch.rand(N, 1)), C, BINARY, "belongs to the examples"),
        (nn.CrossEntropyLoss(torch.rand(4)), C, CLASSES, r"a weight per class, \[3\], got \[4\]"),
        (
            "cross_entropy",
            C,
            CLASSES,
            r"pass nn.CrossEntropyLoss\(\) as the loss: its ignore_index",
        ),
        ("cross_entropy", 1, CLASSES.clamp(0, 1), 'for a single logit use the loss "bce"'),
        ("cross_entropy", C, CLASSES.clamp(min=0)[:, None], r"use targets.squeeze\(1\)"),
        (nn.NLLLoss(), C, PROBABILITIES, r"whole class numbers \[N\], got shape"),
        (lambda out, y: F.mse_loss(out, y), C, randn(N, C), "or pass torch's own loss"),
        (nn.CTCLoss(), C, CLASSES, "that CTCLoss takes, got"),
        (partial(F.mse_loss, window=2), C, randn(N, C), r"partial with \['window'\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    loss: str | Loss, outputs: int, targets: Tensor, message: str
):
    with pytest.raises(ValueError, match=message):
        Objective(network(outputs=outputs), loss, (randn(N, 4), targets))


def test_classes_in_the_last_axis_are_refused_with_both_ways_out():
    class Model(nn.Linear):
        pass

    x, labels = randn(N, 5, 4), torch.arange(N * 5).view(N, 5) % C
    for loss in ("cross_entropy", nn.CrossEntropyLoss()):
        with pytest.raises(ValueError, match=r'transpose\(1, 2\), .*"next_token"'):
            Objective(Model(4, C).double(), loss, (x, labels))


def test_a_reduction_that_is_not_of_single_terms_is_refused():
    class Contrastive(nn.MSELoss):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            terms = (outputs - targets.mean(0)).square().sum(1)
            return terms if self.reduction == "none" else terms.mean().sqrt()

    class Weighted(nn.CrossEntropyLoss):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().forward(outputs, targets) * 2

    with pytest.raises(ValueError, match="whose 'mean' is that of one term per output"):
        Objective(network(), Contrastive(), (randn(N, 4), randn(N, C)))
    with pytest.raises(ValueError, match='a subclass of it with reduction="none"'):
        Objective(network(), Weighted(), (randn(N, 4), CLASSES))


def test_a_subclass_that_keeps_the_computation_is_its_kind():
    class Named(nn.CrossEntropyLoss):
        pass

    data = randn(N, 4), CLASSES
    expected = Objective(network(), nn.CrossEntropyLoss(WEIGHT), data).loss()
    assert Objective(network(), Named(WEIGHT), data).loss() == expected


def test_fisher_matrix_of_multiple_labels_by_expectation():
    """Over the 2^C label vectors of an example, weighted by their probabilities."""
    model, x = network(), randn(N, 4)
    obj = Objective(model, "bce", (x, BINARY))
    p = model(x).detach().sigmoid()
    expected = torch.zeros(obj.num_params, obj.num_params, dtype=torch.float64)
    for code in range(2**C):
        labels = torch.tensor([(code >> c) & 1 for c in range(C)]).double().expand(N, C)
        likely = torch.where(labels == 1, p, 1 - p).prod(1)
        scores = score_matrix(obj.with_data((x, labels)))
        expected += torch.einsum("n,np,nq->pq", likely, scores, scores) / N
    gauss_newton = GGNOperator(obj) @ torch.eye(obj.num_params, dtype=torch.float64)
    torch.testing.assert_close(expected, gauss_newton / C, rtol=1e-9, atol=1e-13)
    assert fisher_trace(obj).value > 0


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens).cumsum(1)))


def language_data(padded: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = LanguageModel().double()
        tokens = torch.randint(6, (4, 5))
    labels = tokens.clone()
    if padded:
        labels[1, 2:], labels[2, :3], labels[3] = -100, -100, -100
    return model, tokens, labels


@pytest.mark.parametrize("padded", [False, True])
def test_next_token_is_the_mean_over_tokens_that_count(padded: bool):
    model, tokens, labels = language_data(padded)

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    obj = Objective(model, "next_token", (tokens, labels), batch_size=3)
    gradient, matrix = hessian(model, loss)
    assert obj.loss() == pytest.approx(loss().item(), rel=1e-13)
    torch.testing.assert_close(obj.gradient(), gradient, rtol=1e-11, atol=1e-14)
    eye, operator = torch.eye(obj.num_params, dtype=torch.float64), HessianOperator(obj)
    torch.testing.assert_close(operator @ eye, matrix, rtol=1e-10, atol=1e-13)
    assert operator.method == "graph"
    with autograd_only():
        torch.testing.assert_close(HessianOperator(obj) @ eye, matrix, rtol=1e-10, atol=1e-13)
        gauss_newton = GGNOperator(obj) @ eye
    torch.testing.assert_close(GGNOperator(obj) @ eye, gauss_newton, rtol=1e-10, atol=1e-13)
    trace = ggn_trace(obj).value
    assert trace == pytest.approx(float(gauss_newton.trace()), rel=1e-10)
    torch.testing.assert_close(score_matrix(obj).mean(0), gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda t: t[:, :1], "at least one target that counts"),
        (lambda t: t[:, 1:], r"tokens \[N, T\], T at least 2, for outputs \[N, T, V\]"),
        (lambda t: t + 6, "labels in 0 .. 5"),
        (lambda t: t.double(), "token numbers"),
        (lambda t: t[:, 0], "token numbers"),
    ],
)
def test_labels_that_are_not_the_tokens_are_refused(labels: Callable[[Tensor], Tensor], message):
    model, tokens, _ = language_data()
    with pytest.raises(ValueError, match=message):
        Objective(model, "next_token", (tokens, labels(tokens)))


def test_accuracy_is_over_the_labels_that_count():
    x, model = randn(N, 4), network()
    obj = Objective(model, nn.CrossEntropyLoss(WEIGHT), (x, CLASSES), batch_size=3)
    kept = CLASSES >= 0
    right = (model(x).argmax(1) == CLASSES)[kept].double().mean().item()
    assert obj.evaluate() == (obj.loss(), pytest.approx(right, rel=1e-14))
    theta = obj.parameters_vector()
    assert curvature_at(obj, None, ("loss",)).row["accuracy"] == pytest.approx(right, rel=1e-14)
    table = path_losses(obj, linear_path(theta, 1.1 * theta), [0.0, 1.0])
    assert table["accuracy"][0] == pytest.approx(right, rel=1e-14)
    assert table["loss"][0] == pytest.approx(obj.loss(), rel=1e-14)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_log_probabilities_have_the_gauss_newton_matrix_of_cross_entropy(weight: Tensor | None):
    """The loss is linear in them, which by itself would make it 0."""
    x, body = randn(N, 4), network()
    eye = torch.eye(27, dtype=torch.float64)
    one = Objective(nn.Sequential(body, LOG_SOFTMAX), nn.NLLLoss(weight), (x, CLASSES))
    other = Objective(body, nn.CrossEntropyLoss(weight), (x, CLASSES))
    torch.testing.assert_close(GGNOperator(one) @ eye, GGNOperator(other) @ eye)
    assert ggn_trace(one).value == pytest.approx(ggn_trace(other).value, rel=1e-10)
    if weight is None:
        trace = fisher_trace(with_sampled_labels(one)).value
        assert trace == pytest.approx(fisher_trace(with_sampled_labels(other)).value, rel=1e-10)
    # Distillation: the entropy of the targets does not matter.
    kl = nn.KLDivLoss(reduction="batchmean")
    soft = Objective(nn.Sequential(body, LOG_SOFTMAX), kl, (x, PROBABILITIES))
    expected = GGNOperator(Objective(body, "cross_entropy", (x, PROBABILITIES))) @ eye
    torch.testing.assert_close(GGNOperator(soft) @ eye, expected)
    with autograd_only():
        torch.testing.assert_close(GGNOperator(soft) @ eye, expected)
        torch.testing.assert_close(
            HessianOperator(soft) @ eye,
            HessianOperator(Objective(body, "cross_entropy", (x, PROBABILITIES))) @ eye,
        )
    assert ggn_trace(soft).value == pytest.approx(float(expected.trace()), rel=1e-10)


def test_numbers_that_are_not_normalized_are_no_log_probabilities():
    x, model = randn(N, 4), network()
    loss = nn.NLLLoss()
    obj = Objective(model, loss, (x, CLASSES))
    assert obj.loss() == pytest.approx(loss(model(x), CLASSES).item(), rel=1e-13)
    gradient = torch.autograd.grad(loss(model(x), CLASSES), list(model.parameters()))
    torch.testing.assert_close(obj.gradient(), torch.cat([g.reshape(-1) for g in gradient]))
    with pytest.raises(ValueError, match="log-probabilities not normalized"):
        with_sampled_labels(obj)


class Several(nn.Module):
    """Two or three outputs [n, 2] or [n]."""

    def __init__(self, count: int, axis: bool = True) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 3), nn.ModuleList(nn.Linear(3, 2) for _ in "abc")
        self.count, self.axis = count, axis

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = torch.tanh(self.body(x))
        found = [head(features) for head in self.heads[: self.count]]
        if self.count == 2 and self.axis:
            found[1] = F.softplus(found[1]) + 0.1
        return tuple(found) if self.axis else tuple(one[:, 0] for one in found)


SIGNS = torch.tensor([1, -1, 1, 1, -1, 1, -1])
SEVERAL: dict[str, tuple[nn.Module, int, bool, Tensor]] = {
    "gaussian": (nn.GaussianNLLLoss(), 2, True, randn(N, 2)),
    "gaussian sum": (nn.GaussianNLLLoss(full=True, reduction="sum"), 2, True, randn(N, 2)),
    "cosine": (nn.CosineEmbeddingLoss(margin=0.2), 2, True, SIGNS),
    "ranking": (nn.MarginRankingLoss(margin=0.5), 2, False, SIGNS),
    "triplet": (nn.TripletMarginLoss(swap=True), 3, True, SIGNS),
    "triplet by distance": (nn.TripletMarginWithDistanceLoss(), 3, True, SIGNS),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_losses_of_several_outputs(name: str):
    loss, count, axis, targets = SEVERAL[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Several(count, axis).double()
    x = randn(N, 4)

    def expected() -> Tensor:
        outputs = model(x)
        if "gaussian" in name:
            return loss(outputs[0], targets, outputs[1])
        return loss(*outputs) if count == 3 else loss(*outputs, targets)

    for parameter in model.heads[count:].parameters():
        parameter.requires_grad_(False)
    for data in ((x, targets), [(x[:3], targets[:3]), (x[3:], targets[3:])]):
        obj = Objective(model, loss, data)
        assert obj.loss() == pytest.approx(expected().item(), rel=1e-13)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(expected(), parameters, create_graph=True)
        gradient = torch.cat([g.reshape(-1) for g in gradient])
        torch.testing.assert_close(obj.gradient(), gradient.detach())
        v = randn(obj.num_params)
        product = torch.autograd.grad(gradient, parameters, v, materialize_grads=True)
        operator = HessianOperator(obj)
        torch.testing.assert_close(operator @ v, torch.cat([p.reshape(-1) for p in product]))
        assert operator.method == "graph"
        torch.testing.assert_close(score_matrix(obj).mean(0), gradient.detach())


def test_a_known_variance_comes_with_the_targets():
    x, model, targets = randn(N, 4), network(), (randn(N, C), POSITIVE + 0.1)
    loss = nn.GaussianNLLLoss()
    obj = Objective(model, loss, (x, targets), batch_size=3)
    assert obj.loss() == pytest.approx(loss(model(x), *targets).item(), rel=1e-13)
    _, matrix = hessian(model, lambda: loss(model(x), *targets))
    eye = torch.eye(obj.num_params, dtype=torch.float64)
    torch.testing.assert_close(HessianOperator(obj) @ eye, matrix)
    with pytest.raises(ValueError, match="let the model return"):
        Objective(model, loss, (x, targets[0]))


def test_pairs_that_torch_would_broadcast_are_refused():
    model, loss = Several(2, axis=False).double(), nn.MarginRankingLoss()
    with pytest.raises(ValueError):
        Objective(model, loss, (randn(N, 4), SIGNS[:, None]))


def test_labels_are_drawn_for_batches_of_other_lengths():
    model, tokens, labels = language_data()
    data = [(tokens[:2], labels[:2]), (tokens[2:, :4], labels[2:, :4])]
    obj = Objective(model, "next_token", data)
    drawn = with_sampled_labels(obj, draws=3)
    for before, after in zip(obj.batches(), drawn.batches(), strict=True):
        given = before.targets.repeat_interleave(3, 0)
        kept = given == -100
        kept[:, 0] = True
        assert torch.equal(after.targets[kept], given[kept])
        assert ((after.targets >= 0) | kept).all()
    draws = 300
    scores = score_matrix(with_sampled_labels(obj, draws=draws)).square().sum(1).view(4, draws)
    weight = obj.loss_fn.scale(1)
    expected = weight * ggn_trace(obj).value
    error = float((scores.var(1).sum() / draws).sqrt()) / 4
    assert abs(float(scores.mean()) - expected) < 5 * error


def test_gauss_newton_trace_with_a_known_variance():
    targets = (randn(N, C), POSITIVE + 0.1)
    obj = Objective(network(), nn.GaussianNLLLoss(), (randn(N, 4), targets))
    matrix = GGNOperator(obj) @ torch.eye(obj.num_params, dtype=torch.float64)
    assert ggn_trace(obj).value == pytest.approx(float(matrix.trace()), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_them_in_float32(dtype: torch.dtype):
    x, model = randn(N, 4).to(dtype), nn.Sequential(network(), LOG_SOFTMAX).to(dtype)
    for loss, targets in ((nn.NLLLoss(WEIGHT), CLASSES), (nn.MSELoss(), randn(N, C))):
        obj = Objective(model, loss, (x, targets))
        outputs = model(x).float()
        module = nn.NLLLoss(WEIGHT.float()) if loss.__class__ is nn.NLLLoss else loss
        targets = targets.float() if targets.is_floating_point() else targets
        assert obj.loss() == pytest.approx(module(outputs, targets).item(), rel=1e-2)
        if module is not loss:
            assert obj.loss_fn.normalized


def test_losses_of_the_same_settings_are_compared_once():
    x, model = randn(N, 4), nn.Sequential(network(), LOG_SOFTMAX)

    def origin(loss: nn.Module, labels: Tensor = CLASSES) -> object:
        return Objective(model, loss, (x, labels)).loss_fn.origin

    kept = [
        origin(nn.CrossEntropyLoss(WEIGHT)),
        origin(nn.NLLLoss()),
        origin(nn.MSELoss(), x[:, :3]),
    ]
    assert origin(nn.CrossEntropyLoss(WEIGHT.clone()), CLASSES.roll(1)) is kept[0]
    assert origin(nn.CrossEntropyLoss(2 * WEIGHT)) is not kept[0]
    assert origin(nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)) is not kept[0]
    assert origin(nn.NLLLoss()) is kept[1] and kept[1].normalized
    assert Objective(network(), nn.NLLLoss(), (x, CLASSES)).loss_fn.origin is not kept[1]
    assert origin(nn.MSELoss(), x[:, :3]) is kept[2]
    assert origin(nn.MSELoss(reduction="none"), x[:, :3]) is not kept[2]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gauss_newton_trace_of_pixels(smoothing: float):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, C, 1)).double()
    labels = torch.arange(4 * 2 * 3).view(4, 2, 3) % (C + 1) - 1
    loss = nn.CrossEntropyLoss(WEIGHT, ignore_index=-1, label_smoothing=smoothing)
    x = randn(4, 2, 3, 4)
    obj = Objective(model, loss, (x, labels), batch_size=3)
    assert obj.loss() == pytest.approx(loss(model(x), labels).item(), rel=1e-13)
    matrix = GGNOperator(obj) @ torch.eye(obj.num_params, dtype=torch.float64)
    assert ggn_trace(obj).value == pytest.approx(float(matrix.trace()), rel=1e-10)
    by = ggn_trace(obj, group_by="module")
    assert sum(e.value for e in by.values()) == pytest.approx(float(matrix.trace()), rel=1e-10)
