"""Random losses: every name, torch's own with their reductions, losses of a user's own.

Each comes with its terms by a function of torch without reduction, from which the oracle computes
the loss of each example: none of it shares code with the library's closed forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from random_pieces import Draw, Shape
from torch import Tensor, nn

Terms = Callable[[Any, Any], Tensor]
IGNORED = -100


@dataclass(frozen=True)
class RandomLoss:
    """A loss as an objective takes it, with its targets and its terms."""

    given: Any
    targets: Callable[[int, Shape], Any]  # (examples, shape of one output)
    terms: Terms  # [n, ...]
    reduction: str = "none"
    count: Callable[[Any, Tensor], float] | None = None  # what torch's mean divides by
    squash: Callable[[Tensor], Tensor] | None = None  # outputs that it takes
    parts: int = 1  # outputs that it takes
    # For the Gauss-Newton matrix of a loss of log-probabilities, which is that of their scores.
    of_scores: Terms | None = None

    def total(self, outputs: Any, targets: Any) -> float:
        """What the mean over the data divides by, for one batch."""
        terms = self.terms(outputs, targets)
        return float(terms.numel()) if self.count is None else float(self.count(targets, terms))

    def example_losses(self, outputs: Any, targets: Any, count: int, total: float) -> Tensor:
        """The loss of each example, of so many with this divisor in all.  # [n]"""
        terms = self.terms(outputs, targets)
        terms = terms if terms.ndim == 1 else terms.flatten(1)
        if self.reduction == "none":
            return terms if terms.ndim == 1 else terms.mean(1)
        sums = terms if terms.ndim == 1 else terms.sum(1)
        return sums * (count if self.reduction == "sum" else count / total)


def random_loss(draw: Draw, shape: Shape) -> RandomLoss:
    """A loss for outputs of this shape, one example's."""
    kinds = [*[_pointwise] * 5, _named_pointwise, _named_pointwise, _own]
    if shape[0] > 1:
        kinds += [_cross_entropy] * 4 + [_named_cross_entropy, _negative_log_likelihood]
    if len(shape) == 1 and shape[0] > 1:
        kinds += [_margins] * 2
    if len(shape) == 1:
        kinds += [_several] * 2
    if len(shape) == 2 and min(shape) > 1:
        kinds += [_next_token] * 6
    return draw.one(*kinds)(draw, shape)


def _reduction(draw: Draw) -> str:
    reduction = draw.one("mean", "mean", "sum", "none")
    draw.note(f"reduction {reduction}")
    return reduction


def _numbers(n: int, shape: Shape) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64)


def _labels(n: int, shape: Shape) -> Tensor:
    return torch.randint(0, shape[0], (n, *shape[1:]))


def _bits(n: int, shape: Shape) -> Tensor:
    return torch.randint(0, 2, (n, *shape)).double()


def _unit(n: int, shape: Shape) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def _named_pointwise(draw: Draw, shape: Shape) -> RandomLoss:
    name = draw.one("mse", "bce")
    draw.note(f"loss: {name}")
    if name == "mse":
        return RandomLoss("mse", _numbers, partial(F.mse_loss, reduction="none"))
    terms = partial(F.binary_cross_entropy_with_logits, reduction="none")
    return RandomLoss("bce", draw.one(_bits, _unit), terms, "mean")


