"""What tests/test_on_cuda.py runs on a GPU passes on the emulated one."""

from __future__ import annotations

import contextlib

import device_checks
import pytest


@pytest.mark.parametrize("name", device_checks.CHECKS)
def test_a_call_on_a_gpu_is_the_call_on_the_cpu(name: str):
    device_checks.CHECKS[name]("emulated")


@pytest.mark.parametrize("check", device_checks.READ_NOTHING)
def test_what_reads_nothing_back(check, emulated):
    @contextlib.contextmanager
    def watched():
        with emulated.counted() as seen:
            yield
        assert (seen.synchronizations, seen.copies) == (0, 0)

    check("emulated", watched)
