"""Kernel families: schema, checks and dispatch of every compiled operation, one module a family."""

from entropic_fast.ops import jet as jet  # each registers its family
from entropic_fast.ops import langevin as langevin
from entropic_fast.ops import random_bits as random_bits
from entropic_fast.ops import score_conv as score_conv
from entropic_fast.ops import score_gram as score_gram
from entropic_fast.ops import score_norm as score_norm
from entropic_fast.ops import step as step
