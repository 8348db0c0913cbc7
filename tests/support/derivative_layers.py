# ruff: noqa: B008, B023 (functions are called before the loops that make them go on)
"""Layers, losses, distances and linear algebra of torch: the rest of what the sweep tries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from derivative_cases import FLOAT, Case, Draw, function_cases, words
from torch import Tensor, nn
from torch.nn import functional as F


def cases() -> Iterator[Case]:
    """Every case; those of one name differ in shapes."""
    yield from function_cases()
    for group in (
        _convolutions, _attention, _recurrent, _lookups, _losses, _distances, _linalg,
    ):  # fmt: skip
        yield from group(Draw())


def _convolutions(draw: Draw) -> Iterator[Case]:
    layouts = ("plain", "last", "one")
    for dims, size in ((1, (5,)), (2, (4, 4)), (3, (3, 3, 3))):
        conv, back = getattr(F, f"conv{dims}d"), getattr(F, f"conv_transpose{dims}d")
        kernel = (2,) * dims
        yield Case(f"conv{dims}d", conv, (draw(2, 2, *size), draw(3, 2, *kernel), draw(3)), layouts)
        yield Case(
            f"conv{dims}d grouped",
            lambda x, w, b, f=conv: f(x, w, b, padding=1, stride=2, groups=2),
            (draw(2, 2, *size), draw(4, 1, *kernel), draw(4)),
            layouts,
        )
        yield Case(
            f"conv{dims}d dilated",
            lambda x, w, f=conv: f(x, w, dilation=2, padding="same"),
            (draw(1, 2, *size), draw(2, 2, *kernel)),
        )
        yield Case(
            f"conv_transpose{dims}d",
            lambda x, w, b, f=back: f(x, w, b, stride=2, padding=1),
            (draw(2, 2, *size), draw(2, 2, *kernel), draw(2)),
            layouts,
        )
        yield Case(
            f"conv_transpose{dims}d grouped",
            lambda x, w, b, f=back: f(x, w, b, groups=2),
            (draw(1, 2, *size), draw(2, 2, *kernel), draw(4)),
        )
    yield Case("conv_tbc", torch.conv_tbc, (draw(4, 2, 3), draw(2, 3, 2), draw(2)))
    yield Case("linear", F.linear, (draw(2, 3), draw(4, 3), draw(4)))
    yield Case("bilinear", F.bilinear, (draw(2, 3), draw(2, 4), draw(2, 3, 4), draw(2)))
    yield Case("einsum", lambda a, b: torch.einsum("ij,jk->ik", a, b), (draw(2, 3), draw(3, 2)))
    yield Case("einsum of three", _three, (draw(2, 3), draw(3, 2), draw(2, 2)))
    yield Case("baddbmm", torch.baddbmm, (draw(2, 3, 2), draw(2, 3, 4), draw(2, 4, 2)))
    yield Case("addmv", torch.addmv, (draw(3), draw(3, 2), draw(2)))
    yield Case("cross", torch.linalg.cross, (draw(2, 3), draw(2, 3)))
    yield Case("kron", torch.kron, (draw(2, 2), draw(2, 2)))


def _three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.einsum("ij,jk,kl->il", a, b, c)


def module_case(name: str, make: Callable[[], nn.Module], x: Tensor, call: Any = None) -> Case:
    """A module as a function of its input and parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().to(FLOAT).eval()
        values = {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in module.named_parameters()}
    names = list(values)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        found = torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x,) if call is None else call(x)
        )
        return found if isinstance(found, Tensor) else found[0]

    return Case(name, function, (x, *values.values()))


def _attention(draw: Draw) -> Iterator[Case]:
    q, k, v = draw(1, 2, 3, 4), draw(1, 2, 3, 4), draw(1, 2, 3, 4)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    attend = F.scaled_dot_product_attention
    yield Case("scaled_dot_product_attention", attend, (q, k, v))
    yield Case(
        "scaled_dot_product_attention causal", lambda *t: attend(*t, is_causal=True), (q, k, v)
    )
    yield Case(
        "scaled_dot_product_attention bias",
        lambda q, k, v, m: attend(q, k, v, attn_mask=m),
        (q, k, v, draw(3, 3)),
    )
    yield Case(
        "scaled_dot_product_attention mask", lambda *t: attend(*t, attn_mask=mask), (q, k, v)
    )
    x = draw(2, 3, 4)
    yield module_case(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        x,
        lambda x: (x, x, x),
    )
    yield module_case(
        "TransformerEncoderLayer",
        lambda: nn.TransformerEncoderLayer(4, 2, 5, activation="gelu", batch_first=True),
        x,
    )
    yield module_case(
        "TransformerEncoderLayer norm first",
        lambda: nn.TransformerEncoderLayer(4, 2, 5, activation=F.silu, norm_first=True),
        x,
    )
    yield module_case(
        "TransformerDecoderLayer",
        lambda: nn.TransformerDecoderLayer(4, 2, 5, activation="gelu"),
        x,
        lambda x: (x, x.sin()),
    )


