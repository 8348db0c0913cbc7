"""Checks of tensors that every kernel family needs."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid

DTYPES = (torch.float32, torch.float64)


def reject_autograd(**tensors: Any) -> None:
    """Raise ValueError for tensors that autograd follows: no op here has a derivative."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise invalid(
                name,
                "a tensor that autograd does not follow",
                "one with requires_grad=True",
                f"call under torch.no_grad() or pass {name}.detach()",
            )


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise invalid(name, "dtype float32 or float64", str(tensor.dtype), "convert it first")


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tuple(tensor.shape) != shape:
        raise invalid(name, f"shape {list(shape)}", f"shape {list(tensor.shape)}")


def check_like(name: str, tensor: Tensor, first: str, other: Tensor) -> None:
    """The same dtype and device as the tensor of the name `first`."""
    if tensor.dtype != other.dtype:
        raise invalid(
            name, f"dtype {other.dtype} as {first}", str(tensor.dtype), "convert one of them"
        )
    check_device(name, tensor, first, other)


def check_device(name: str, tensor: Tensor, first: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise invalid(
            name, f"device {other.device} as {first}", str(tensor.device), "move it there"
        )


def check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise invalid(name, "a contiguous tensor", layout(tensor), f"pass {name}.contiguous()")


def layout(tensor: Tensor) -> str:
    """A tensor's strides, for messages."""
    return f"strides {tuple(tensor.stride())} for shape {list(tensor.shape)}"


def check_overlap(names: Sequence[str], arguments: Sequence[Any], written: Container[str]) -> None:
    """Raise ValueError where a tensor that is written shares memory with another one.

    Address ranges are compared. Two tensors [K, ...] of the same stride along K may interleave, as
    the slices [:, 0] and [:, 1] of one tensor do.
    """
    spans = []
    for name, tensor in zip(names, arguments, strict=True):
        if isinstance(tensor, Tensor):
            start, end = span(tensor)
            if start < end:
                spans.append((start, end, name, tensor))
    spans.sort()  # by start: tensors that overlap follow one another
    reached = 0
    for start, end, _, _ in spans:
        if start < reached:
            spans.sort(key=lambda entry: names.index(entry[2]))
            break
        reached = end
    else:
        return
    for a, b in combinations(spans, 2):
        (a_start, a_end, a_name, a_tensor), (b_start, b_end, b_name, b_tensor) = a, b
        meet = a_start < b_end and b_start < a_end and (a_name in written or b_name in written)
        if meet and not _interleaved(a_tensor, b_tensor):
            ours, theirs = (a_name, b_name) if a_name in written else (b_name, a_name)
            expected = f"memory of its own, apart from {theirs}"
            raise invalid(ours, expected, "tensors that overlap", "clone one")


def span(tensor: Tensor) -> tuple[int, int]:
    """The address of the first element, and the one past the last; equal if there is none."""
    start, count = tensor.data_ptr(), tensor.numel()
    if count and not tensor.is_contiguous():
        count = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + count * tensor.element_size()


def _interleaved(a: Tensor, b: Tensor) -> bool:
    if a.dim() != 3 or b.dim() != 3 or a.stride(0) != b.stride(0) or a.stride(0) <= 0:
        return False
    period = a.stride(0) * a.element_size()
    (a_start, a_end), (b_start, b_end) = span(a[0]), span(b[0])
    offset = (b_start - a_start) % period
    return a_end - a_start <= offset and offset + b_end - b_start <= period
