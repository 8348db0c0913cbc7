"""Memory that the C library keeps for the next tensor."""

from __future__ import annotations

import ctypes
import os
from functools import cache

# glibc's names and numbers, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MMAP_THRESHOLD = 32 * 2**20  # the most that glibc takes
TRIM_THRESHOLD = 2**30
TOP_PAD = 64 * 2**20


@cache
def keep_freed_memory() -> bool:
    """Have glibc hand out freed memory again instead of returning it to the system.

    A product frees and takes some hundred tensors of megabytes for every tile. Returned to the
    system, each page is cleared and mapped again at its next use, and a product of ResNet-20 took
    1.6 times as long. Up to 1 GiB stays with the process. Environment variables
    MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ overrule it; other C libraries are let be.

    Returns:
        whether it was done.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return False
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    done = [
        library.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD),
        library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD),
        library.mallopt(M_TOP_PAD, TOP_PAD),
    ]
    return all(done)
