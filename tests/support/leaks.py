"""How much memory a thousand calls leave behind, in a process of their own.

    python tests/support/leaks.py WHAT MODEL

prints bytes by which the process has grown and tensors that are left, from the 400th call on.
"""

import ctypes
import gc
import sys
from pathlib import Path

import torch
from cases import by_name

import entropic_fast as ef

WARM, CALLS = 400, 1000
LIMIT = 400_000  # bytes: less than half a kilobyte a call


def products(obj):
    v = torch.randn(obj.num_params, dtype=obj.dtype)
    H, G, J = ef.HessianOperator(obj), ef.GGNOperator(obj), ef.JacobianOperator(obj)

    def call(count):
        for _ in range(count):
            H @ v, G @ v, J @ v, H.quadratic_forms(v[:, None])

    return call


def gram(obj):
    def call(count):
        for _ in range(count):
            ef.score_gram(obj), ef.gradient_norms(obj)

    return call


def relax(obj):
    """Cycles of one run, the same number of records whatever their number."""
    theta = obj.parameters_vector()
    path = ef.Path(torch.stack((theta, theta + 0.1, theta + 0.3)))

    def call(count):
        ef.relax(
            obj,
            path,
            [0.2, 0.6],
            ef.ProjectedSGD(1e-3, 1, project_every=2, steps=2 * count),
            recording=ef.Recording(every=2 * count),
        )

    return call


KINDS = {"products": products, "gram": gram, "relax cycles": relax}


def left_by(kind, name):
    obj = by_name(name).objective(2)
    call = KINDS[kind](obj)
    call(WARM)
    before = resident(), tensors()
    call(CALLS)
    return resident() - before[0], tensors() - before[1]


def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in s)
    return int(line.split()[1]) * 1024


def tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(*left_by(*sys.argv[1:]))
