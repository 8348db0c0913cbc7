"""Scores of random models against one ordinary backward pass an example.

The models mix layers, shapes, losses and ways of sharing parameters; the last tests state what
the seeds have covered.
"""

from collections import Counter

import pytest
import torch
from random_models import RandomCase, random_case
from torch.func import functional_call, grad, vmap

from entropic_fast.curvature import fisher_trace, gradient_norms, score_gram, score_matrix

SEEDS = range(700)
SOME = range(0, 700, 7)
# Padding of even kernels by "same" is announced as slow.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def assert_rows_match(case: RandomCase, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Each parameter's scores, to 1e-11 of their own norm.

    A score that is zero in exact arithmetic (a bias before a normalization) is rounding, which
    has the size of what cancels times eps: hence the second term.
    """
    noise = 1e-12 * float(expected.norm())
    begin = 0
    for name, parameter in case.named_parameters().items():
        columns = slice(begin, begin + parameter.numel())
        begin += parameter.numel()
        error = float((got[:, columns] - expected[:, columns]).norm())
        scale = float(expected[:, columns].norm())
        assert error <= 1e-11 * scale + noise or error <= 20 * case.rounding(), (
            f"seed {case.seed}: {name}{list(parameter.shape)} is off by {error:.3g}, of "
            f"{scale:.3g}; kinds: {sorted(case.kinds)}\n{case.model}"
        )
    assert got.shape == expected.shape and begin == got.shape[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_in_float64_is_that_of_single_backward_passes(seed: int):
    case = random_case(seed)
    obj, expected = case.objective(), case.scores()
    assert_rows_match(case, score_matrix(obj), expected)
    gram = expected @ expected.T
    squares, scale = gram.diagonal(), float(gram.norm())
    mean = squares.mean()
    for name, got, wanted, size in (
        ("Gram matrix", score_gram(obj), gram, scale),
        ("norms", gradient_norms(obj), squares, scale),
        ("Fisher trace", mean.new_tensor(fisher_trace(obj).value), mean, float(mean)),
    ):
        gap = float((got - wanted).norm())
        assert gap <= 1e-11 * size or gap <= 20 * case.rounding() * float(expected.norm()), (
            f"seed {seed}: {name} off by {gap:.3g}, of {size:.3g}; kinds: {sorted(case.kinds)}"
        )


@pytest.mark.parametrize("seed", SOME)
def test_everything_in_float32_is_close_to_it(seed: int):
    case = random_case(seed)
    obj, expected = case.objective(torch.float32), case.scores()
    got = score_matrix(obj)
    assert got.dtype == torch.float32
    largest = float(expected.norm(dim=1).max())
    errors = (got.double() - expected).norm(dim=1)
    assert bool((errors <= 1e-4 * expected.norm(dim=1) + 1e-6 * largest).all())
    gram = expected @ expected.T
    scale = float(gram.norm())
    assert float((score_gram(obj) - gram).norm()) <= 2e-4 * scale
    assert float((gradient_norms(obj) - gram.diagonal()).norm()) <= 2e-4 * scale
    assert fisher_trace(obj).value == pytest.approx(float(gram.trace()) / len(gram), rel=2e-4)


def test_scores_that_are_all_rounding_are_not_refused():
    """Behind a scale of 0 every gradient is 0 but for rounding, and the two ways differ."""
    case = random_case(4376)
    assert float(score_matrix(case.objective()).norm()) < 1e-12


def test_a_seed_makes_one_case():
    for seed in (3, 4):
        first, second = random_case(seed), random_case(seed)
        assert torch.equal(first.inputs, second.inputs) and first.kinds == second.kinds
        assert torch.equal(first.scores(), second.scores())


# -- what the seeds cover ---------------------------------------------------------------------
# fmt: off
LAYERS = [
    "Linear", "Linear without bias", "Linear, 0 leading", "Linear, 1 leading",
    "Linear, 2 leading", "Linear, 3 leading", "Linear over positions", "Bilinear", "Conv1d",
    "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "BatchNorm1d",
    "BatchNorm2d", "BatchNorm3d", "BatchNorm without weight", "gamma 0", "GroupNorm",
    "GroupNorm without weight", "InstanceNorm", "InstanceNorm with weight",
    "InstanceNorm, running", "LayerNorm of 1", "LayerNorm of 2", "LayerNorm of 3",
    "LayerNorm over channels", "LayerNorm without bias", "LayerNorm without weight", "RMSNorm",
    "RMSNorm without weight", "Embedding", "Embedding with padding_idx", "EmbeddingBag", "PReLU",
    "PReLUs", "attention", "attention, batch first", "attention, batch second",
    "attention with kdim and vdim", "attention with bias_k and bias_v", "TransformerEncoderLayer",
    "TransformerDecoderLayer", "GRU", "Dropout", "ReLU", "ReLU in place", "SiLU in place", "GELU",
    "Tanh", "weight norm",
]
CONVOLUTIONS = [
    "depthwise", "grouped", "grouped transposed", "strided", "dilated", "stride over kernel",
    "output padding", "padding by numbers", "padding same", "same, uneven", "padding valid",
    "padding in front only", "reflect", "replicate", "circular", "channels-last inputs",
]
FUNCTIONS = [
    "F.batch_norm", "F.conv", "F.conv by keyword", "F.conv of a matrix", "F.conv of a transpose",
    "F.conv of an expression", "F.conv of standardized weights", "F.embedding", "F.group_norm",
    "F.layer_norm", "F.layer_norm of expressions", "F.linear", "F.linear by keyword",
    "F.linear of a rounded weight", "F.linear of a slice", "F.linear of a transpose",
    "F.linear of a view", "F.linear of an expression", "F.linear of parts",
    "F.linear of rows repeated", "F.prelu", "F.rms_norm", "aten linear", "class token", "einsum",
    "empty parameter", "forward called directly", "functional_call inside", "matmul",
    "raw parameter",
]
SHARING = [
    "batch norm twice", "bias alone", "bias in a raw expression", "bias shared",
    "conv and its transpose", "conv bias shared", "conv of a constant", "conv on two scales",
    "conv output discarded", "conv twice", "conv under no_grad too",
    "conv weight in a raw expression", "conv weight tied", "frozen bias", "frozen both",
    "frozen weight", "hook", "layer of a constant", "layer of a parameter", "looped cell",
    "module in two places", "module twice", "norm twice", "output also detached",
    "output discarded", "output discarded once", "output tied to the embedding",
    "parametrization", "pre-hook", "subclass", "unused module", "used under no_grad too",
    "weight also detached", "weight in a raw expression", "weight in a raw expression first",
    "weight is a bias too", "weight is another's transpose", "weight made by a layer",
    "weight tied",
]
EXAMPLES = [
    "flattened to [N T, D]", "flattened to [T N, D]", "transposed to [T, N, D]",
    "as many examples as positions", "frames folded into the examples",
    "channels folded into the examples", "BatchNorm on a flattened axis", "one example at a time",
    "conv of one example at a time", "views beside the examples",
    "conv of views beside the examples", "examples repeated", "examples reversed",
    "conv, examples reversed", "expanded input", "ragged batches", "an empty batch",
]
MODELS = [
    "vectors", "images", "sequences", "grids", "tokens", "image to grid", "image to sequence",
    "residual in place", "branches concatenated", "branches gated", "overwritten output",
    "conv output overwritten", "head at every position", "no head",
    "cross_entropy at many positions", "loss: cross_entropy", "loss: mse", "loss: custom",
]
UNTRACEABLE = [
    "branch on data", "size from data", "write into a constant", "autograd function",
]
# fmt: on
COVERED = {
    "layers": LAYERS,
    "convolutions": CONVOLUTIONS,
    "functions": FUNCTIONS,
    "sharing and constants": SHARING,
    "examples on other axes": EXAMPLES,
    "models and losses": MODELS,
    "models that vmap cannot trace": UNTRACEABLE,
}


@pytest.fixture(scope="module")
def counts() -> Counter[str]:
    return Counter(kind for seed in SEEDS for kind in random_case(seed).kinds)


@pytest.mark.parametrize("group", COVERED)
def test_every_kind_occurs_in_at_least_four_seeds(group: str, counts: Counter[str]):
    rare = {kind: counts[kind] for kind in COVERED[group] if counts[kind] < 4}
    assert not rare


def test_no_kind_is_left_out_of_the_lists(counts: Counter[str]):
    assert set(counts) == {kind for kinds in COVERED.values() for kind in kinds}


def test_few_cases_are_trivial():
    """Zeros agree with anything: those of unused parameters, and behind dead activations."""
    zero = total = 0
    for seed in range(0, len(SEEDS), 5):
        case = random_case(seed)
        sizes = [p.numel() for p in case.named_parameters().values()]
        parts = case.scores().split(sizes, dim=1)
        zero += sum(not bool(part.any()) for part in parts if part.numel())
        total += len(parts)
    assert zero < 0.25 * total


def test_the_untraceable_kinds_are_untraceable(caplog: pytest.LogCaptureFixture):
    """So that they test the way that is taken then."""
    left = set(UNTRACEABLE)
    for seed in SEEDS:
        case = random_case(seed)
        if left & case.kinds and len(set(UNTRACEABLE) & case.kinds) == 1:
            with pytest.raises(RuntimeError):
                _by_vmap(case)
            left -= case.kinds
    assert not left


def _by_vmap(case: RandomCase) -> None:
    values = {name: p.detach() for name, p in case.model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(case.model, values, (x[None],)).sum()

    vmap(grad(loss), in_dims=(None, 0))(values, case.inputs)
