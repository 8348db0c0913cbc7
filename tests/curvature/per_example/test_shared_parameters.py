"""Scores of parameters that are matrices of products, or that several layers use."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entropic_fast.curvature import gradient_norms, score_gram, score_matrix
from entropic_fast.curvature.per_example._engine import PerExampleGradEngine
from entropic_fast.curvature.per_example.layer_rules._reused import TiedGrad
from entropic_fast.objective import Objective


class Model(nn.Module):
    """A function of inputs [n, 3, 4] (or tokens [n, 6]) and of matrices and layers."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5, 4))
        self.square = nn.Parameter(torch.randn(4, 4))
        self.bias, self.out = nn.Parameter(torch.randn(5)), nn.Linear(4, 3)
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.conv = nn.Conv1d(3, 3, 3, padding=1)
        self.prelu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self, x)
        return self.out(torch.tanh(h).flatten(1, -2).mean(1)) if h.shape[-1] == 4 else h.mean(1)


def conv1d(m: Model, x: Tensor) -> Tensor:
    """As Hugging Face's `Conv1D`."""
    return torch.addmm(m.bias, x.view(-1, 4), m.a).view(*x.shape[:-1], 5)


tanh = torch.tanh
# A function, and the parameters among a, b, square, bias, table and conv that no rule covers.
MODELS = {
    "addmm": (lambda m, x: tanh(conv1d(m, x)) @ m.b, ""),
    "addmm of vectors": (lambda m, x: torch.addmm(m.bias, x[:, 0], m.a)[:, None] @ m.b, ""),
    "addmm as a method": (lambda m, x: m.bias.addmm(x[:, 0], m.a)[:, None] @ m.b, ""),
    "addmm, scaled": (
        lambda m, x: torch.addmm(m.bias, x[:, 0], m.a, beta=2, alpha=3)[:, None] @ m.b,
        "a bias",
    ),
    "right products": (lambda m, x: torch.matmul(x, m.a).tanh().matmul(m.b), ""),
    "right products of matrices": (lambda m, x: x[:, 1].mm(m.a).tanh().mm(m.b)[:, None], ""),
    "left product": (lambda m, x: (m.b @ tanh(x.mT)).mT @ m.b.T.contiguous().T[:, :4], "b"),
    "left products": (lambda m, x: (m.a @ tanh(m.b @ x.mT)).mT, ""),
    "left product of a transpose": (lambda m, x: (m.a.T @ tanh(x.mT)).mT @ m.b, "a"),
    "of vectors": (lambda m, x: torch.stack([m.a @ torch.mv(m.b, r[0]) for r in x])[:, None], ""),
    "by transposes": (lambda m, x: tanh(x @ m.b.T) @ m.a.t(), ""),
    "linear of transposes": (
        lambda m, x: F.linear(tanh(F.linear(x, m.a.mT, m.bias)), m.b.transpose(0, 1)),
        "",
    ),
    "permuted": (lambda m, x: tanh(x @ m.b.permute(1, 0)) @ torch.transpose(m.a, -1, 0), ""),
    "dimensions that stay": (
        lambda m, x: x @ m.square.transpose(1, 1) + x @ m.square.permute(0, 1).T,
        "square",
    ),
    "a transpose used otherwise": (lambda m, x: (x @ m.b.T) @ m.a.T + m.a.T.sum(), "a"),
    "twice": (lambda m, x: tanh(tanh(tanh(x @ m.a) @ m.b) @ m.a) @ m.b, ""),
    "forth and back": (lambda m, x: tanh(x @ m.a + m.bias) @ m.a.T, "bias"),
    "square, four ways": (
        lambda m, x: (m.square @ tanh(F.linear(x @ m.square, m.square)).mT).mT @ m.square.T,
        "",
    ),
    "low rank": (lambda m, x: tanh(x @ m.a @ m.b) + x, ""),
    "product of parameters": (lambda m, x: tanh(x @ (m.a @ m.b)), "a b"),
    "layer twice": (lambda m, x: m.prelu(m.conv(m.prelu(m.conv(x)))), ""),
    "layer twice, other sizes": (
        lambda m, x: m.conv(tanh(m.conv(x)[..., ::2])).repeat(1, 1, 2),
        "",
    ),
    "bias of two layers": (lambda m, x: F.linear(x, m.b, m.bias) + conv1d(m, x) @ m.b @ m.a, ""),
    "bias made of others": (
        lambda m, x: F.linear(x, m.b, torch.cat([m.bias[:2], m.bias[2:] * 0])).tanh() @ m.b,
        "bias",
    ),
    "addmm of a bias made of others": (
        lambda m, x: torch.addmm(2 * m.bias, x[:, 1], m.a)[:, None] @ m.b,
        "bias",
    ),
    "of a constant": (lambda m, x: x * F.linear(torch.ones(1, 4).to(x), m.square).tanh(), ""),
    "of a long constant": (
        lambda m, x: x * F.linear(torch.ones(3, 4).to(x), m.square).tanh(),
        "square",
    ),
    "and by itself": (lambda m, x: tanh(x @ m.a) @ m.b + m.b.sum(), "b"),
}
WORDS = {
    "tied": (lambda m, x: m.head(tanh(m.table(x))), ""),
    "tied, without padding": (lambda m, x: m.head(tanh(F.embedding(x, m.table.weight))), ""),
    "tied by a transpose": (lambda m, x: tanh(m.table(x)) @ m.table.weight.T, ""),
    "tied thrice": (lambda m, x: m.head(m.table(x) + F.embedding(x.flip(1), m.head.weight)), ""),
    "positions": (lambda m, x: m.table(x).cos() * m.table(torch.arange(6).expand(1, 6)), ""),
    "many positions": (
        lambda m, x: m.table(x).cos() * m.table(torch.arange(18) % 7).view(3, 6, 4).sum(0),
        "table",
    ),
    "embedded twice": (lambda m, x: m.table(x).cos() + m.table(x.flip(1)), ""),
}