def _recurrent(draw: Draw) -> Iterator[Case]:
    for layer in (nn.RNN, nn.LSTM, nn.GRU):
        yield module_case(layer.__name__, lambda c=layer: c(2, 2), draw(3, 2, 2))
        yield module_case(
            f"{layer.__name__} both ways",
            lambda c=layer: c(2, 2, num_layers=2, bidirectional=True, batch_first=True),
            draw(1, 2, 2),
        )
    yield module_case("LSTM projected", lambda: nn.LSTM(2, 3, proj_size=2), draw(3, 1, 2))
    for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        yield module_case(cell.__name__, lambda c=cell: c(3, 2), draw(2, 3))


def _lookups(draw: Draw) -> Iterator[Case]:
    index = torch.tensor([[0, 2, 2], [1, 0, 1]])
    yield Case("embedding", lambda w: F.embedding(index, w), (draw(3, 2),))
    yield Case("embedding padded", lambda w: F.embedding(index, w, padding_idx=3), (draw(4, 2),))
    for mode in ("mean", "sum", "max"):
        yield Case(
            f"embedding_bag {mode}",
            lambda w, m=mode: F.embedding_bag(index, w, mode=m),
            (draw(3, 2),),
        )
    yield Case(
        "embedding_bag weights",
        lambda w, s: F.embedding_bag(index, w, mode="sum", per_sample_weights=s),
        (draw(3, 2), draw(2, 3)),
    )


def _losses(draw: Draw) -> Iterator[Case]:
    labels = torch.tensor([0, 2, 1])
    x, y = draw(3, 4), draw(3, 4)
    p, q = draw.positive(3, 4), draw.positive(3, 4)
    weight = draw.positive(4)
    for reduction in ("none", "mean"):
        r = {"reduction": reduction}
        mark = "" if reduction == "none" else " mean"
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss"):
            yield Case(f"{name}{mark}", lambda a, b, f=getattr(F, name), r=r: f(a, b, **r), (x, y))
        if reduction == "none":  # its mean warns that it is none
            yield Case("kl_div", lambda a, b: F.kl_div(a, b, reduction="none"), (x, p))
        yield Case(
            f"binary_cross_entropy{mark}",
            lambda a, b, r=r: F.binary_cross_entropy(a, b, weight, **r),
            (p, q),
        )
        yield Case(
            f"binary_cross_entropy_with_logits{mark}",
            lambda a, b, r=r: F.binary_cross_entropy_with_logits(a, b, pos_weight=weight, **r),
            (x, q),
        )
        yield Case(
            f"cross_entropy{mark}", lambda a, r=r: F.cross_entropy(a, labels, weight, **r), (x,)
        )
        yield Case(
            f"cross_entropy smoothed{mark}",
            lambda a, r=r: F.cross_entropy(a, labels, label_smoothing=0.1, **r),
            (x,),
        )
        yield Case(
            f"cross_entropy soft{mark}", lambda a, b, r=r: F.cross_entropy(a, b, **r), (x, p)
        )
        yield Case(
            f"nll_loss{mark}", lambda a, r=r: F.nll_loss(a.log_softmax(1), labels, **r), (x,)
        )
        yield Case(
            f"nll_loss of images{mark}",
            lambda a, r=r: F.nll_loss(a, labels[:, None, None], **r),
            (draw(3, 4, 1, 1),),
        )
        yield Case(
            f"gaussian_nll_loss{mark}",
            lambda a, b, v, r=r: F.gaussian_nll_loss(a, b, v, **r),
            (x, y, p),
        )
        yield Case(
            f"multi_margin_loss{mark}",
            lambda a, r=r: F.multi_margin_loss(a, labels, p=2, **r),
            (x,),
        )
        many = torch.tensor([[0, 2, -1, -1], [1, -1, 0, 0], [3, 2, 1, -1]])
        yield Case(
            f"multilabel_margin_loss{mark}",
            lambda a, r=r: F.multilabel_margin_loss(a, many, **r),
            (x,),
        )
        yield Case(
            f"multilabel_soft_margin_loss{mark}",
            lambda a, b, r=r: F.multilabel_soft_margin_loss(a, b, **r),
            (x, q),
        )
        signs = torch.tensor([[1.0, -1, 1, -1]], dtype=FLOAT).expand(3, 4)
        yield Case(
            f"soft_margin_loss{mark}", lambda a, r=r: F.soft_margin_loss(a, signs, **r), (x,)
        )
        yield Case(
            f"hinge_embedding_loss{mark}",
            lambda a, r=r: F.hinge_embedding_loss(a, signs, **r),
            (x,),
        )
        yield Case(
            f"margin_ranking_loss{mark}",
            lambda a, b, r=r: F.margin_ranking_loss(a, b, signs, **r),
            (x, y),
        )
        yield Case(
            f"cosine_embedding_loss{mark}",
            lambda a, b, r=r: F.cosine_embedding_loss(a, b, signs[:, 0], **r),
            (x, y),
        )
        yield Case(
            f"triplet_margin_loss{mark}",
            lambda a, b, c, r=r: F.triplet_margin_loss(a, b, c, **r),
            (x, y, draw(3, 4)),
        )
        yield Case(
            f"triplet_margin_with_distance_loss{mark}",
            lambda a, b, c, r=r: F.triplet_margin_with_distance_loss(a, b, c, **r),
            (x, y, draw(3, 4)),
        )
        lengths = torch.tensor([4, 3]), torch.tensor([2, 1])
        yield Case(
            f"ctc_loss{mark}",
            lambda a, r=r: F.ctc_loss(
                a.log_softmax(2), torch.tensor([[1, 2], [2, 2]]), *lengths, **r
            ),
            (draw(4, 2, 3),),
        )
    if hasattr(F, "linear_cross_entropy"):  # torch 2.14
        yield Case(
            "linear_cross_entropy",
            lambda a, w: F.linear_cross_entropy(a, w, labels),
            (x, draw(5, 4)),
        )
    yield module_case(
        "AdaptiveLogSoftmaxWithLoss",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2),
        x,
        lambda x: (x, torch.tensor([0, 2, 5])),
    )


