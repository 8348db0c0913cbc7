"""Every test of this folder runs where an emulated GPU is present."""

from __future__ import annotations

import pytest
import torch

TOO_OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14)


@pytest.fixture(autouse=True)
def emulated():
    """The emulated GPU, with nothing counted yet."""
    if TOO_OLD:
        pytest.skip(f"devices written in Python need torch 2.14, this is {torch.__version__}")
    import emulated_gpu

    with emulated_gpu.present():
        for counter in (emulated_gpu.synchronized, emulated_gpu.reduced_precision):
            counter.clear()
        yield emulated_gpu
