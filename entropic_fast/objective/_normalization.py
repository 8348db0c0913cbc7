"""Normalization layers: a model's private copy in either mode, and re-estimated statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._utils import checks
from .._utils.trees import Tree
from ._modules import copied
from .data import Batch

# Layers whose evaluation-mode output uses statistics gathered in training.
NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def norm_layers(model: nn.Module) -> list[Any]:
    """The layers that may use stored statistics."""
    return [m for m in model.modules() if isinstance(m, NORM_LAYERS)]


def mixes_examples(model: nn.Module, norm: str) -> bool:
    """Whether a layer normalizes over its batch; instance normalization does not."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return norm == "batch" and any(isinstance(m, batch_norm) for m in norm_layers(model))


def gather_statistics(
    model: nn.Module, batches: Iterable[Batch], forward: Callable[[Tree], Any]
) -> None:
    """Average every layer's mean and (unbiased) variance over batches, weighted by their size.

    `forward` runs the model on inputs [n, ...], with the buffers to change.
    """
    layers = [m for m in norm_layers(model) if m.track_running_stats]
    state = [(layer.training, layer.momentum) for layer in layers]
    seen = 0
    try:
        for layer in layers:
            layer.train()
        with torch.no_grad():
            for batch in batches:
                seen += batch.size
                for layer in layers:
                    layer.momentum = batch.size / seen
                forward(batch.inputs)
    finally:
        for layer, (training, momentum) in zip(layers, state, strict=True):
            layer.train(training)
            layer.momentum = momentum


def explain_too_few(error: ValueError, size: int) -> None:
    """Raise a clearer error, if a model's says that a batch of `size` examples is too small."""
    if "more than 1 value per channel" in str(error):
        raise checks.invalid(
            "batch_size",
            "at least 2 examples in every batch, to normalize by batch statistics",
            f"a batch of {size}",
            "choose one that leaves no single example over",
        ) from error


def _contiguous_gradient(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The output unchanged, with a contiguous gradient.

    torch's instance normalization (2.13 to 2.15, CPU) returns a wrong gradient of weight and bias
    for a channels-last one, as from a sequence of positions.
    """
    return output.unsqueeze(-1).select(-1, 0)


def private_copy(model: nn.Module, norm: str) -> nn.Module:
    """A copy in evaluation mode, whose layers use stored ("running") or "batch" statistics."""
    private = copied(model).eval()
    for name, layer in private.named_modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            layer.sparse = False  # the layout of a gradient, which a flat theta cannot have
        if not isinstance(layer, NORM_LAYERS):
            continue
        instance = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
        if instance and _contiguous_gradient not in layer._forward_hooks.values():
            layer.register_forward_hook(_contiguous_gradient)
        if norm == "batch":
            # Without stored statistics a layer uses the batch's, and changes no buffer.
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise checks.invalid(
                "norm",
                "running statistics in every BatchNorm layer",
                f"{name!r} built with track_running_stats=False",
                'pass norm="batch"',
            )
    return private