def _distances(draw: Draw) -> Iterator[Case]:
    x, y = draw(3, 4), draw(3, 4)
    yield Case("cosine_similarity", F.cosine_similarity, (x, y))
    for p in (1, 2, 3):
        yield Case(f"pairwise_distance {p}", lambda a, b, p=p: F.pairwise_distance(a, b, p), (x, y))
        yield Case(f"cdist {p}", lambda a, b, p=p: torch.cdist(a, b, p), (x, draw(2, 4)))
        yield Case(f"pdist {p}", lambda a, p=p: F.pdist(a, p), (x,))
        yield Case(f"dist {p}", lambda a, b, p=p: torch.dist(a, b, p), (x, y))
    for mode in ("use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"):
        yield Case(
            f"cdist 2 {mode}", lambda a, b, m=mode: torch.cdist(a, b, compute_mode=m), (x, y)
        )
    yield Case("cdist 2 itself", lambda a: torch.cdist(a, a + 1), (x,))


def _linalg(draw: Draw) -> Iterator[Case]:
    a = torch.eye(3, dtype=FLOAT) * 2 + 0.3 * draw(3, 3)
    b = draw(3, 2)
    spd = a @ a.T
    linalg = torch.linalg
    for name in words("det slogdet inv matrix_norm pinv cholesky matrix_exp eigvalsh svdvals"):
        if name == "slogdet":
            yield Case(name, lambda m: linalg.slogdet(m).logabsdet, (a,))
        elif name in ("cholesky", "eigvalsh"):
            yield Case(name, lambda m, f=getattr(linalg, name): f(m @ m.T), (a,))
        else:
            yield Case(name, getattr(linalg, name), (a,))
    yield Case("det of several", linalg.det, (torch.stack([a, spd]),))
    yield Case("logdet", lambda m: torch.logdet(m @ m.T), (a,))
    yield Case("solve", linalg.solve, (a, b))
    yield Case(
        "solve_triangular", lambda m, b: linalg.solve_triangular(m.tril(), b, upper=False), (a, b)
    )
    yield Case("cholesky_solve", lambda m, b: torch.cholesky_solve(b, m.tril()), (a, b))
    yield Case("cholesky_inverse", lambda m: torch.cholesky_inverse(m.tril()), (a,))
    yield Case("lstsq", lambda m, b: linalg.lstsq(m, b).solution, (draw(4, 2), draw(4, 1)))
    yield Case("qr", lambda m: linalg.qr(m).Q, (a,))
    yield Case("svd", lambda m: linalg.svd(m, full_matrices=False)[0].square(), (a,))
    yield Case("eigh", lambda m: linalg.eigh(m @ m.T)[1].square(), (a,))
    yield Case("matrix_power", lambda m: linalg.matrix_power(m, 3), (a,))
    yield Case("matrix_power -1", lambda m: linalg.matrix_power(m, -1), (a,))
    yield Case("nuclear norm", lambda m: linalg.matrix_norm(m, "nuc"), (a,))
    yield Case("spectral norm", lambda m: linalg.matrix_norm(m, 2), (a,))
    yield Case("lu_solve", lambda m, b: linalg.lu_solve(*linalg.lu_factor(m), b), (a, b))
    yield Case("householder_product", linalg.householder_product, (draw(3, 2), draw(2)))
    yield Case("eigvals", lambda m: linalg.eigvals(m @ m.T).real.sort().values, (a,))
    yield Case("multi_dot", lambda m, b: linalg.multi_dot([m, m, b]), (a, b))
    yield Case("trace", torch.trace, (a,))
