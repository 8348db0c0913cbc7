"""Products, trace probes and norms of transformers and a wide network, beside torch alone.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_transformers.py
At full size, each part alone; results go to benchmarks/results/modern-*.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_transformers.py -k vit    (or gpt, resnet18)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounds import FULL, difference, store, table, take_turns
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import resnet18
from transformers_networks import GPT, ViT

import entropic_fast as ef

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]
PLAIN = "plain gradient"
Loss = Callable[[Tensor, Tensor], Tensor]


def next_token(outputs: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of each next token, as "next_token" computes it."""
    return nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, str]:
    """A network, its inputs and targets, and its loss as an objective takes it."""
    torch.manual_seed(0)
    n = 32 if FULL else 2
    if name == "vit":
        model: nn.Module = ViT() if FULL else ViT(12, 1, 3, size=8)
        return (
            model,
            torch.randn(n, 3, *[32 if FULL else 8] * 2),
            torch.randint(10, (n,)),
            "cross_entropy",
        )
    if name == "gpt":
        length, words = (64, 4096) if FULL else (5, 11)
        model = GPT() if FULL else GPT(12, 1, 3, 5, 11)
        tokens = torch.randint(words, (n, length))
        return model, tokens, tokens, "next_token"
    size = 64 if FULL else 32
    model = resnet18(num_classes=10).eval()
    return model, torch.randn(n, 3, size, size), torch.randint(10, (n,)), "cross_entropy"


LOSSES: dict[str, Loss] = {
    "cross_entropy": nn.functional.cross_entropy,
    "next_token": next_token,
}


@pytest.mark.parametrize("name", ["vit", "gpt", "resnet18"])
def test_modern_networks(name: str, provenance: dict[str, Any], tmp_path: Path) -> None:
    model, x, y, kind = problem(name)
    loss, parameters = LOSSES[kind], list(model.parameters())
    values = {name: p.detach() for name, p in model.named_parameters()}
    size = sum(p.numel() for p in parameters)
    objective = ef.Objective(model, kind, (x, y))
    four, one = torch.randn(size, 4), torch.randn(size, 1)
    hessian, ggn = ef.HessianOperator(objective), ef.GGNOperator(objective)
    for _ in range(3):
        hessian @ four, ggn @ four

    def split(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.reshape(-1).split([p.numel() for p in parameters])
        return {n: part.view_as(v) for (n, v), part in zip(values.items(), parts, strict=True)}

    def at(values: dict[str, Tensor]) -> Tensor:
        return loss(functional_call(model, values, (x,)), y)

    def double_backward() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            gradient = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True)
            found = torch.autograd.grad(gradient, parameters, list(split(one).values()))
        return torch.cat([part.flatten() for part in found])

    def jvp_grad() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            found = jvp(grad(at), (values,), (split(one),))[1]
        return torch.cat([part.flatten() for part in found.values()])

    def vmap_norms(chunk: int | None = None) -> Tensor:
        def single(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(model, values, (x[None],)), y[None])

        rows = vmap(grad(single), in_dims=(None, 0, 0), chunk_size=chunk)(values, x, y)
        return sum(g.flatten(1).square().sum(1) for g in rows.values())  # type: ignore[return-value]

    # name: (what to run, results it makes)
    rivals: dict[str, tuple[Any, int]] = {
        PLAIN: (lambda: torch.autograd.grad(loss(model(x), y), parameters), 1),
        "ours, trace by 8 probes": (lambda: ef.hessian_trace(objective, probes=8), 8),
        "ours, 4 products at a fixed point": (lambda: hessian @ four, 4),
        "ours, 1 product at a new point": (lambda: ef.HessianOperator(objective) @ one, 1),
        "ours, 4 Gauss-Newton products": (lambda: ggn @ four, 4),
        "ours, norms": (lambda: ef.gradient_norms(objective), 1),
        "double backward": (double_backward, 1),
        "jvp(grad)": (jvp_grad, 1),
        "vmap(grad), norms": (vmap_norms, 1),
        "vmap(grad) by fours, norms": (lambda: vmap_norms(4), 1),
    }
    rounds = take_turns(
        {name: rival for name, (rival, _) in rivals.items()}, 7 if FULL else 1, warm_up=FULL,
        limit=300,
    )  # fmt: skip
    ours = rounds.values["ours, 1 product at a new point"].reshape(-1)
    for other in ("double backward", "jvp(grad)"):
        assert difference(ours, rounds.values[other]) < 1e-3, other
    norms = rounds.values["ours, norms"], rounds.values["vmap(grad), norms"]
    assert difference(*norms) < 1e-3
    for rival, (_, count) in rivals.items():
        rounds.seconds[rival] = [s / count for s in rounds.seconds[rival]]
    record = {
        **provenance,
        "model": name,
        "parameters": size,
        "examples": len(x),
        "method": hessian.method,
        **table(rounds, **{"plain gradients": rounds.median(PLAIN)}),
    }
    store(f"modern-{name}", record, tmp_path)
    assert hessian.method == "graph"
