"""Freed memory kept by the C library for the next tensor."""

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
    """Have glibc keep up to 1 GiB of freed memory; whether that was done.

    A product allocates and frees some hundred tensors of megabytes per tile. Returned to the
    system, each page is cleared and mapped again, and a product of ResNet-20 took 1.6 times as
    long. The environment variables MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ take
    precedence.
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