def _pointwise(draw: Draw, shape: Shape) -> RandomLoss:
    """One term per output."""
    reduction = _reduction(draw)
    kind = draw.one(
        "MSELoss", "BCEWithLogitsLoss", "BCEWithLogitsLoss", "HuberLoss", "SmoothL1Loss", "L1Loss",
        "PoissonNLLLoss", "KLDivLoss", "SoftMarginLoss", "BCELoss",
    )  # fmt: skip
    draw.note(f"loss: nn.{kind}")
    targets, squash, options = _numbers, None, dict[str, Any]()
    if kind == "BCEWithLogitsLoss":
        targets = draw.one(_bits, _unit)
        for name in ("weight", "pos_weight"):
            if draw.chance(0.4):
                draw.note(f"{name} of outputs")
                options[name] = torch.rand(shape[-1], dtype=torch.float64) + 0.5
    elif kind == "BCELoss":
        targets, squash = _bits, torch.sigmoid
    elif kind == "HuberLoss":
        options["delta"] = draw.one(1.0, 0.3)
    elif kind == "SmoothL1Loss":
        options["beta"] = draw.one(1.0, 0.3)
    elif kind == "SoftMarginLoss":
        targets = lambda n, shape: 2 * _bits(n, shape) - 1  # noqa: E731
    elif kind == "PoissonNLLLoss":
        logs = draw.chance(0.5)
        squash = torch.tanh if logs else F.softplus
        options.update(log_input=logs, full=draw.chance(0.5))
        targets = lambda n, shape: 3 * _unit(n, shape)  # noqa: E731
    elif kind == "KLDivLoss":
        targets, logs = _unit, draw.chance(0.3)
        options["log_target"] = logs
        if reduction == "mean" and draw.chance(0.5):
            reduction = "batchmean"
            draw.note("reduction batchmean")
    loss = getattr(nn, kind)(reduction=reduction, **options)
    terms = getattr(nn, kind)(reduction="none", **options)
    given: Any = loss
    if kind == "HuberLoss" and draw.chance(0.4):
        draw.note("a function of torch.nn.functional")
        given = partial(F.huber_loss, reduction=reduction, **options)
    elif kind == "MSELoss" and reduction == "mean" and draw.chance(0.4):
        draw.note("a function of torch.nn.functional")
        given = F.mse_loss
    if reduction == "batchmean":
        return RandomLoss(given, targets, terms, "mean", lambda t, _: len(t), squash)
    return RandomLoss(given, targets, terms, reduction, None, squash)


def _named_cross_entropy(draw: Draw, shape: Shape) -> RandomLoss:
    draw.note("loss: cross_entropy")
    targets = _labels
    if draw.chance(0.3):
        draw.note("probabilities as targets")
        targets = _probabilities
    return RandomLoss("cross_entropy", targets, partial(F.cross_entropy, reduction="none"))


def _probabilities(n: int, shape: Shape) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64).softmax(1)


def _cross_entropy(draw: Draw, shape: Shape) -> RandomLoss:
    draw.note("loss: nn.CrossEntropyLoss")
    reduction, options = _reduction(draw), dict[str, Any]()
    soft = draw.chance(0.25)
    if draw.chance(0.5):
        draw.note("class weights")
        options["weight"] = torch.rand(shape[0], dtype=torch.float64) + 0.2
    if draw.chance(0.3):
        draw.note("label smoothing")
        options["label_smoothing"] = draw.one(0.1, 0.4)
    ignored = None
    if not soft and draw.chance(0.6):
        ignored = draw.one(IGNORED, IGNORED, 0)
        draw.note("ignored labels")
        options["ignore_index"] = ignored
    targets = _probabilities if soft else partial(_some_ignored, ignored)
    if soft:
        draw.note("probabilities as targets")
    if len(shape) > 1:
        draw.note("cross_entropy at many positions")
    count = partial(_counted, options.get("weight"), IGNORED if ignored is None else ignored)
    given: Any = nn.CrossEntropyLoss(reduction=reduction, **options)
    if draw.chance(0.3):
        draw.note("a function of torch.nn.functional")
        given = partial(F.cross_entropy, reduction=reduction, **options)
        if not options and reduction == "mean":
            given = F.cross_entropy
    terms = partial(F.cross_entropy, reduction="none", **options)
    return RandomLoss(given, targets, terms, reduction, count)


def _some_ignored(ignored: int | None, n: int, shape: Shape) -> Tensor:
    """Labels, some of them ignored; the first is not, so that something counts."""
    labels = _labels(n, shape)
    if ignored is not None:
        first = labels.flatten()[0].clone()
        labels[torch.rand(labels.shape) < 0.3] = ignored
        labels.view(-1)[0] = first if first != ignored else 1
    return labels


