"""One of several processes, each with a device of its own: shared numbers are those of one.

torchrun --nproc-per-node W tests/support/device_worker.py
"""

from __future__ import annotations

import device_checks
from torch.distributed import destroy_process_group

import entropic_fast as ef
from entropic_fast.distributed import init
from entropic_fast.ops.random_bits import streams as random


def main() -> None:
    alone = device_checks.network(str(init()))
    shared = ef.distribute(alone)
    v = random.normal((alone.num_params, 2), 0).to(alone.device, alone.dtype)
    device_checks.assert_near(shared.gradient(), alone.gradient())
    device_checks.assert_near(ef.score_gram(shared), ef.score_gram(alone))
    device_checks.assert_near(ef.HessianOperator(shared) @ v, ef.HessianOperator(alone) @ v)
    print("equal")
    destroy_process_group()


if __name__ == "__main__":
    main()
