"""Batches: consecutive examples, parts of them, and their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._utils import trees
from ..._utils.trees import Tree


class Batch(NamedTuple):
    """Consecutive examples: index of the first, inputs and targets, trees of tensors [n, ...]."""

    start: int
    inputs: Tree
    targets: Tree

    @property
    def size(self) -> int:
        """n, the number of examples."""
        return trees.size(self.targets)

    def cut(self, begin: int, end: int) -> Batch:
        """Its examples from `begin` to before `end`."""
        rows = slice(begin, end)
        return Batch(
            self.start + begin, trees.chosen(self.inputs, rows), trees.chosen(self.targets, rows)
        )


def batches_in_range(
    batches: Iterator[Batch], first: int, last: int, *, keep_whole: bool
) -> Iterator[Batch]:
    """The examples from `first` to before `last` of consecutive batches.

    Args:
        keep_whole: never cut a batch, but yield every one that begins in the range.
    """
    for batch in batches:
        if batch.start >= last:
            return
        low, high = max(first - batch.start, 0), min(last - batch.start, batch.size)
        if batch.start >= first and (keep_whole or high == batch.size):
            yield batch
        elif not keep_whole and low < high:
            yield batch.cut(low, high)


class WithTargets(NamedTuple):
    """Inputs of a model whose loss is computed inside: its inputs proper, and the targets."""

    inputs: Tree
    targets: Tree


def checksum(batch: Batch) -> tuple[float, ...]:
    """Size of a batch, and sums over it that depend on the order of its examples."""
    n = batch.size
    order = torch.arange(1, n + 1, dtype=torch.float64)
    sums = []
    for tensor in trees.leaves(batch[1:]):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        examples = real.reshape(n, -1).double().nan_to_num().sum(1)
        sums.append(float((order.to(tensor.device) * examples).sum()))
    return n, *sums


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors' dtypes, shapes and values, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        kept = tensor.detach().cpu().contiguous()
        digest.update(f"{kept.dtype}{list(kept.shape)}".encode())
        digest.update(kept.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
