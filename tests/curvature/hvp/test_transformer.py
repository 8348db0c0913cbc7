"""What transformers are made of: products and forms of the graph against double backward."""

from __future__ import annotations

import pytest
import torch
from double_backward import assert_those_of_double_backward
from torch import Tensor, nn
from torch.nn import functional

import entropic_fast as ef
from entropic_fast.curvature import autograd_only
from entropic_fast.curvature._crosscheck import FastPathMismatchError
from entropic_fast.curvature.hvp import _capture
from entropic_fast.curvature.hvp._engine import HVPEngine, interpreter_for
from entropic_fast.curvature.hvp.transformer import _attention as attention
from entropic_fast.curvature.operators import _difference_check, _second_order

WIDTH = 6


class Attention(nn.Module):
    """Scaled dot-product attention with any mask."""

    def __init__(self, heads: int = 2, mask: Tensor | None = None, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.mask, self.causal = heads, mask, causal
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, WIDTH // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.causal
        )
        return y.transpose(1, 2).reshape(x.shape)


class EagerAttention(nn.Module):
    """Attention written out, with scores scaled, masked or cut as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (p.view(n, length, 2, 3).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if self.kind == "fewer queries":
            q = q[:, :, :2]
        scores = q @ k.mT / 1.7
        if self.kind == "padding":  # hides keys of each example, never the first
            hidden = torch.where(x[:, :, 0] > 0, 0.0, -torch.inf)
            hidden = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, 1:]], 1)
            scores = scores + hidden[:, None, None]
        if self.kind == "bias of heads":
            scores = 0.5 * (torch.linspace(0, 1, 2, dtype=x.dtype).view(2, 1, 1) + scores)
        p = scores.softmax(-1)
        y = p @ v
        if self.kind == "probabilities read twice":
            y = y + p @ v.square()
        y = y.repeat(1, 1, length // y.shape[2], 1)
        return y.transpose(1, 2).reshape(x.shape)


class GroupedAttention(nn.Module):
    """Two heads of queries for one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 3)).transpose(1, 2)
        k, v = (t.unsqueeze(1) for t in self.kv(x).chunk(2, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(x.shape)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention`, by torch's fused function or, for the weights, written out."""

    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=self.need_weights)[0]


class Rows(nn.Module):
    """Softmax along any dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.linear = dim, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).softmax(self.dim)


class LowPrecision(nn.Module):
    """Layer normalization in a precision for which there are no kernels."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.bfloat16(), (WIDTH,)).to(x.dtype)


HIDDEN = torch.tensor([[False] * 4, [True] * 4, [True, False, True, False], [True] * 4])
LAYERS = {
    "attention": Attention(),
    "attention of one head": Attention(heads=1),
    "causal attention": Attention(causal=True),
    "a mask that hides all from a token": Attention(mask=HIDDEN),
    "an additive mask": Attention(mask=torch.randn(4, 4, dtype=torch.float64)),
    **{
        kind: EagerAttention(kind)
        for kind in ("scaled scores", "padding", "bias of heads", "fewer queries")
    },
    "grouped heads": GroupedAttention(),
    "multi-head attention": SelfAttention(need_weights=False),
    "multi-head attention with weights": SelfAttention(need_weights=True),
    "probabilities read twice": EagerAttention("probabilities read twice"),
    "softmax over tokens": Rows(1),
    "softmax over features": Rows(-1),
    "layer norm": nn.LayerNorm(WIDTH),
    "layer norm without weights": nn.LayerNorm(WIDTH, elementwise_affine=False),
    "layer norm without bias": nn.LayerNorm(WIDTH, bias=False),
    "layer norm of tokens": nn.LayerNorm((4, WIDTH)),
    "RMS norm": nn.RMSNorm(WIDTH),
    "GELU": nn.GELU(),
    "GELU by tanh": nn.GELU("tanh"),
    "SiLU": nn.SiLU(),
    "a layer": nn.TransformerEncoderLayer(WIDTH, 2, 7, dropout=0.0, batch_first=True),
}


def objective(layer: nn.Module, tokens: int = 4) -> ef.Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, WIDTH), layer, nn.Flatten(), nn.Linear(tokens * WIDTH, 3))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    x, y = torch.randn(5, tokens, 3, dtype=torch.float64), torch.randint(3, (5,))
    return ef.Objective(model.double(), "cross_entropy", (x, y))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_products_and_forms_are_those_of_double_backward(name: str, count: int) -> None:
    assert_those_of_double_backward(objective(LAYERS[name]), count)


FUSED = [name for name in LAYERS if "atten" in name or "mask" in name or "heads" in name]
FUSED += ["scaled scores", "padding", "fewer queries", "a layer"]


@pytest.mark.parametrize("name", FUSED)
def test_attention_of_every_kind_is_a_region(name: str) -> None:
    assert attention_regions(objective(LAYERS[name])) == 1


def test_attention_whose_probabilities_others_read_is_none() -> None:
    assert attention_regions(objective(LAYERS["probabilities read twice"])) == 0


def attention_regions(obj: ef.Objective) -> int:
    theta, inputs = obj.parameters_vector(), next(obj.batches()).inputs
    regions = interpreter_for(obj, theta, inputs)._forward_regions
    return sum(isinstance(region, attention.AttentionForward) for region in regions)


# In bytes: blocks of one query, of three queries, and of the heads of two examples.
@pytest.mark.parametrize("room", [1, 3 * 4 * 3 * 8, 3 * 4 * 4 * 4 * 8])
@pytest.mark.parametrize("name", FUSED)
def test_blocks_of_attention_of_any_size_add_up(
    name: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CPU_BLOCK", room)
    assert_those_of_double_backward(objective(LAYERS[name]), 3)


@pytest.mark.parametrize("layer", [Attention(causal=True), Rows(1), nn.LayerNorm(WIDTH)])
def test_one_token_is_enough(layer: nn.Module) -> None:
    assert_those_of_double_backward(objective(layer, tokens=1), 2)


def test_low_precision_goes_by_the_graph_too() -> None:
    obj = objective(LowPrecision())
    vectors = torch.randn(obj.num_params, 2, dtype=torch.float64)
    operator = ef.HessianOperator(obj)
    product = operator @ vectors
    assert operator.method == "graph"
    with autograd_only():
        expected = ef.HessianOperator(obj) @ vectors
    assert float((product - expected).norm()) < 0.03 * float(expected.norm())


@pytest.mark.parametrize("name", ["causal attention", "a layer", "grouped heads"])
def test_many_scores_are_compared_by_differences_and_traced_by_shapes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_difference_check, "MANY_SCORES", -1)
    monkeypatch.setattr(_capture, "LARGE", -1)
    expected = []
    for function in ("hessian_product", "ggn_product"):
        take = getattr(_second_order, function)
        monkeypatch.setattr(
            _second_order,
            function,
            lambda *given, take=take: expected.append(given) or take(*given),
        )
    obj = objective(LAYERS[name])
    assert_those_of_double_backward(obj, 2)
    assert len(expected) == 2
    for take, make in (
        (_difference_check.hessian_product, ef.HessianOperator),
        (_difference_check.ggn_product, ef.GGNOperator),
    ):
        v = torch.randn(obj.num_params, dtype=torch.float64)
        found = take(obj, obj.parameters_vector(), next(obj.batches()), v) / obj.num_examples
        torch.testing.assert_close(found, make(obj) @ v, rtol=1e-6, atol=1e-8)


def test_a_product_that_differences_do_not_give_is_compared_with_autograd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_difference_check, "MANY_SCORES", -1)
    monkeypatch.setattr(_second_order, "hessian_product", lambda *given: torch.ones_like(given[1]))
    operator = ef.HessianOperator(objective(LAYERS["causal attention"]))
    assert operator.method == "graph"


def test_a_large_model_is_compared_by_differences_in_its_own_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_difference_check, "MANY_PARAMETERS", 0)
    monkeypatch.setattr(_capture, "LARGE", -1)
    obj = objective(LAYERS["causal attention"]).cast(torch.float32)
    for kind in (ef.HessianOperator, ef.GGNOperator):
        monkeypatch.setattr(kind, "_add_products", lambda *_: pytest.fail("compared by autograd"))
    assert ef.HessianOperator(obj).method == ef.GGNOperator(obj).method == "graph"
    graph = interpreter_for(obj, obj.point(None), next(obj.batches()).inputs)
    assert not graph.has_kinks


def test_a_large_model_with_kinks_is_compared_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_difference_check, "MANY_PARAMETERS", 0)
    monkeypatch.setattr(
        _second_order, "hessian_product", lambda *_: pytest.fail("compared by differences")
    )
    obj = objective(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    assert ef.HessianOperator(obj).method == "graph"


def test_large_models_with_a_wrong_rule_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_difference_check, "MANY_PARAMETERS", 0)
    right = HVPEngine.products
    monkeypatch.setattr(HVPEngine, "products", lambda *given: 1.1 * right(*given))
    for kind in (ef.HessianOperator, ef.GGNOperator):
        with pytest.raises(FastPathMismatchError):
            _ = kind(objective(LAYERS["causal attention"]).cast(torch.float32)).method


@pytest.mark.parametrize("chosen", ["*.q.*", "*.kv.*", "0.q.weight"])
def test_attention_of_which_a_part_is_frozen(chosen: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(GroupedAttention(), nn.Linear(WIDTH, 2)).double()
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    obj = ef.Objective(model, "mse", (x, torch.randn(3, 4, 2).double()), parameters=chosen)
    assert_those_of_double_backward(obj, 2)
    v = torch.randn(obj.num_params, 2, dtype=torch.float64)
    operator = ef.HessianOperator(obj)
    assert operator.method == "graph"
    forms = operator.quadratic_forms(v)
    torch.testing.assert_close(forms, (v * (operator @ v)).sum(0), rtol=1e-9, atol=1e-10)
