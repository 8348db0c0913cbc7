"""Examples that are repeated, each time with another target."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._utils import checks, trees
from ..._utils.trees import Tree
from ._dataset import ExampleSet


class RepeatedExamples(ExampleSet):
    """Every example of other data `times` times in a row, each with its own target.

    Inputs are repeated as batches are read, so they are held once.

    Args:
        source: the examples to repeat.
        times: how often.
        targets: one per repetition, on the source's device, of shape [N * times, ...]; or a list of
            them per batch of the source, whose shapes may differ.
    """

    def __init__(self, source: ExampleSet, times: int, targets: Tensor | list[Tensor]) -> None:
        self.device, self.dtype, self.form = source.device, source.dtype, source.form
        self.one_batch = self.with_targets = False
        self.batch_size = source.batch_size
        self.count = source.count * checks.integer("times", times, 1)
        blocks = [targets] if isinstance(targets, Tensor) else targets
        if sum(map(len, blocks)) != self.count:
            raise checks.invalid(
                "targets", f"{self.count}, {times} for each example", checks.describe(targets)
            )
        self._tensors, self._fingerprint = None, None
        alike = len({block.shape[1:] for block in blocks}) == 1
        self._base, self._times = source, times
        self._targets = [torch.cat(blocks)] if alike else blocks

    def cast(self, dtype: torch.dtype) -> RepeatedExamples:
        """The same examples with floating-point inputs in another dtype."""
        return RepeatedExamples(self._base.cast(dtype), self._times, self._targets)

    def _targets_from(self, start: int, count: int) -> Tensor:
        """Targets of `count` repetitions, within one batch of the source if shapes differ."""
        for block in self._targets:
            if start < len(block):
                return block[start : start + count]
            start -= len(block)
        raise IndexError(start)

    def _raw(self, size: int) -> Iterator[tuple[Tree, Tree]]:
        for batch in self._base.batches(batch_size=max(1, size // self._times)):
            inputs = batch.inputs
            if self._times > 1:
                inputs = trees.mapped(lambda t: t.repeat_interleave(self._times, 0), inputs)
            yield inputs, self._targets_from(batch.start * self._times, batch.size * self._times)
