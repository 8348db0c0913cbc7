"""A GPU emulated on the CPU: a device "emulated:0" whose numbers only torch's dispatcher reaches.

Its tensors are wrappers. Every operation on them passes through `EmulatedTensor`, computes on the
CPU and is judged as a GPU would judge it: operands on two devices are rejected; launches, host
synchronizations and copies from the host are counted; synchronizations and copies are rejected
while a graph is captured; and float32 convolutions and matrix products that a GPU would compute in
TF32 are recorded with the line of the package that made them.

    with emulated_gpu.present():
        obj = ef.Objective(model, "mse", data, device="emulated")
        with emulated_gpu.counted() as seen:
            ef.HessianOperator(obj) @ v
        print(seen, emulated_gpu.reduced_precision)

A launch is an operation that is neither a view nor an allocation; an operation of the package and
the replay of a graph are one each. A synchronization is a value read back (`float`, `item`,
`.cpu()`) or a result whose size the host has to know. No memory is pinned, so each copy from the
host would wait. It says nothing of speed, memory, atomics, streams or what cuDNN and cuBLAS choose.
The interface for devices written in Python is experimental: it needs torch 2.14 or newer.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from emulated_operations import (
    KERNELS,
    NAME,
    chosen_batch_norm,
    in_half_precision,
    recurrent,
)
from torch import Tensor
from torch.fx.experimental import proxy_tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

import entropic_fast
from entropic_fast._utils.devices import GPU_TYPES

HANDLED = proxy_tensor.HANDLED_TYPES
# The first release of torch whose interface for such devices is complete enough.
NEEDS = (2, 14)
SUPPORTED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= NEEDS
ROOT = Path(entropic_fast.__file__).parent
aten = torch.ops.aten

# ---- what is counted -----------------------------------------------------------------------------


@dataclasses.dataclass
class Counts:
    """Launches, host synchronizations, and copies from the host."""

    launches: int = 0
    synchronizations: int = 0
    copies: int = 0

    def __sub__(self, other: Counts) -> Counts:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(a - b for a, b in pairs))

    def __str__(self) -> str:
        return (
            f"{self.launches} launches, {self.synchronizations} synchronizations, "
            f"{self.copies} copies from the host"
        )


counts = Counts()
operations: collections.Counter[str] = collections.Counter()  # launches, by operation
# By (file, line, operation) of the package: synchronizations and copies, and float32 products that
# a GPU would compute in TF32.
synchronized: collections.Counter[tuple[str, int, str]] = collections.Counter()
reduced_precision: collections.Counter[tuple[str, int, str]] = collections.Counter()
_graph: Graph | None = None  # that is being captured


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """What happens within, in the object that it yields, once it is left."""
    before, seen = dataclasses.replace(counts), Counts()
    try:
        yield seen
    finally:
        seen.__dict__.update((counts - before).__dict__)


def _synchronize(what: Any) -> None:
    counts.synchronizations += 1
    _note(synchronized, what)
    if _graph is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing ({what})")


def _copy_from_host(what: Any) -> None:
    counts.copies += 1
    _note(synchronized, f"{what} from the host")
    if _graph is not None:
        raise RuntimeError(f"copy from pageable memory when stream is capturing ({what})")


def _note_precision(func: Any, args: tuple[Any, ...]) -> None:
    if func.overloadpacket in PRODUCTS:
        low = torch.backends.cuda.matmul.fp32_precision == "tf32"
    else:
        setting: Any = torch.backends.cudnn.conv
        low = setting.fp32_precision == "tf32"  # torch's default
    if low and any(isinstance(t, Tensor) and t.dtype == torch.float32 for t in args):
        _note(reduced_precision, func)


def _note(places: collections.Counter[tuple[str, int, str]], what: Any) -> None:
    """Count the innermost line of the package that led here, but for those of a model."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if ROOT in file.parents and file.name != "models.py":
            places[str(file.relative_to(ROOT)), frame.f_lineno, str(what)] += 1
            return
        frame = frame.f_back


PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv}
# Results whose size or value the host has to know.
SYNCHRONIZING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
ALLOCATIONS = {
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten.is_same_size.default,
}


def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


# ---- the tensor ----------------------------------------------------------------------------------


