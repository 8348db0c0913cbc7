"""Random problems against plain torch: batches, outputs, losses and derivatives of every kind.

The seeds are some in which every kind occurs at least twice; thousands more are in the record of
`benchmarks/trust_models.py problems`.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from plain_problems import PlainProblem, WrongError, check
from random_problems import RandomProblem, random_problem

import entropic_fast as ef

# fmt: off
SEEDS = [
    0, 7, 10, 12, 13, 15, 20, 23, 29, 30, 31, 34, 35, 36, 37, 41, 44, 46, 53, 54, 55, 57, 60, 62,
    63, 64, 65, 71, 78, 83, 84, 85, 99, 110, 125, 126, 136, 137, 145, 161, 168, 181, 183, 191,
    197, 204, 219, 223, 224, 225, 237, 247, 251, 291, 304, 318, 327, 338, 344, 384, 990,
]
# fmt: on
# torch itself has no derivative, or nothing depends on the parameters chosen.
ALLOWED = ("nn.EmbeddingBag", "torch has no gradient", "depends on the trainable parameters")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("seed", SEEDS)
def test_every_number_is_that_of_plain_torch(seed: int):
    refused = check(random_problem(seed)).refused
    assert all(any(said in line for said in ALLOWED) for line in refused), refused


def test_a_seed_makes_one_problem():
    for seed in (3, 5):
        first, second = random_problem(seed), random_problem(seed)
        assert first.kinds == second.kinds
        assert torch.equal(PlainProblem(first).losses(), PlainProblem(second).losses())


def _scaled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: 1.0001 * function(*args, **kwargs)


def _first(condition: Callable[[RandomProblem], bool]) -> RandomProblem:
    return next(p for p in map(random_problem, range(100)) if condition(p))


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (ef.Objective, "gradient", "gradient off by"),
        (ef.Objective, "example_losses", "losses of examples off by"),
        (ef, "score_matrix", "scores off by"),
        (ef, "gradient_norms", "norms off by"),
        (ef.HessianOperator, "_product", "Hessian product"),
        (ef.GGNOperator, "_product", "Gauss-Newton product off by"),
    ],
)
def test_a_number_that_is_off_is_found(
    owner: object, name: str, said: str, monkeypatch: pytest.MonkeyPatch
):
    problem = _first(lambda p: p.one_tensor and not p.coupled and "loss: cross_entropy" in p.kinds)
    monkeypatch.setattr(owner, name, _scaled(getattr(owner, name)))
    with pytest.raises(WrongError, match=said):
        check(problem)


def test_examples_that_are_mixed_unnoticed_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ef.Objective, "require_single_examples", lambda self: None)
    with pytest.raises(WrongError, match="score_matrix was not refused"):
        check(_first(lambda p: p.coupled))


# -- what the seeds cover ---------------------------------------------------------------------
# fmt: off
BATCHES = [
    "batch: (a, b, targets)", "batch: DataLoader", "batch: Dataset", "batch: NumPy",
    "batch: TensorDataset", "batch: a dataclass", "batch: a dict beside labels",
    "batch: a dict for one argument", "batch: a dict with labels",
    "batch: a dict with labels, any keywords", "batch: a dict with labels, keywords",
    "batch: a dict with labels, optional arguments", "batch: a list of inputs",
    "batch: a list of one tensor", "batch: a tensor", "batch: a tuple of inputs", "batch: index",
    "batch: nested", "batches of inputs of different sizes",
    "batches of outputs of different sizes",
]
OUTPUTS = [
    "a loss of several parts", "output= by name or index", "outputs: dataclass", "outputs: dict",
    "outputs: list", "outputs: named tuple", "outputs: namespace", "outputs: tuple",
    "outputs: two in a dict", "outputs: two in a tuple",
]
DERIVATIVES = [
    "gradient penalty in the loss", "input derivative", "input derivative: by_dual_numbers",
    "input derivative: by_func_grad", "input derivative: by_jvp", "input derivative: by_vmap",
    "input derivative: force", "input derivative: residual", "input derivative: second_order",
]
LOSSES = [
    "a function of torch.nn.functional", "class weights", "coupled: batch mean",
    "coupled: contrastive", "coupled: contrastive mean", "coupled: correlation", "coupled: model",
    "coupled: root mean", "ignored labels", "label smoothing", "loss: a function", "loss: bce",
    "loss: cross_entropy", "loss: distance", "loss: mse", "loss: next_token", "loss: nn.BCELoss",
    "loss: nn.BCEWithLogitsLoss", "loss: nn.CosineEmbeddingLoss", "loss: nn.CrossEntropyLoss",
    "loss: nn.GaussianNLLLoss", "loss: nn.HuberLoss", "loss: nn.KLDivLoss", "loss: nn.L1Loss",
    "loss: nn.MSELoss", "loss: nn.MultiLabelMarginLoss", "loss: nn.MultiLabelSoftMarginLoss",
    "loss: nn.MultiMarginLoss", "loss: nn.NLLLoss", "loss: nn.PoissonNLLLoss",
    "loss: nn.SmoothL1Loss", "loss: nn.SoftMarginLoss", "loss: nn.TripletMarginLoss",
    "loss: quantiles", "loss: weighted examples", "pos_weight of outputs",
    "probabilities as targets", "reduction batchmean", "reduction mean", "reduction none",
    "reduction sum", "weight decay", "weight of outputs",
]
PARAMETERS = [
    "complex parameters: abs", "complex parameters: fft", "complex parameters: product",
    "parameters= by module", "parameters= by name", "parameters= by parameters",
    "parameters= by pattern", "wrapper: AveragedModel", "wrapper: DataParallel",
    "wrapper: torch.compile",
]
# fmt: on
KINDS = [*BATCHES, *OUTPUTS, *DERIVATIVES, *LOSSES, *PARAMETERS]
PREFIXES = (
    "batch:", "outputs:", "loss:", "coupled:", "input derivative", "complex parameters",
    "wrapper:", "parameters=", "reduction",
)  # fmt: skip


def test_every_kind_occurs_in_at_least_two_seeds():
    counts = Counter(kind for seed in SEEDS for kind in random_problem(seed).kinds)
    assert not {kind: counts[kind] for kind in KINDS if counts[kind] < 2}
    assert {kind for kind in counts if kind.startswith(PREFIXES)} <= set(KINDS)
