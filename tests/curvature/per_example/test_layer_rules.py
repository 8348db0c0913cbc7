"""Every piece against the explicit sum over positions, whatever is asked of it."""

import itertools

import pytest
import torch
from cases import relative_error
from torch import Tensor

from entropic_fast.curvature.per_example.layer_rules import DenseGrad, FactoredGrad
from entropic_fast.curvature.per_example.layer_rules._base import norms_by_columns
from entropic_fast.curvature.per_example.layer_rules.conv import ConvGrad, Geometry
from entropic_fast.curvature.per_example.layer_rules.embedding import EmbeddingGrad
from entropic_fast.curvature.per_example.layer_rules.linear import OuterProductGrad

N = 5


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear(positions: int, inputs: int, outputs: int, n: int = N) -> tuple[FactoredGrad, Tensor]:
    a, g = randn(n, positions, inputs), randn(n, positions, outputs, seed=1)
    rows = [
        sum(
            (torch.outer(x, y) for x, y in zip(g[e], a[e], strict=True)),
            torch.zeros(outputs, inputs),
        )
        for e in range(n)
    ]
    return OuterProductGrad(a, g), torch.stack(rows).flatten(1).double() if n else torch.zeros(
        0, inputs * outputs
    ).double()


def convolution(
    space: tuple[int, ...], channels: int, outputs: int, geometry: Geometry, n: int = N
) -> tuple[FactoredGrad, Tensor]:
    out = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(
            space,
            geometry.padding,
            geometry.dilation,
            geometry.kernel,
            geometry.stride,
            strict=True,
        )
    ]
    a, g = randn(n, *space, channels), randn(n, *out, outputs, seed=1)
    weight = torch.zeros(
        outputs, channels // geometry.groups, *geometry.kernel, dtype=torch.float64
    )
    rows = []
    for e in range(n):
        weight.requires_grad_()
        y = torch.convolution(
            a[e : e + 1].movedim(-1, 1), weight, None, geometry.stride, geometry.padding,
            geometry.dilation, False, [0] * len(space), geometry.groups,
        )  # fmt: skip
        rows.append(torch.autograd.grad(y, weight, g[e : e + 1].movedim(-1, 1))[0].flatten())
    return ConvGrad(a, g, geometry), torch.stack(rows)


def embedding(
    positions: int, vocabulary: int, depth: int, n: int = N
) -> tuple[FactoredGrad, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocabulary, (n, positions), generator=generator)
    g = randn(n, positions, depth)
    rows = torch.zeros(n, vocabulary, depth, dtype=torch.float64)
    for e, t in itertools.product(range(n), range(positions)):
        rows[e, tokens[e, t]] += g[e, t]
    return EmbeddingGrad(tokens, g, vocabulary), rows.flatten(1)


def one(kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1):
    return Geometry((kernel,), (stride,), (padding,), (dilation,), groups)


