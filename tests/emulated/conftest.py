"""Every test of this folder runs where an emulated GPU is present."""

from __future__ import annotations

import emulated_gpu
import pytest
import torch


@pytest.fixture(autouse=True)
def emulated():
    """The emulated GPU, with nothing counted yet."""
    if not emulated_gpu.SUPPORTED:
        pytest.skip(f"devices written in Python need torch 2.14, this is {torch.__version__}")
    if torch.cuda.is_available():
        pytest.skip("a GPU is in use; without -m gpu it is hidden, and the emulated one is there")
    with emulated_gpu.present():
        for counter in (emulated_gpu.synchronized, emulated_gpu.reduced_precision):
            counter.clear()
        yield emulated_gpu
