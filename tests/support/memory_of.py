"""How much memory a function of a script takes, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

MEBIBYTE = 2**20
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)
# What scripts begin with: `resident()` and `grown(function)` in bytes, one thread, one seed.
PREAMBLE = """
import ctypes, gc, sys, torch
from torch import nn
import entropic_fast as ef

def status(key):
    line = [l for l in open("/proc/self/status") if l.startswith(key)][0]
    return int(line.split()[1]) * 1024

def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")

def grown(function):
    before = resident()
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    function()
    return status("VmHWM") - before

torch.set_num_threads(1)
torch.manual_seed(0)
"""


def script_output(script: str, *arguments: object) -> str:
    """What a script says that follows the preamble above."""
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