def _counted(weight: Tensor | None, ignored: int, targets: Tensor, terms: Tensor) -> float:
    if targets.is_floating_point():
        return terms.numel()
    counted = targets[targets != ignored]
    return counted.numel() if weight is None else float(weight[counted].sum())


def _negative_log_likelihood(draw: Draw, shape: Shape) -> RandomLoss:
    draw.note("loss: nn.NLLLoss")
    reduction = _reduction(draw)
    weight = torch.rand(shape[0], dtype=torch.float64) + 0.2 if draw.chance(0.4) else None
    given = nn.NLLLoss(weight, reduction=reduction)
    terms = partial(F.nll_loss, weight=weight, reduction="none")
    count = partial(_counted, weight, IGNORED)
    targets = partial(_some_ignored, draw.one(None, IGNORED))
    of_scores = partial(F.cross_entropy, weight=weight, reduction="none")
    squash = partial(torch.log_softmax, dim=1)
    return RandomLoss(given, targets, terms, reduction, count, squash, of_scores=of_scores)


def _margins(draw: Draw, shape: Shape) -> RandomLoss:
    reduction = _reduction(draw)
    kind = draw.one("MultiMarginLoss", "MultiLabelSoftMarginLoss", "MultiLabelMarginLoss")
    draw.note(f"loss: nn.{kind}")
    if kind == "MultiMarginLoss":
        return RandomLoss(
            nn.MultiMarginLoss(margin=0.7, reduction=reduction), _labels, _margin, reduction
        )
    if kind == "MultiLabelMarginLoss":
        given = nn.MultiLabelMarginLoss(reduction=reduction)
        return RandomLoss(given, _label_lists, _label_margin, reduction)
    given, terms = (nn.MultiLabelSoftMarginLoss(reduction=r) for r in (reduction, "none"))
    return RandomLoss(given, _bits, terms, reduction)


def _margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """By its formula, as torch has one derivative of it."""
    rows = []
    for out, label in zip(outputs, labels.tolist(), strict=True):
        others = [out[j] for j in range(len(out)) if j != label]
        rows.append(torch.stack([F.relu(0.7 - out[label] + o) for o in others]).sum() / len(out))
    return torch.stack(rows) if rows else outputs.new_zeros(0)


def _label_margin(outputs: Tensor, labels: Tensor) -> Tensor:
    rows = []
    for out, row in zip(outputs, labels.tolist(), strict=True):
        mine = row[: row.index(-1)] if -1 in row else row
        others = [j for j in range(len(out)) if j not in mine]
        gaps = [F.relu(1 - out[i] + out[j]) for i in mine for j in others]
        rows.append(torch.stack([*gaps, 0 * out[0]]).sum() / len(out))
    return torch.stack(rows) if rows else outputs.new_zeros(0)


def _label_lists(n: int, shape: Shape) -> Tensor:
    rows = torch.full((n, shape[0]), -1)
    for row in rows:
        some = torch.randperm(shape[0])[: torch.randint(1, shape[0] + 1, ())]
        row[: len(some)] = some
    return rows


def _several(draw: Draw, shape: Shape) -> RandomLoss:
    """Losses of torch's that take several outputs."""
    reduction = _reduction(draw)
    kind = draw.one(
        "GaussianNLLLoss", "GaussianNLLLoss", "CosineEmbeddingLoss", "TripletMarginLoss"
    )
    draw.note(f"loss: nn.{kind}")
    if kind == "GaussianNLLLoss":
        full = draw.chance(0.5)
        terms = nn.GaussianNLLLoss(reduction="none", full=full)
        return RandomLoss(
            nn.GaussianNLLLoss(reduction=reduction, full=full), _numbers,
            lambda out, t: terms(out[0], t, out[1]), reduction, parts=2,
        )  # fmt: skip
    if kind == "CosineEmbeddingLoss":
        cosine = nn.CosineEmbeddingLoss(0.1, reduction="none")
        return RandomLoss(
            nn.CosineEmbeddingLoss(0.1, reduction=reduction),
            lambda n, shape: 2 * torch.randint(0, 2, (n,)) - 1,
            lambda out, t: cosine(out[0], out[1], t), reduction, parts=2,
        )  # fmt: skip
    triplet = nn.TripletMarginLoss(2.0, reduction="none")
    return RandomLoss(
        nn.TripletMarginLoss(2.0, reduction=reduction), lambda n, shape: torch.zeros(n),
        lambda out, t: triplet(*out), reduction, parts=3,
    )  # fmt: skip