def two(kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    return Geometry(kernel, stride, padding, dilation, groups)


PIECES = {
    "linear, one position": lambda: linear(1, 4, 3),
    "linear, few positions": lambda: linear(2, 40, 30),
    "linear, many positions": lambda: linear(9, 2, 3),
    "linear, one wide": lambda: linear(3, 1, 1),
    "conv 1d": lambda: convolution((11,), 2, 3, one(4, 3, 1, 2)),
    "conv 2d": lambda: convolution((5, 6), 3, 4, two((3, 3), padding=(1, 1))),
    "conv 2d, one position": lambda: convolution((3, 3), 4, 5, two((3, 3))),
    "conv 2d, few positions": lambda: convolution(
        (4, 3), 30, 42, two((3, 2), (1, 2), (1, 1), (2, 1))
    ),
    "conv 2d, 1x1": lambda: convolution((2, 2), 9, 8, two((1, 1))),
    "grouped": lambda: convolution((5, 4), 4, 6, two((3, 2), padding=(1, 0), groups=2)),
    "depthwise": lambda: convolution((4, 5), 3, 6, two((3, 3), (2, 1), (1, 1), groups=3)),
    "conv 3d": lambda: convolution(
        (3, 4, 3), 2, 2, Geometry((2, 3, 1), (1, 2, 1), (1, 0, 1), (2, 1, 1), 1)
    ),
    "embedding, few tokens": lambda: embedding(2, 30, 3),
    "embedding, many tokens": lambda: embedding(7, 4, 3),
}
all_pieces = pytest.mark.parametrize("name", PIECES)


@all_pieces
def test_rows_are_in_the_order_of_the_parameter(name: str):
    piece, expected = PIECES[name]()
    assert piece.width == expected.shape[1] and piece.count == N
    assert relative_error(piece.rows(), expected) < 1e-14


@all_pieces
def test_norms_and_pairs_follow_from_the_rows(name: str):
    piece, rows = PIECES[name]()
    assert piece.norms().dtype == torch.float64
    assert relative_error(piece.norms(), rows.square().sum(1)) < 1e-13
    assert relative_error(norms_by_columns(piece), rows.square().sum(1)) < 1e-13
    other = piece.with_tensors(tuple(t[1:4] for t in piece.tensors))
    assert relative_error(piece.inner_products(other), rows @ rows[1:4].T) < 1e-13


def test_pairs_are_taken_where_they_are_cheaper_only():
    cheap = {name for name in PIECES if PIECES[name]()[0].inner_product_bytes is not None}
    assert "linear, few positions" in cheap and "embedding, few tokens" in cheap
    assert "conv 2d, one position" in cheap and "conv 2d, few positions" in cheap
    assert not cheap & {"linear, many positions", "conv 2d", "grouped", "embedding, many tokens"}


@all_pieces
def test_columns_of_any_channels_have_the_same_inner_products(name: str):
    piece, rows = PIECES[name]()
    each = piece.width // piece.groups
    gram = torch.zeros(N, N, dtype=torch.float64)
    for begin in range(0, piece.groups, 2):
        end = min(begin + 2, piece.groups)
        wide = torch.full((N, (end - begin) * each + 3), float("nan"), dtype=torch.float64)
        out = wide[:, 1:-2]  # a slice of a larger buffer
        piece.write_columns(begin, end, out)
        assert wide[:, 0].isnan().all() and wide[:, -2:].isnan().all()
        gram += out @ out.T
    assert relative_error(gram, rows @ rows.T) < 1e-13


@all_pieces
def test_no_examples_are_no_rows(name: str):
    piece = PIECES[name]()[0]
    none = piece.with_tensors(tuple(t[:0] for t in piece.tensors))
    assert none.rows().shape == (0, piece.width)
    assert none.norms().shape == (0,)


def test_rows_are_themselves():
    rows = randn(4, 6)
    piece = DenseGrad(rows)
    assert piece.width == piece.groups == 6
    assert torch.equal(piece.rows(), rows)
    assert relative_error(piece.norms(), rows.square().sum(1)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_positions_that_cancel_are_those_of_rows(dtype):
    """Some of the examples have positions that nearly cancel, by up to the dtype's precision."""
    a, g = randn(N, 2, 9).to(dtype), randn(N, 2, 8, seed=1).to(dtype)
    left = [1e-1, 1e-3, 0.0, torch.finfo(dtype).eps ** 0.5]
    for e, share in enumerate(left):
        a[e, 1], g[e, 1] = a[e, 0], -(1 - share) * g[e, 0]
    exact = torch.einsum("eti,eto->eoi", a.double(), g.double()).square().sum((1, 2))
    norms = OuterProductGrad(a, g).norms()
    assert norms.dtype == torch.float64 and float(norms[2]) == 0.0
    kept = [0, 1, 3, 4]
    # A row is rounded by eps of its positions, which is eps / share of itself.
    allowed = 20 * torch.finfo(dtype).eps / torch.tensor([*left[:2], left[3], 1.0])
    assert ((norms[kept] / exact[kept] - 1).abs() <= allowed).all()
