"""Status words, by which ranks know that they are in the same call."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

CROPPED = 60  # characters shown on either side of where two calls begin to differ


def tensor_form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def around_difference(here: str, there: str) -> tuple[str, str]:
    """Two texts around the first difference."""
    pairs = zip(here, there, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(here), len(there)))
    first = max(0, same - CROPPED)
    return here[first : same + CROPPED], there[first : same + CROPPED]


def checksums(tensors: list[Tensor]) -> tuple[float, float]:
    """Norm and sum of all tensors, weighted by position so that swapped ones differ."""
    # Norms and sums of vectors cost one pass each, and no copy is sent. The sum notices a change of
    # sign, which the norm does not.
    norm = total = 0.0
    for i, tensor in enumerate(tensors, 1):
        values = tensor.detach() if tensor.is_floating_point() else tensor.double()
        norm += i * float(torch.linalg.vector_norm(values, dtype=torch.float64))
        total += i * float(values.sum(dtype=torch.float64))
    return norm, total


def as_int(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _number(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def consistent(state: list[int], first: list[int], precision: float) -> bool:
    """Whether two status words are of the same call, with tensors equal up to rounding."""
    if state[1] != first[1]:  # the CRC-32 of the call
        return False
    norm = _number(first[2])
    return all(
        a == b or abs(_number(a) - _number(b)) <= precision * norm
        for a, b in zip(state[2:], first[2:], strict=True)
    )
