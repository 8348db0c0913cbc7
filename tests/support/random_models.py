"""Small random models with data, each a function of its seed, for tests of exactness.

A model is a stem, a few pieces (`random_pieces` and the modules beside it), some of them in
residual blocks or in branches, and a head. The oracle is one ordinary backward pass an example
of the plain module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from random_images import IMAGE
from random_pieces import Apply, Draw, Made, Shape, settle
from random_rows import ROWS, linear
from random_sequences import SEQUENCE
from torch import Tensor, nn

from entropic_fast.objective import Objective

MOST_FEATURES = 160  # of one example between two pieces
Loss = str | Callable[[Tensor, Tensor], Tensor]

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class RandomCase:
    """A model in evaluation mode, its loss and data; float64."""

    seed: int
    model: nn.Module
    loss: Loss
    inputs: Tensor  # [N, ...]
    targets: Tensor  # [N, ...]
    batches: tuple[int, ...]  # the sizes they are given in
    kinds: frozenset[str]

    def objective(self, dtype: torch.dtype = torch.float64) -> Objective:
        model = copy.deepcopy(self.model).to(dtype)
        if len(self.batches) == 1:
            data: Any = (self.inputs, self.targets)
            return Objective(model, self.loss, data, batch_size=self.batches[0])
        parts = zip(self.inputs.split(self.batches), self.targets.split(self.batches), strict=True)
        return Objective(model, self.loss, list(parts))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def rounding(self) -> float:
        """How far `scores` move when every parameter moves by a unit of its last place.

        What cancels to almost nothing (behind a scale of 0, or at a loss of almost 0) has the error
        of what cancels, not of what is left.
        """
        moved = copy.deepcopy(self.model)
        with torch.no_grad():
            for p in moved.parameters():
                p.mul_(1 + EPS)
        other = replace(self, model=moved)
        return float((other.scores() - self.scores()).norm())

    def scores(self) -> Tensor:
        """One ordinary backward pass an example.  # [N, P]

        The example twice, to be exact: torch's batch normalization (2.13 and 2.15, CPU) returns
        a wrong gradient for one image alone if the gradient arrives with its channels last.
        """
        parameters, rows = list(self.named_parameters().values()), []
        for x, y in zip(self.inputs, self.targets, strict=True):
            pair = torch.stack([x, x])
            loss = plain_loss(self.loss)(self.model(pair), torch.stack([y, y]))
            gradients = torch.autograd.grad(
                loss, parameters, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([g.reshape(-1) for g in gradients]))
        return torch.stack(rows)


def log_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that the library does not know.  # [N]"""
    return torch.log1p((outputs - targets).square()).flatten(1).sum(1)


