"""Every op against its float64 reference, on each backend that can run here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._utils.devices import is_gpu
from ..ops import backend
from ..ops._gpu_probe import describe
from ._samples import SAMPLES, SIZES, Arguments, Draw
from ._verdict import Check, relative_error

# Relative norm of the difference: about a hundred units in the last place of float32. A wrong
# index, a lost element or TF32 (1e-3) is far above; another order of summation is far below.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def check_ops(device: torch.device) -> Iterator[Check]:
    """Each op on each usable backend of a device, in float32 and float64.

    On a GPU with one size only, because a new shape may take a second to compile.
    """
    for op, sample in SAMPLES.items():
        for name in backends(sample.family, device.type):
            for dtype in TOLERANCE:
                for size in SIZES[:1] if is_gpu(device) else SIZES:
                    check = _check(op, name, device, dtype, size)
                    yield check
                    if "CUDA error" in check.message:  # nothing runs in this process any more
                        return


def backends(family: str, device_type: str) -> list[str]:
    """The usable backends of a family, without the reference on the CPU, which is the standard.

    A device that no backend names (an emulated one) uses "auto".
    """
    if device_type not in backend.PREFERENCE:
        return ["auto"]
    there = [name for name in backend.NAMES if name in backend.modules_of(family)]
    usable = [name for name in there if backend.unusable(name, device_type) is None]
    return [name for name in usable if name != "reference" or device_type != "cpu"] or ["auto"]


def _check(op: str, name: str, device: torch.device, dtype: torch.dtype, size: str) -> Check:
    arguments = SAMPLES[op].arguments(Draw(size, dtype))
    expected = _results(op, "reference", tuple(_wide(a) for a in arguments))
    kind, against = str(dtype).removeprefix("torch."), "the float64 reference"
    check = Check("op", op, name, str(device), kind, against, TOLERANCE[dtype])
    try:
        found = _results(op, name, tuple(_moved(a, device) for a in arguments))
    except Exception as error:  # whatever a kernel raises is the finding
        return check.failed(describe(error))
    return check.measured(max(relative_error(a, b) for a, b in zip(found, expected, strict=True)))


def _results(op: str, name: str, arguments: Arguments) -> list[Tensor]:
    """The tensors that the op returns and writes, on the CPU."""
    function = getattr(torch.ops.entropic_fast, op)
    with backend_in_force(name):
        returned = function(*arguments)
        found = [returned] if isinstance(returned, Tensor) else [*(returned or ())]
        schema = function.default._schema.arguments
        marks = [a.alias_info is not None and a.alias_info.is_write for a in schema]
        pairs = zip(arguments, marks, strict=False)  # the last may have defaults
        found += [a for a, written in pairs if written and isinstance(a, Tensor)]
        return [tensor.cpu() for tensor in found]


@contextlib.contextmanager
def backend_in_force(name: str) -> Iterator[None]:
    """Use a backend for every op."""
    before = backend.forced()
    backend.set_backend(name)
    try:
        yield
    finally:
        backend.set_backend(before)


def _wide(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return torch.float64
    if isinstance(argument, Tensor):
        dtype = torch.float64 if argument.is_floating_point() else argument.dtype
        return argument.to(dtype, copy=True)
    return argument


def _moved(argument: Any, device: torch.device) -> Any:
    return argument.to(device, copy=True) if isinstance(argument, Tensor) else argument