def case(name: str) -> tuple[Objective, str]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        function, others = (MODELS | WORDS)[name]
        model = Model(function).double()
        x = torch.randint(7, (5, 6)) if name in WORDS else torch.randn(5, 3, 4).double()
        classes = model(x).shape[1]
    return Objective(model, "cross_entropy", (x, torch.arange(5) % classes)), others


def explicit(obj: Objective) -> Tensor:
    """One backward pass an example.  # [N, P]"""
    leaf = obj.parameters_vector().requires_grad_()
    losses = obj.losses(leaf, *obj.tensors())
    return torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses])


@pytest.mark.parametrize("name", MODELS | WORDS)
def test_scores_are_those_of_a_backward_pass_an_example(name: str):
    obj, others = case(name)
    expected = explicit(obj)
    scale = float(expected.abs().max())
    torch.testing.assert_close(score_matrix(obj), expected, rtol=1e-10, atol=1e-12 * scale)
    squares = expected.square().sum(1)
    torch.testing.assert_close(gradient_norms(obj), squares, rtol=1e-9, atol=1e-18)
    for strategy in ("memory", "disk", "recompute"):
        gram = score_gram(obj, strategy=strategy)
        torch.testing.assert_close(gram, expected @ expected.T, rtol=1e-8, atol=1e-10 * scale**2)
    copied = {
        n.replace(".weight", "").replace(".bias", "") for n in PerExampleGradEngine(obj).batched
    }
    assert copied == set(others.split())


@pytest.mark.parametrize("vocabulary", [3, 40])
def test_norms_of_a_tied_table_are_those_of_its_rows(vocabulary: int):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (4, 6), generator=generator)
    e, a = (torch.randn(4, 6, 5, generator=generator).double() for _ in range(2))
    g = torch.randn(4, 6, vocabulary, generator=generator).double()
    piece = TiedGrad(tokens, e, a, g)
    dense = g.mT @ a
    for i, (row, t) in enumerate(zip(e, tokens, strict=True)):
        dense[i].index_add_(0, t, row)
    torch.testing.assert_close(piece.rows(), dense.flatten(1))
    torch.testing.assert_close(piece.norms(), dense.square().sum((1, 2)))
    assert piece.count == 4 and piece.width == 5 * vocabulary


def test_a_tied_table_that_cancels_has_norms_of_its_rows():
    """Inner products would give rounding of the two parts' squares."""
    tokens = torch.zeros(3, 1, dtype=torch.int64)
    e = torch.randn(3, 1, 4)
    g = torch.zeros(3, 1, 9)
    g[:, 0, 0] = -1
    piece = TiedGrad(tokens, e, e * (1 + 1e-5), g)
    expected = piece.rows().double().square().sum(1)
    torch.testing.assert_close(piece.norms(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["addmm", "tied", "twice"])
def test_other_dtypes(name: str, dtype: torch.dtype):
    obj, _ = case(name)
    expected = explicit(obj.cast(dtype).double())
    got = score_matrix(obj.cast(dtype)).double()
    assert float((got - expected).norm()) < (1e-5 if dtype == torch.float32 else 0.1) * float(
        expected.norm()
    )
