"""Factored gradients of all examples, kept until their Gram matrix is computed.

For each parameter rows, or a layer's input and the gradient of its output, whichever is smaller:
for WRN-16-4 a fifth of the score matrix.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..._torch.memory_budget import padded_rows
from ..._utils.devices import is_gpu
from .layer_rules import DenseGrad, FactoredGrad

# Mount types whose files are in memory.
_IN_MEMORY = ("tmpfs", "ramfs")


def compact_form(grad: FactoredGrad) -> FactoredGrad:
    """The gradients as they are, or as columns if these take no more memory."""
    if isinstance(grad, DenseGrad) or grad.example_bytes < grad.row_bytes:
        return grad
    out = grad.tensors[-1].new_empty(grad.count, grad.width)
    grad.write_columns(0, grad.groups, out)
    return DenseGrad(out, grad.form)


class InconsistentShapesError(RuntimeError):
    """Examples with tensors of different shapes, or different layer rules, do not fit one array."""


class ActivationCache:
    """Factored gradients of E examples, written chunk by chunk and read parameter by parameter.

    `survey` has the gradients of a few examples in the form in which they are kept. In a folder,
    `window` examples are mapped at once. On a GPU, rows of parameters with the same `group` are
    adjacent columns of one matrix, to be multiplied at once.
    """

    def __init__(
        self,
        survey: dict[str, FactoredGrad],
        count: int,
        folder: Path | None,
        window: int,
        group: Callable[[str], str] = lambda name: "",
    ) -> None:
        self.survey, self.count, self.folder = survey, count, folder
        # Files are mapped one window at a time, as mapped pages count as memory while in use.
        self.window = count if folder is None else window
        self._memory: dict[str, tuple[Tensor, ...]] = {}
        self._joint: list[tuple[str, list[str], Tensor]] = []
        if folder is None:
            self._join(group)
            self._memory |= {
                name: tuple(t.new_empty(count, *t.shape[1:]) for t in grad.tensors)
                for name, grad in survey.items()
                if name not in self._memory
            }
            # Which examples were not put, by parameter: their gradients are 0.
            self._missing = {name: torch.ones(count, dtype=torch.bool) for name in survey}
        else:
            for index, (_, grad) in enumerate(survey.items()):
                for i, t in enumerate(grad.tensors):
                    # Sparse files of their final size, to be mapped for writing.
                    with open(self._path(index, i), "wb") as file:
                        file.truncate(count * t[:1].numel() * t.element_size())
        self._index = {name: index for index, name in enumerate(survey)}

    def _join(self, group: Callable[[str], str]) -> None:
        alike: dict[tuple[str, torch.dtype], list[str]] = {}
        for name, grad in self.survey.items():
            if isinstance(grad, DenseGrad) and is_gpu(grad.tensors[0].device):
                alike.setdefault((group(name), grad.tensors[0].dtype), []).append(name)
        for (key, _), together in alike.items():
            widths = [self.survey[name].width for name in together]
            # One update of wide rows instead of one per parameter.
            rows = padded_rows(self.survey[together[0]].tensors[0], self.count, sum(widths))
            self._joint.append((key, together, rows))
            parts = rows.split_with_sizes(widths, 1)
            self._memory |= {n: (part,) for n, part in zip(together, parts, strict=True)}

    def joint(self) -> Iterator[tuple[str, list[str], Tensor]]:
        """(key, names, rows [E, sum of widths]) of the parameters with adjacent rows."""
        for key, names, rows in self._joint:
            for name in names:
                self.grad(name, 0, self.count)  # writes the zeros of examples without a gradient
            yield key, names, rows

    def put(self, start: int, name: str, grad: FactoredGrad) -> None:
        """Keep the gradients of a chunk; `start` is the index of its first example."""
        if name not in self.survey:
            raise InconsistentShapesError(f"the first does not depend on {name!r}")
        # Another layer rule writes columns in another order, which products would mix up.
        if grad.form != self.survey[name].form:
            raise InconsistentShapesError(f"layer rules of {name!r}")
        where = slice(start, start + grad.count)
        if self.folder is None:
            # Examples whose loss does not depend on the parameter are never put: they stay 0.
            self._missing[name][where] = False
            if isinstance(self.survey[name], DenseGrad) and not isinstance(grad, DenseGrad):
                grad.write_columns(0, grad.groups, self._memory[name][0][where])
                return
        # In the form of the survey, whichever takes less memory there.
        kept = compact_form(grad)
        expected = [t.shape[1:] for t in self.survey[name].tensors]
        if expected != [t.shape[1:] for t in kept.tensors]:
            raise InconsistentShapesError(f"shapes at {name!r}")
        if self.folder is None:
            for stored, values in zip(self._memory[name], kept.tensors, strict=True):
                stored[where] = values
            return
        for i, values in enumerate(kept.tensors):
            mapped = self._map(name, i, start, kept.count, "r+")
            mapped.copy_(values)  # unmapped with the last reference; the system writes the pages

    def factored_grads(self, name: str) -> Iterator[tuple[int, FactoredGrad]]:
        """(index of the first example, gradients) for each window of examples."""
        for start in range(0, self.count, self.window):
            yield start, self.grad(name, start, min(start + self.window, self.count))

    def grad(self, name: str, begin: int, end: int) -> FactoredGrad:
        """The gradients of examples begin to end: views in memory, or mapped from files."""
        sample = self.survey[name]
        if self.folder is None:
            missing = self._missing[name]
            if bool(missing.any()):
                for stored in self._memory[name]:
                    stored[missing.to(stored.device)] = 0
                missing.fill_(False)
            return sample.with_tensors(tuple(stored[begin:end] for stored in self._memory[name]))
        tensors = (
            self._map(name, i, begin, end - begin, "r").to(t.device)
            for i, t in enumerate(sample.tensors)
        )
        return sample.with_tensors(tuple(tensors))

    def drop(self, name: str) -> None:
        """Free the memory of one parameter; of adjacent ones, with the last of them."""
        self._memory.pop(name, None)
        # Adjacent columns share one allocation.
        self._joint = [j for j in self._joint if any(n in self._memory for n in j[1])]

    def _path(self, index: int, i: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index}-{i}"

    def _map(self, name: str, i: int, start: int, n: int, mode: str) -> Tensor:
        sample = self.survey[name].tensors[i]
        example_bytes = sample[:1].numel() * sample.element_size()
        if n == 0 or example_bytes == 0:
            return sample.new_zeros(n, *sample.shape[1:])
        # Copy-on-write for reading, as torch accepts no read-only arrays.
        mapped = np.memmap(
            self._path(self._index[name], i),
            dtype=np.uint8,
            mode="c" if mode == "r" else "r+",
            offset=start * example_bytes,
            shape=(n * example_bytes,),
        )
        return torch.from_numpy(mapped).view(sample.dtype).view(n, *sample.shape[1:])


def spill_folder(needed: int) -> Path | None:
    """TMPDIR or /var/tmp, if on a disk with 10 % more than `needed` bytes free; else None."""
    for place in (tempfile.gettempdir(), "/var/tmp"):
        try:
            state = os.statvfs(place)
        except (OSError, AttributeError):
            continue
        # A folder in tmpfs would fill the memory that is to be saved.
        if state.f_bavail * state.f_frsize > 1.1 * needed and not _is_memory(place):
            return Path(place)
    return None


def _is_memory(place: str) -> bool:
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    path = os.path.realpath(place)
    # The longest mount point that contains the folder is its own.
    holding = [(len(m), kind) for m, kind in mounts if (path + "/").startswith(m.rstrip("/") + "/")]
    return bool(holding) and max(holding)[1] in _IN_MEMORY