def plain_loss(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss by torch's own functions."""
    if loss == "cross_entropy":
        return F.cross_entropy
    if loss == "mse":
        return F.mse_loss
    assert callable(loss)
    return lambda outputs, targets: loss(outputs, targets).mean()


def random_case(seed: int) -> RandomCase:
    """The case of a seed; the same at every call."""
    draw = Draw(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, shape, out, vocabulary = random_network(draw)
        examples = draw.whole(1, 7)
        if draw.fold is not None and draw.chance(0.5):
            draw.note("as many examples as positions")
            examples = draw.fold
        if vocabulary:
            inputs = torch.randint(0, vocabulary, (examples, *shape))
        else:
            inputs = torch.randn(examples, *shape, dtype=torch.float64)
            if len(shape) == 3 and draw.chance(0.3):
                draw.note("channels-last inputs")
                inputs = inputs.contiguous(memory_format=torch.channels_last)
        loss, targets = _loss(draw, examples, out)
    return RandomCase(
        seed, model, loss, inputs, targets, _batches(draw, examples), frozenset(draw.kinds)
    )


def random_network(draw: Draw) -> tuple[nn.Module, Shape, Shape, int]:
    """A model, the shapes of one input and one output, and the vocabulary (0 for numbers)."""
    model, shape, out, vocabulary = _model(draw)
    if not any(p.requires_grad for p in model.parameters()):
        draw.note("a layer added, as nothing was trained")
        model = nn.Sequential(model, nn.Linear(out[-1], out[-1]))
    settle(model)
    return model.double().eval(), shape, out, vocabulary


def _loss(draw: Draw, examples: int, out: Shape) -> tuple[Loss, Tensor]:
    name: Loss = draw.one("cross_entropy", "cross_entropy", "mse", log_distance)
    draw.note(f"loss: {name if isinstance(name, str) else 'custom'}")
    if name == "cross_entropy":
        if len(out) > 1:
            draw.note("cross_entropy at many positions")
        return name, torch.randint(0, out[0], (examples, *out[1:]))
    return name, torch.randn(examples, *out, dtype=torch.float64)


def _batches(draw: Draw, examples: int) -> tuple[int, ...]:
    if examples > 1 and draw.chance(0.2):
        draw.note("ragged batches")
        first = draw.whole(1, examples - 1)
        sizes = [first, examples - first]
        if draw.chance(0.4):
            draw.note("an empty batch")
            sizes.insert(draw.whole(0, 2), 0)
        return tuple(sizes)
    return (draw.whole(1, examples + 2),)


def _model(draw: Draw) -> tuple[nn.Module, Shape, Shape, int]:
    kind = draw.one(
        "vectors", "images", "images", "images", "sequences", "sequences", "grids", "tokens"
    )
    draw.note(kind)
    vocabulary, modules = 0, list[nn.Module]()
    if kind == "vectors":
        shape: Shape = (draw.width(),)
    elif kind == "images":
        axes = draw.whole(1, 3)
        sizes = {1: (4, 12), 2: (3, 7), 3: (3, 4)}[axes]
        shape = (draw.whole(1, 6), *(draw.whole(*sizes) for _ in range(axes)))
    elif kind == "sequences":
        shape = (draw.whole(2, 5), draw.whole(4, 6))
    elif kind == "grids":
        shape = (draw.whole(1, 3), draw.whole(2, 3), draw.width())
    else:
        shape = (draw.whole(2, 5),)
        vocabulary = draw.whole(5, 9)
    entry, features = shape, shape
    table: nn.Embedding | None = None
    if vocabulary:
        stem, features = _embedding(draw, shape, vocabulary)
        table = stem if isinstance(stem, nn.Embedding) else None
        modules.append(stem)
    images = kind == "images"
    for _ in range(draw.whole(2, 5)):
        module, features = _piece(draw, features, images)
        modules.append(module)
        if prod(features) > MOST_FEATURES:
            module, features = _smaller(draw, features, images)
            modules.append(module)
        if images and draw.chance(0.15):
            images = False
            module, features = _to_rows(draw, features)
            modules.append(module)
    if draw.chance(0.15):
        draw.note("unused module")
        modules.append(Apply(lambda m, x: x, nn.Linear(2, 2)))
    if table is not None and len(features) == 2 and draw.chance(0.6):
        draw.note("output tied to the embedding")
        return *_tied_head(modules, table, entry, features), vocabulary
    module, out = _head(draw, features, images)
    return nn.Sequential(*modules, *module), entry, out, vocabulary


def _embedding(draw: Draw, shape: Shape, vocabulary: int) -> Made:
    d = draw.whole(4, 6)
    if draw.chance(0.3):
        mode = draw.one("sum", "mean", "max")
        draw.note("EmbeddingBag")
        return nn.EmbeddingBag(vocabulary, d, mode=mode), (d,)
    draw.note("Embedding")
    padding = draw.one(None, 0, vocabulary - 1)
    if padding is not None:
        draw.note("Embedding with padding_idx")
    return nn.Embedding(vocabulary, d, padding_idx=padding), (*shape, d)


def _piece(draw: Draw, shape: Shape, images: bool, depth: int = 0) -> Made:
    if depth < 2 and draw.chance(0.2):
        return _block(draw, shape, images, depth + 1)
    if images:
        return draw.one(*IMAGE)(draw, shape)
    if len(shape) == 2 and draw.chance(0.5):
        return draw.one(*SEQUENCE)(draw, shape)
    return draw.one(*ROWS)(draw, shape)


def _block(draw: Draw, shape: Shape, images: bool, depth: int) -> Made:
    """A residual block that adds and activates in place, or branches side by side."""
    inner, after = _piece(draw, shape, images, depth)
    other, beside = _piece(draw, shape, images, depth)
    if after == shape:
        draw.note("residual in place")
        return Apply(_residual, inner), shape
    axis = 1 if images else -1
    flat = (after[1:], beside[1:]) if images else (after[:-1], beside[:-1])
    if flat[0] == flat[1]:
        draw.note("branches concatenated")
        total = after[0] + beside[0] if images else after[-1] + beside[-1]
        out = (total, *after[1:]) if images else (*after[:-1], total)
        return Apply(lambda m, x: torch.cat([m[0](x), m[1](x)], axis), inner, other), out
    draw.note("branches gated")
    gate = Apply(
        lambda m, x: (
            m[0](x) * torch.sigmoid(m[1](x).flatten(1).mean(1)).view(-1, *[1] * len(after))
        ),
        inner,
        other,
    )
    return gate, after


def _residual(m: Any, x: Tensor) -> Tensor:
    h = m[0](x) * 1.0  # not the layer's own output, which it may have kept
    h += x
    return torch.relu_(h) if len(x.shape) % 2 else h


def _smaller(draw: Draw, shape: Shape, images: bool) -> Made:
    if not images:
        return linear(draw, shape)
    channels, *sizes = shape
    axes = len(sizes)
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[axes]
    size = [min(s, {1: 9, 2: 4, 3: 3}[axes]) for s in sizes]
    return pool(size), (channels, *size)


def _to_rows(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    if draw.chance(0.5):
        draw.note("image to sequence")
        return Apply(lambda m, x: x.flatten(2).transpose(1, 2)), (prod(sizes), channels)
    draw.note("image to grid")
    return Apply(lambda m, x: x.movedim(1, -1)), (*sizes, channels)


def _head(draw: Draw, shape: Shape, images: bool) -> tuple[list[nn.Module], Shape]:
    """The way to outputs: flattened, averaged, at every position, or none."""
    classes = draw.whole(2, 4)
    kind = draw.one("flattened", "averaged", "averaged", "positions", "no head")
    width = shape[0] if images else shape[-1]
    if kind == "no head" and shape[0] > 1:
        draw.note("no head")
        return [], shape
    if kind == "positions" and len(shape) == 2 and not images:
        draw.note("head at every position")
        linear = nn.Linear(width, classes)
        return [Apply(lambda m, x: m[0](x).transpose(1, 2), linear)], (classes, shape[0])
    if kind == "flattened" and prod(shape) <= 100:
        return [nn.Flatten(), nn.Linear(prod(shape), classes)], (classes,)
    if images:
        pooled: nn.Module = Apply(lambda m, x: x.flatten(2).mean(2))
    else:
        pooled = Apply(lambda m, x: x.flatten(1, -2).mean(1) if x.ndim > 2 else x)
    return [pooled, nn.Linear(width, classes)], (classes,)


def _tied_head(
    modules: list[nn.Module], table: nn.Embedding, entry: Shape, shape: Shape
) -> tuple[nn.Module, Shape, Shape]:
    """Scores of the vocabulary by the embedding itself, as language models have them."""
    to_width = nn.Linear(shape[-1], table.embedding_dim)
    body = nn.Sequential(*modules, to_width)
    head = Apply(lambda m, x: F.linear(m[0](x), m[0][0].weight).mean(1), body)
    return head, entry, (table.num_embeddings,)