class EmulatedTensor(torch.Tensor):
    """A tensor on "emulated:0"; `elem` holds its numbers, on the CPU."""

    elem: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor) -> EmulatedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.elem = elem
        return made

    def __repr__(self, **_: Any) -> str:
        return f"EmulatedTensor({self.elem!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> EmulatedTensor:
        if id(self) not in memo:
            copied = EmulatedTensor(self.elem.detach().clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]

    @property
    def is_cuda(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> Any:
        return self.elem.untyped_storage()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kind = _kind(func)
        if _has_host_tensor(args) or kwargs:
            _reject_mixed_devices(func, kind, args, kwargs)
        if kind.multiplies:
            _note_precision(func, args)
        device = kwargs.get("device")
        to_host = device is not None and not _is_here(device)
        into_host = func is aten.copy_.default and not isinstance(args[0], EmulatedTensor)
        if to_host or into_host or kind.synchronizes or (kind.indexes and _has_mask(args[1])):
            _synchronize(func)
        if func is aten.copy_.default and not isinstance(args[1], EmulatedTensor):
            _copy_from_host(func)
        if kind.indexes:  # an index on the host goes to the device first
            for _ in filter(_is_cpu, _tensors(args[1])):
                _copy_from_host(func)
        if kind.launches:
            counts.launches += 1
            operations[kind.name] += 1
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        plain_args, plain_kwargs = _plain(args), {k: _plain(v) for k, v in kwargs.items()}
        if _graph is not None:
            out = _graph.record(kind.kernel, func._schema, plain_args, plain_kwargs)
        else:
            out = kind.kernel(*plain_args, **plain_kwargs)
        if to_host:
            return out
        if into_host:
            return args[0]
        if not kind.aliases:
            return _wrapped(out)
        return return_and_correct_aliasing(func, args, kwargs, _wrapped(out))


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What matters here about an operation."""

    name: str
    kernel: Any
    launches: bool
    indexes: bool
    synchronizes: bool
    multiplies: bool
    aliases: bool


@functools.cache
def _kind(func: Any) -> _Kind:
    name, schema = str(func), func._schema
    return _Kind(
        name,
        KERNELS.get(func, func),
        launches=not (_is_view(func) or func in ALLOCATIONS),
        indexes=name.startswith(("aten.index.", "aten.index_put", "aten._index_put")),
        synchronizes=func in SYNCHRONIZING,
        multiplies="convolution" in name or func.overloadpacket in PRODUCTS,
        aliases=any(x.alias_info is not None for x in (*schema.arguments, *schema.returns)),
    )


# Three walks over arguments of torch's dispatcher, which hold lists and tuples at most: twice as
# quick as torch's own for any tree.
def _plain(value: Any) -> Any:
    if isinstance(value, EmulatedTensor):
        return value.elem
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(v) for v in value])
    return value


def _wrapped(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, EmulatedTensor):
        return EmulatedTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_wrapped(v) for v in value])
    return value


def _has_host_tensor(args: tuple[Any, ...]) -> bool:
    for value in args:
        if isinstance(value, EmulatedTensor):
            continue
        if isinstance(value, Tensor) or (
            isinstance(value, (list, tuple)) and _has_host_tensor(value)
        ):
            return True
    return False


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def _is_cpu(value: Any) -> bool:
    """Whether this is a tensor on the host that is no single number, which launches may carry."""
    return isinstance(value, Tensor) and not isinstance(value, EmulatedTensor) and value.ndim > 0


def _is_here(device: Any) -> bool:
    return torch.device(device).type == NAME


def _has_mask(indices: Any) -> bool:
    """Whether the host has to know what a mask on the device selects."""
    masks = [t for t in _tensors(indices) if isinstance(t, EmulatedTensor)]
    return any(t.dtype in (torch.bool, torch.uint8) for t in masks)


def _reject_mixed_devices(func: Any, kind: _Kind, args: Any, kwargs: Any) -> None:
    if func in COPIES:
        return
    leaves = _tensors((args, list(kwargs.values())))
    if kind.indexes:  # an index may be on the host, what is indexed may not
        leaves = _tensors((args[0], args[2:]))
    on_host = [tuple(t.shape) for t in leaves if _is_cpu(t)]
    if on_host:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and cpu, in {func}: on the cpu {on_host}"
        )


# ---- CUDA graphs ---------------------------------------------------------------------------------


class Graph:
    """Stands for `torch.cuda.CUDAGraph`: the calls of a capture, made again on the same memory."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()

    def record(self, kernel: Any, schema: Any, args: Any, kwargs: Any) -> Any:
        """Run a call, remembering it and the numbers from before that it overwrites."""
        written = [
            value
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [
            kwargs[a.name]
            for a in schema.arguments
            if a.name in kwargs and a.alias_info is not None and a.alias_info.is_write
        ]
        for tensor in _tensors(written):
            key = tensor.untyped_storage().data_ptr()
            if key not in self._before and key not in self._own:
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self._before[key] = (whole, whole.clone())
        out = kernel(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, list(kwargs.values())))}
        self._own |= {t.untyped_storage().data_ptr() for t in _tensors(out)} - given
        self._calls.append((kernel, args, kwargs, out))
        return out

    def replay(self) -> None:
        """Launch the graph."""
        counts.launches += 1
        for kernel, args, kwargs, out in self._calls:
            again = kernel(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def restore(self) -> None:
        """Leave the numbers as they were before the capture, in which nothing is computed."""
        for whole, numbers in self._before.values():
            whole.copy_(numbers)
        self._before.clear()


@contextlib.contextmanager
def _capture(
    graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    global _graph
    # The allocator keeps free memory apart by stream: graphs on others would share none.
    if _stream_of_pool.setdefault(pool, stream) is not stream:
        raise RuntimeError("graphs of one memory pool must be captured on one stream")
    _graph = graph
    try:
        yield
    finally:
        _graph = None
        graph.restore()


_pools = itertools.count(1)
_stream_of_pool: dict[Any, Any] = {}


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        pass


# ---- registration --------------------------------------------------------------------------------


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        torch.set_rng_state(state)


def _empty(size: Any, dtype: Any = None, *_: Any, memory_format: Any = None, **__: Any) -> Any:
    layout = memory_format or torch.contiguous_format
    return EmulatedTensor(torch.empty(size, dtype=dtype, memory_format=layout))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Any:
    return EmulatedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _zero(size: Any, dtype: Any = None, **_: Any) -> Any:
    return EmulatedTensor(torch.zeros(size, dtype=dtype))


def _copy_between(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(source, EmulatedTensor):
        _copy_from_host("copy")
    if not isinstance(target, EmulatedTensor):
        _synchronize("copy to the host")
    _plain(target).copy_(_plain(source))
    return target


@functools.cache
def register() -> tuple[torch.library.Library, torch.library.Library]:
    """Register the device with torch, for the rest of the process.

    It must be there before the first backward pass, in which autograd counts the devices.
    """
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_efficientzerotensor", _zero, "PrivateUse1")
    library.impl("_copy_from", _copy_between, "PrivateUse1")
    fallbacks = torch.library.Library("_", "IMPL")
    fallbacks.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for operation in (aten.conv2d.default, aten.linear.default, aten.matmul.default):
        library.impl(operation, in_half_precision(operation), "AutocastPrivateUse1")
    for layer in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu):
        for kind in ("input", "data"):
            operation = getattr(layer, kind)
            library.impl(operation, recurrent(operation), "AutogradPrivateUse1")
    return library, fallbacks


@contextlib.contextmanager
def _captured_under_cudas_names() -> Iterator[None]:
    """For devices that it does not know, torch would trace batch normalization decomposed."""
    operation = aten.native_batch_norm.default
    before = dict(operation.py_kernels)
    for key in (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd):
        operation.py_kernels.pop(key, None)
    operation._dispatch_cache.clear()
    try:
        yield
    finally:
        operation.py_kernels.update(before)
        operation._dispatch_cache.clear()


@contextlib.contextmanager
def present() -> Iterator[None]:
    """Within it torch and the package behave as on a machine with a GPU, named "emulated".

    What it replaces in torch is replaced for the whole process.
    """
    register()
    pretended: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "emulated GPU",
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: _graph is not None,
        "get_device_properties": lambda device=None: types.SimpleNamespace(
            name="emulated GPU", major=9, minor=0, total_memory=8 * 2**30
        ),
        "mem_get_info": lambda device=None: (4 * 2**30, 8 * 2**30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "synchronize": lambda device=None: None,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "CUDAGraph": Graph,
        "graph": _capture,
        "graph_pool_handle": lambda: (0, next(_pools)),
    }
    threads = torch.autograd.is_multithreading_enabled()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    GPU_TYPES.add(NAME)
    torch.autograd.set_multithreading_enabled(False)  # backward passes stay in this thread
    # `Module.to` would part tied parameters, as it cannot turn one kind of tensor into another.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with (
            mock.patch.multiple(torch.cuda, **pretended),
            mock.patch.object(torch, "batch_norm", chosen_batch_norm),
            # Else what a model holds besides parameters and buffers would be traced by value.
            mock.patch.object(proxy_tensor, "HANDLED_TYPES", (*HANDLED, EmulatedTensor)),
            _captured_under_cudas_names(),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        torch.autograd.set_multithreading_enabled(threads)
        GPU_TYPES.discard(NAME)
