"""Free memory of a device, and budgets of computations."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from .._utils import checks
from .._utils.devices import is_gpu

# Share of the free memory that a computation takes by default. A GPU serves one process,
# so half of it; fragments and the workspaces of cuDNN and cuBLAS need the remainder.
CPU_SHARE, GPU_SHARE = 0.25, 0.5
# Share of the free memory up to which a GPU's cached memory is not inspected, which would list
# every block of the allocator.
CACHED_UNSEEN = 1 / 8
_MIB, _GIB = 2**20, 2**30


def available_bytes(device: torch.device) -> int:
    """Free memory of a device; for the CPU within the limits of its control group."""
    if is_gpu(device):
        free = int(torch.cuda.mem_get_info(device)[0])
        # What torch's allocator has cached counts as used there, but is free to torch.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if cached > free * CACHED_UNSEEN:
            cached -= _free_in_private_pools(device)
        return free + max(0, cached)
    limits = [_read_meminfo(), _read_cgroup()]
    readings = [limit for limit in limits if limit is not None]
    if readings:
        return min(readings)
    try:  # systems without /proc: half of the physical memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return 4 * _GIB


def _free_in_private_pools(device: torch.device) -> int:
    """Free bytes that only the CUDA graphs that own them can use."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    except RuntimeError:  # an allocator without segments
        return 0
    return sum(
        int(segment["total_size"]) - int(segment["allocated_size"])
        for segment in segments
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def resolve_budget(memory_budget: int | None, device: torch.device) -> int:
    """The budget in bytes; default, a quarter of a CPU's free memory or half of a GPU's."""
    if memory_budget is None:
        share = GPU_SHARE if is_gpu(device) else CPU_SHARE
        return int(share * available_bytes(device))
    return checks.integer("memory_budget", memory_budget, 1)


def padded_rows(like: Tensor, count: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Empty rows [count, width], on a GPU at a stride of a multiple of 16 numbers.

    With rows at odd addresses, kernels would load 4 bytes at a time instead of 16.
    """
    apart = -(-width // 16) * 16 if is_gpu(like.device) else width
    return like.new_empty(count, apart, dtype=dtype or like.dtype)[:, :width]


def too_small(needed: int, budget: int, what: str, do: str) -> ValueError:
    """The error for a budget below the needs of the smallest step."""
    return checks.invalid(
        "memory_budget", f"at least {readable(needed)} for {what}", readable(budget), do
    )


def readable(size: int) -> str:
    """A number of bytes for people, such as '3.0 MiB'."""
    for unit, scale in (("GiB", _GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def _read_meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _read_cgroup() -> int | None:
    """Memory left under the control group's limit (containers), if it sets one."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            most, now = Path(limit).read_text().strip(), int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        if most.isdigit() and int(most) < 2**60:
            return max(0, int(most) - now)
    return None
