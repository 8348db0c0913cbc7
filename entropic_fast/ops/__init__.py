"""Kernel families: schema, checks and dispatch of every compiled operation, one package per family.

Start with `backend`, which chooses the implementation of each family, and `projected_step`, the
largest. Relies on `_torch` and `_utils`.
"""

from entropic_fast.ops import conv_example_grads as conv_example_grads  # each registers its family
from entropic_fast.ops import gram_update as gram_update
from entropic_fast.ops import langevin as langevin
from entropic_fast.ops import norm_act_tangents as norm_act_tangents
from entropic_fast.ops import norm_example_grads as norm_example_grads
from entropic_fast.ops import projected_step as projected_step
from entropic_fast.ops import random_bits as random_bits