def _next_token(draw: Draw, shape: Shape) -> RandomLoss:
    """Outputs [N, T, V] with tokens [N, T]."""
    draw.note("loss: next_token")

    def targets(n: int, shape: Shape) -> Tensor:
        tokens = torch.randint(0, shape[1], (n, shape[0]))
        first = tokens[0, 1].clone()
        tokens[torch.rand(tokens.shape) < 0.2] = IGNORED
        tokens[0, 1] = first  # so that one counts
        return tokens

    def terms(outputs: Tensor, tokens: Tensor) -> Tensor:
        scores, after = outputs[:, :-1].transpose(1, 2), tokens[:, 1:]
        return F.cross_entropy(scores, after, reduction="none", ignore_index=IGNORED)

    return RandomLoss(
        "next_token", targets, terms, "mean", lambda t, _: (t[:, 1:] != IGNORED).sum()
    )


def _own(draw: Draw, shape: Shape) -> RandomLoss:
    """Losses that the library does not know, some with targets of several parts."""
    kind = draw.one("distance", "weighted examples", "quantiles")
    draw.note("loss: a function", f"loss: {kind}")

    def distance(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.log1p((outputs - targets).square()).flatten(1).sum(1)

    def weighted(outputs: Tensor, targets: Any) -> Tensor:
        return targets["weight"] * distance(outputs, targets["value"])

    def quantiles(outputs: Tensor, targets: Any) -> Tensor:
        value, (low, high) = targets
        gap = (outputs - value).flatten(1)
        return F.softplus(gap * high[:, None]).mean(1) + F.softplus(-gap * low[:, None]).mean(1)

    if kind == "distance":
        return RandomLoss(distance, _numbers, distance)
    if kind == "weighted examples":
        return RandomLoss(
            weighted, lambda n, s: {"value": _numbers(n, s), "weight": _unit(n, ())}, weighted
        )
    return RandomLoss(
        quantiles, lambda n, s: (_numbers(n, s), (_unit(n, ()), 2 * _unit(n, ()))), quantiles
    )


def coupled_loss(draw: Draw, shape: Shape) -> RandomLoss:
    """Losses of all examples together; the terms are per example, or one number."""
    kind = draw.one("contrastive", "contrastive mean", "batch mean", "correlation", "root mean")
    draw.note(f"coupled: {kind}")

    def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
        one, other = (F.normalize(t.flatten(1), dim=1) for t in (outputs, targets))
        labels = torch.arange(len(one), device=one.device)
        return F.cross_entropy(3 * one @ other.T, labels, reduction="none")

    def batch_mean(outputs: Tensor, targets: Tensor) -> Tensor:
        spread = (outputs - outputs.mean(0)).flatten(1).square().mean(1)
        return spread + (outputs - targets).flatten(1).square().mean(1)

    def correlation(outputs: Tensor, targets: Tensor) -> Tensor:
        a, b = (t.flatten() - t.mean() for t in (outputs, targets))
        return 1 - (a * b).sum() / (1e-3 + a.square().sum() * b.square().sum()).sqrt()

    def root(outputs: Tensor, targets: Tensor) -> Tensor:
        return (1e-6 + (outputs - targets).square().mean()).sqrt()

    found: dict[str, Terms] = {
        "contrastive": contrastive,
        "contrastive mean": lambda o, t: contrastive(o, t).mean(),
        "batch mean": batch_mean,
        "correlation": correlation,
        "root mean": root,
    }
    return RandomLoss(found[kind], _numbers, found[kind])
