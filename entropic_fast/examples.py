"""The data of an Objective: tensors, a Dataset or batches, read in one fixed order."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import checks

DEFAULT_BATCH_SIZE = 256


class Batch(NamedTuple):
    """Consecutive examples: index of the first, inputs [n, ...], targets [n, ...]."""

    start: int
    inputs: Tensor
    targets: Tensor


class Examples:
    """Examples in a fixed order, in batches, on a device.

    Args:
        data: a pair of tensors, a Dataset of (input, target), or a re-iterable of batches.
        device: where batches are delivered.
        dtype: floating-point inputs are cast to it.
        batch_size: examples a batch; None for 256, or for the batches as they come.

    Raises:
        ValueError: empty data, lengths that differ, data that change between two readings.
    """

    def __init__(
        self, data: Any, device: torch.device, dtype: torch.dtype, batch_size: int | None
    ) -> None:
        self.device, self.dtype = device, dtype
        self._tensors: tuple[Tensor, Tensor] | None = None
        self._source: Iterable[Any] = ()
        self._digest: str | None = None
        if batch_size is not None:
            checks.whole("batch_size", batch_size, 1)
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        if isinstance(data, tuple | list) and len(data) == 2 and _are_tensors(data):
            self._take_tensors(*data)
            return
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            if len(data) == 0:  # type: ignore[arg-type]
                raise _empty()
            data = DataLoader(data, batch_size=self.batch_size, shuffle=False)
        elif isinstance(data, IterableDataset):
            data = DataLoader(data, batch_size=self.batch_size)
        elif batch_size is not None:
            raise checks.fail("batch_size", "None for data that come in batches", str(batch_size))
        self._take_batches(data)

    def _take_tensors(self, inputs: Tensor, targets: Tensor) -> None:
        if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
            raise checks.fail(
                "data",
                "inputs [N, ...] and targets [N, ...] of one length",
                f"{list(inputs.shape)} and {list(targets.shape)}",
            )
        if len(inputs) == 0:
            raise _empty()
        self._tensors = (self._convert(inputs), targets.to(self.device))
        self.count = len(inputs)

    def _take_batches(self, data: Any) -> None:
        if not isinstance(data, Iterable) or isinstance(data, str | bytes | dict):
            raise checks.fail(
                "data",
                "(inputs, targets), a Dataset, or a re-iterable of batches",
                checks.describe(data),
            )
        if iter(data) is data:
            raise checks.fail(
                "data",
                "data that can be read many times",
                f"a one-shot iterator ({type(data).__name__})",
                "pass list(iterator) or a DataLoader",
            )
        self._source = data
        self.count = 0
        first = [_checksum(batch) for batch in self.batches()]
        self.count = sum(size for size, _, _ in first)
        if not first:
            raise _empty()
        if first != [_checksum(batch) for batch in self.batches()]:
            raise checks.fail(
                "data",
                "the same examples in the same order at every reading",
                "others at the second reading",
                "pass shuffle=False, and no random augmentation",
            )

    def cast(self, dtype: torch.dtype) -> Examples:
        """The same examples with floating-point inputs in another dtype."""
        other = copy.copy(self)
        other.dtype = dtype
        if self._tensors is not None:
            other._tensors = (other._convert(self._tensors[0]), self._tensors[1])
        return other

    def batches(
        self, max_examples: int | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Batches in order.

        Args:
            max_examples: stop after so many; None for all.
            batch_size: cut batches into pieces of at most so many (tensors: exactly so many).
        """
        size = batch_size or self.batch_size
        left = self.count if self._tensors is not None else -1
        left = left if max_examples is None else max_examples
        start = 0
        for inputs, targets in self._raw(size):
            for i in range(0, len(inputs), batch_size or max(1, len(inputs))):
                piece = slice(i, i + (batch_size or len(inputs)))
                x, y = inputs[piece], targets[piece]
                if left >= 0:
                    x, y = x[:left], y[:left]
                    left -= len(x)
                if len(x) == 0:
                    return
                yield Batch(start, x, y)
                start += len(x)

    def digest(self) -> str:
        """SHA-256 of all examples, as they were when it was first asked for."""
        if self._digest is None:
            self._digest = digest(t for b in self.batches() for t in (b.inputs, b.targets))
        return self._digest

    @property
    def are_tensors(self) -> bool:
        """Whether they were given as two tensors, which batches of any size are cut from."""
        return self._tensors is not None

    def spread(self, count: int) -> tuple[Tensor, Tensor]:
        """Up to so many examples: of tensors evenly spaced, of batches from the first alone."""
        if self._tensors is not None:
            inputs, targets = self._tensors
        else:
            _, inputs, targets = next(self.batches())
        index = torch.linspace(0, len(inputs) - 1, min(count, len(inputs)), device=self.device)
        index = index.round().long()
        return inputs[index], targets[index]

    def require_count(self, max_examples: int | None) -> int:
        """`max_examples` if it is in 1 .. N, or N for None."""
        if max_examples is None:
            return self.count
        number = checks.whole("max_examples", max_examples, 1)
        if number > self.count:
            raise checks.fail(
                "max_examples", f"at most the {self.count} examples there are", str(max_examples)
            )
        return number

    def _raw(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self._tensors is not None:
            inputs, targets = self._tensors
            for i in range(0, len(inputs), size):
                yield inputs[i : i + size], targets[i : i + size]
            return
        for item in self._source:
            if not isinstance(item, tuple | list) or len(item) != 2 or not _are_tensors(item):
                raise checks.fail(
                    "data", "batches that are (inputs, targets) tensors", checks.describe(item)
                )
            if len(item[0]) != len(item[1]):
                raise checks.fail(
                    "data",
                    "as many targets as inputs in a batch",
                    f"{list(item[0].shape)} and {list(item[1].shape)}",
                )
            if len(item[0]):
                yield self._convert(item[0]), item[1].to(self.device)

    def _convert(self, inputs: Tensor) -> Tensor:
        if inputs.is_floating_point():
            return inputs.to(self.device, self.dtype)
        return inputs.to(self.device)


class RepeatedExamples(Examples):
    """Every example of other data `times` times in a row, each with a target of its own.

    Inputs are repeated as batches are read, so they are held once.

    Args:
        source: the examples to repeat.
        times: how often.
        targets: for each repetition, on the source's device.  # [N * times, ...]
    """

    def __init__(self, source: Examples, times: int, targets: Tensor) -> None:
        self.device, self.dtype = source.device, source.dtype
        self.batch_size = source.batch_size
        self.count = source.count * checks.whole("times", times, 1)
        if len(targets) != self.count:
            raise checks.fail(
                "targets", f"{self.count}, {times} for each example", checks.describe(targets)
            )
        self._tensors = None
        self._base, self._times, self._targets = source, times, targets

    def cast(self, dtype: torch.dtype) -> RepeatedExamples:
        """The same examples with floating-point inputs in another dtype."""
        return RepeatedExamples(self._base.cast(dtype), self._times, self._targets)

    def _raw(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._base.batches(batch_size=max(1, size // self._times)):
            inputs = batch.inputs
            if self._times > 1:
                inputs = inputs.repeat_interleave(self._times, 0)
            start = batch.start * self._times
            yield inputs, self._targets[start : start + len(inputs)]


def _are_tensors(pair: Any) -> bool:
    return all(isinstance(item, Tensor) for item in pair)


def _checksum(batch: Batch) -> tuple[int, float, float]:
    """Size of a batch, and sums over it that depend on the order of its examples."""
    n = len(batch.inputs)
    order = torch.arange(1, n + 1, device=batch.inputs.device, dtype=torch.float64)
    sums = [
        float((order * part.reshape(n, -1).double().nan_to_num().sum(1)).sum())
        for part in (batch.inputs, batch.targets)
    ]
    return n, sums[0], sums[1]


def _empty() -> ValueError:
    return checks.fail("data", "at least one example", "none")


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors' dtypes, shapes and values, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        kept = tensor.detach().cpu().contiguous()
        digest.update(f"{kept.dtype}{list(kept.shape)}".encode())
        digest.update(kept.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
